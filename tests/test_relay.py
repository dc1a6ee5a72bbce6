"""A server whose generator runs elsewhere: the same API, and no failure there is one here."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from rag2.answering.ask import Answer, Ask
from rag2.answering.rag import Rag
from rag2.answering.remote import Remote
from rag2.evaluation.questions import load_questions
from rag2.serve.engine import Work
from rag2.serve.errors import ApiError
from rag2.serve.limits import Limits
from rag2.serve.relay import Relay
from rag2.serve.server import Server
from small_systems import served, small_system
from upstreams import Fake, remote, running


@pytest.fixture(scope="module")
def home_system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world's documents, all in this process."""
    with small_system(home, tmp_path_factory.mktemp("relay")) as rag:
        yield rag


@pytest.fixture(scope="module")
def shared(home_system: Rag) -> Iterator[Fake]:
    """A server of its generator."""
    with running(Fake(home_system.generator)) as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake) -> Iterator[Fake]:
    """The same, well behaved."""
    shared.fault = ""
    yield shared
    shared.fault = ""


@pytest.fixture
def system(home_system: Rag, fake: Fake) -> Iterator[Remote]:
    """The system whose generator is there."""
    with remote(home_system, fake.url) as system:
        yield system


@pytest.fixture
def server(system: Remote) -> Iterator[Server]:
    """A small server of it."""
    limits = Limits(deadline=3.0, together=2, waiting=2, drain_seconds=10.0)
    with served(system, limits) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client without opinions."""
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield client


@pytest.fixture
def question(home: Path, dice: random.Random) -> str:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl")).question


def body(question: str, **options: Any) -> dict[str, Any]:
    rag2 = {"reading": "concat"} | options.pop("rag2", {})
    return {"prompt": question, "max_tokens": 8, "rag2": rag2, **options}


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def relay(server: Server) -> Relay:
    engine = server.serving.engine
    assert isinstance(engine, Relay)
    return engine


def test_the_openai_client_gets_the_answers_of_a_generator_at_home(
    server: Server, home_system: Rag, question: str
):
    messages: Any = [{"role": "user", "content": question}]
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        for options in ({"reading": "concat"}, {"k": 0}, {"k": 1}):
            expected = home_system.answer(question, **options)
            got: Any = client.chat.completions.create(
                model="x", messages=messages, logprobs=True, extra_body={"rag2": options}
            )
            choice = got.choices[0]
            assert choice.message.content == expected.text
            chunks = [cited["chunk"] for cited in choice.message.citations]
            assert chunks == [cited.chunk for cited in expected.citations]
            assert got.system_fingerprint == str(expected.place)
            assert got.usage.prompt_tokens == expected.prompt_tokens
            pieces = client.chat.completions.create(
                model="x", messages=messages, stream=True, extra_body={"rag2": options}
            )
            told = [piece.choices[0].delta.content or "" for piece in pieces]
            assert "".join(told) == expected.text


def test_chunks_read_apart_come_with_their_posterior_and_scores_are_the_harness(
    http: httpx.Client, home_system: Rag, system: Remote, question: str
):
    got = http.post("/v1/completions", json=body(question, rag2={"reading": "marginal"})).json()
    expected = system.answer(question, reading="marginal", max_new_tokens=8)
    assert got["choices"][0]["text"] == expected.text
    shares = [cited["posterior"] for cited in got["choices"][0]["citations"]]
    assert sum(shares) == pytest.approx(1)
    choices = ["Ola", "Nora", "a lighthouse"]
    scored = http.post("/v1/score", json={"question": question, "choices": choices}).json()
    logps = [choice["logprob"] for choice in scored["choices"]]
    expected = home_system.score(question, choices)
    assert logps == pytest.approx(expected.logps, abs=1e-4) and scored["best"] == expected.best


def test_it_says_how_it_can_read_and_refuses_the_rest(http: httpx.Client, question: str):
    told = http.get("/v1/models").json()["data"][0]["rag2"]
    assert told["readings"] == ["marginal", "concat"]
    response = http.post("/v1/completions", json=body(question, rag2={"reading": "token"}))
    assert response.status_code == 400 and "reading=concat" in response.json()["error"]["message"]
    assert http.get("/metrics").status_code == 200


@pytest.mark.parametrize("fault", ["breaks", "html", "busy", "floods", "null", "hangs up", "locks"])
def test_a_server_that_fails_is_503_and_the_next_answer_is_good(
    http: httpx.Client, fake: Fake, server: Server, question: str, fault: str
):
    expected = http.post("/v1/completions", json=body(question)).json()["choices"]
    fake.fault = fault
    response = http.post("/v1/completions", json=body(question))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "generator_unavailable")
    assert int(response.headers["retry-after"]) > 0 and fake.url not in error["message"]
    with http.stream("POST", "/v1/completions", json=body(question, stream=True)) as stream:
        events = [line for line in stream.iter_lines() if line]
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "generator_unavailable"
    assert http.post("/v1/retrieve", json={"query": question}).status_code == 200
    fake.fault = ""
    assert http.post("/v1/completions", json=body(question)).json()["choices"] == expected
    until(lambda: relay(server).live == 0 and fake.open == 0)


def test_an_answer_that_takes_too_long_is_408_and_takes_its_request_along(
    http: httpx.Client, fake: Fake, server: Server, question: str
):
    fake.fault = "dawdles"
    began = time.monotonic()
    response = http.post("/v1/completions", json=body(question))
    assert response.status_code == 408 and 2.5 < time.monotonic() - began < 6
    until(lambda: relay(server).live == 0 and fake.open == 0)


def test_whoever_leaves_takes_the_request_along(
    http: httpx.Client, fake: Fake, server: Server, question: str
):
    fake.fault = "dawdles"
    with http.stream("POST", "/v1/completions", json=body(question, stream=True)) as stream:
        until(lambda: fake.open == 1)
        stream.close()
    began = time.monotonic()
    until(lambda: relay(server).live == 0 and fake.open == 0)
    assert time.monotonic() - began < 2  # before the deadline
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body(question), timeout=0.5)
    until(lambda: relay(server).live == 0 and fake.open == 0)


def test_more_than_it_takes_is_429_while_the_others_are_answered(
    http: httpx.Client, fake: Fake, server: Server, question: str
):
    fake.fault = "dawdles"
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(url, json=body(question), timeout=30).status_code)

    url = f"{server.address}/v1/completions"
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    until(lambda: (relay(server).live, relay(server).waiting) == (2, 2))
    response = http.post("/v1/completions", json=body(question))
    assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
    for thread in threads:
        thread.join(20)
    assert statuses == [408] * 4
    fake.fault = ""
    assert http.post("/v1/completions", json=body(question)).status_code == 200


def test_what_was_accepted_is_answered_before_the_end(system: Remote, fake: Fake, question: str):
    slow = Relay(system, Limits())
    told: list[Any] = []

    works = [
        Work(Ask(question, seed=n, max_new_tokens=4), told.append, time.monotonic() + 30)
        for n in range(8)
    ]
    slow.submit(works)
    assert slow.close(30)
    assert len([event for event in told if isinstance(event, Answer)]) == 8
    with pytest.raises(ApiError, match="shutting down"):
        slow.submit(works)

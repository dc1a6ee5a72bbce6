"""What a server lets in, what it gives to the models, and when it gives up, in numbers."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from rag2.answering.ask import Answer, Ask
from rag2.answering.rag import Rag
from rag2.evaluation.questions import load_questions
from rag2.generator.mixture import Mixture, Mixtures
from rag2.generator.prompt import Prompt
from rag2.serve.app import build
from rag2.serve.engine import Engine
from rag2.serve.errors import ApiError
from rag2.serve.limits import Limits
from rag2.serve.server import Server, hosts_of
from rag2.serve.serving import Serving
from rag2.serve.work import Work
from rag2.types import Document
from rough_systems import PREFIXES, prompt, rough_system
from small_systems import TOKEN, served
from wire import Got, asked, check_error, edited, events

TEXTS = ["The old mill.", "Karin lives near the harbour.", "mill", "Ola keeps the lantern at noon."]


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """A system whose towers and chunks are told apart, and that stops at no text."""
    folder = tmp_path_factory.mktemp("details")
    with rough_system(home, folder, temperature=3.0, prompt=Prompt(budget=800), stop=[]) as rag:
        yield rag


@pytest.fixture(scope="module")
def server(system: Rag) -> Iterator[Server]:
    """A server of it that goes by the names of a loopback address."""
    with served(system, Limits(hosts=hosts_of("127.0.0.1", []))) as server:
        yield server


@pytest.fixture
def question(home: Path, dice: random.Random) -> str:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl")).question


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the generator reads from now on."""
    seen: list[list[int]] = []
    add = Mixtures.add

    def spied(self: Mixtures, mixtures: Sequence[Mixture]) -> None:
        seen.extend(list(ids) for mixture in mixtures for ids in mixture.contexts)
        add(self, mixtures)

    monkeypatch.setattr(Mixtures, "add", spied)
    return seen


def post(server: Server, path: str, **body: Any) -> Any:
    got = asked(server.address, "POST", path, body)
    assert got.status == 200, got
    return got.json


# ----- who may do what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    ["", TOKEN[:1], TOKEN[:-1], TOKEN[1:], f"{TOKEN}x", TOKEN.upper(), f"{TOKEN} {TOKEN}"],
)
def test_a_part_of_the_token_is_not_the_token(server: Server, given: str):
    body = {"documents": [{"id": "x", "text": "y"}]}
    for method, path, told in (
        ("POST", "/v1/documents", body),
        ("DELETE", "/v1/documents/x", None),
        ("POST", "/v1/refresh", None),
    ):
        for header in (f"Bearer {given}", f"bearer {given}"):
            got = asked(server.address, method, path, told, authorization=header)
            assert got.status == 401 and got.headers["www-authenticate"] == "Bearer"
            check_error(got)
    assert asked(server.address, "GET", "/v1/documents/x").status == 404


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:80", "192.168.0.1", "[::2]"]
)
def test_a_server_on_a_loopback_address_does_not_go_by_a_foreign_name(
    server: Server, method: str, host: str
):
    for path in ("/", "/v1/documents", "/v1/documents/a", "/v1/models", "/v1/retrieve", "/health"):
        got = asked(server.address, method, path, host=host)
        assert got.status == 400, (path, got)
        if method != "HEAD":
            assert got.json["error"]["code"] == "host_not_allowed" and not got.json.get("data")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:80"]
)
def test_a_server_on_a_loopback_address_goes_by_the_names_of_it(server: Server, host: str):
    for path in ("/", "/v1/documents", "/health"):
        assert asked(server.address, "GET", path, host=host).status == 200


def test_any_other_address_goes_by_any_name_until_it_is_told_its_own():
    assert hosts_of("0.0.0.0", []) == [] and hosts_of("0.0.0.0", ["a.example"]) == ["a.example"]
    for own, name in (("localhost",) * 2, ("127.3.2.1",) * 2, ("::1", "[::1]")):
        assert {"localhost", "127.0.0.1", name, "a.example"} <= set(hosts_of(own, ["a.example"]))
    for hosts, statuses in (([], [200, 200]), (["a.example"], [200, 400])):
        client = TestClient(build(Serving(Limits(hosts=hosts), "small", TOKEN)))
        for host, status in zip(("a.example:80", "evil.example"), statuses, strict=True):
            assert client.get("/health", headers={"host": host}).status_code == status


# ----- namespaces --------------------------------------------------------------------------------


def test_a_document_is_removed_from_its_namespace_alone(server: Server, dice: random.Random):
    spaces = ["", "acme", "b c"]
    id = f"twin{dice.randrange(10**9)}"
    for space in spaces:
        body = {"documents": [{"id": id, "text": f"Only in {space}."}], "namespace": space}
        assert edited(server.address, "POST", "/v1/documents", body).json["added"] == 1
    dice.shuffle(spaces)
    for gone, space in enumerate(spaces):
        got = edited(server.address, "DELETE", at(id, space))
        assert got.json["deleted"] and got.json["chunks"] == 1
        there = [asked(server.address, "GET", at(id, other)) for other in spaces]
        assert [got.status for got in there] == [404] * (gone + 1) + [200] * (2 - gone)
        for other, got in zip(spaces[gone + 1 :], there[gone + 1 :], strict=True):
            assert got.json["text"] == f"Only in {other}." and got.json["namespace"] == other
        assert edited(server.address, "DELETE", at(id, space)).status == 404


def at(id: str, namespace: str) -> str:
    """The path of a document."""
    return f"/v1/documents/{id}?namespace={namespace.replace(' ', '%20')}"


@pytest.mark.parametrize("reading", ["marginal", "token", "concat"])
def test_choices_are_scored_from_the_namespaces_asked_for(
    server: Server, system: Rag, question: str, dice: random.Random, reading: str
):
    space = f"space {dice.randrange(10**9)}"
    system.put([Document("d", "Aksel keeps the mill.")], space)
    body = {"question": question, "choices": ["Ola", "Nora"], "reading": reading, "k": 5}
    for namespaces, count in (([space], 1), ([], 0), (None, 5)):
        got = post(server, "/v1/score", **body, namespaces=namespaces)
        assert len(got["citations"]) == count
        if namespaces is not None:
            assert {cited["namespace"] for cited in got["citations"]} <= {space}
    system.remove(["d"], space)


# ----- what the models are given -----------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("roles", [["system"], ["developer"], ["developer", "system"], []])
def test_the_words_of_system_and_developer_and_earlier_turns_are_read_before_the_question(
    server: Server,
    system: Rag,
    question: str,
    dice: random.Random,
    read: list[list[int]],
    roles: list[str],
    k: int,
    streamed: bool,
):
    said = [f"Be brief, {dice.randrange(10**6)}." for _ in roles]
    messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=True)]
    messages += [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Ola"}]},
        {"role": "user", "content": question},
    ]
    header = "".join(f"{words}\n\n" for words in said) + "Question: Who?\nAnswer: Ola\n\n"
    ((hits, _),) = system.searched([Ask(question, k=k)])
    groups = [[hit.chunk.passage] for hit in hits] or [[]]
    texts = [prompt(group, question, header) for group in groups]
    expected = [system.generator.tokenizer(text)["input_ids"] for text in texts]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 1, "rag2": {"k": k}}
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    got = asked(server.address, "POST", "/v1/chat/completions", body)
    assert read == expected
    assert used(got, streamed)["prompt_tokens"] == sum(map(len, expected))


def used(got: Got, streamed: bool) -> dict[str, int]:
    """The tokens that an answer says it took."""
    return (events(got)[-1] if streamed else got.json)["usage"]


def embedded(system: Rag, texts: Sequence[str], side: str) -> np.ndarray:
    """Embeddings [N, D] of one text at a time, by the tower of that side."""
    encoder = system.encoder
    encode = encoder.encode_questions if side == "question" else encoder.encode_chunks
    with torch.no_grad():
        return torch.cat([encode([text]) for text in texts]).double().numpy()


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(
    ("given", "side"), [("query", "question"), ("document", "chunk"), (None, "chunk")]
)
def test_queries_and_documents_are_embedded_by_their_own_towers(
    server: Server, system: Rag, given: str | None, side: str, many: bool
):
    texts = TEXTS if many else TEXTS[:1]
    body = {"input": TEXTS if many else TEXTS[0], "input_type": given}
    got = post(server, "/v1/embeddings", **body)
    expected = embedded(system, texts, side)
    np.testing.assert_allclose([row["embedding"] for row in got["data"]], expected, atol=1e-5)
    other = embedded(system, texts, "chunk" if side == "question" else "question")
    assert np.abs(expected - other).max() > 0.05
    rows = [f"{PREFIXES[f'{side}_prefix']}{text}" for text in texts]
    counted = sum(map(len, system.encoder.tokenizer(rows)["input_ids"]))
    assert got["usage"] == {"prompt_tokens": counted, "total_tokens": counted}


def test_relevance_is_the_softmax_of_inner_products_times_the_scale(
    server: Server, system: Rag, question: str, dice: random.Random
):
    texts = dice.sample(TEXTS, 4)
    (query_D,) = embedded(system, [question], "question")
    heated_N = embedded(system, texts, "chunk") @ query_D / 0.2
    expected_N = np.exp(heated_N) / np.exp(heated_N).sum()
    body = {"query": question, "documents": texts}
    for top in (4, 2):
        results = post(server, "/v1/rerank", **body, top_n=top)["results"]
        assert [row["index"] for row in results] == np.argsort(-expected_N)[:top].tolist()
        scores = [row["relevance_score"] for row in results]
        assert scores == pytest.approx(sorted(expected_N, reverse=True)[:top], abs=1e-5)


def test_a_chunk_is_found_with_its_inner_product_times_the_scale(
    server: Server, system: Rag, question: str
):
    (query_D,) = embedded(system, [question], "question")
    found = post(server, "/v1/retrieve", query=question, k=4)["results"]
    passages = ["\n".join(filter(None, (row["title"], row["text"]))) for row in found]
    scores = embedded(system, passages, "chunk") @ query_D / 0.2
    assert [row["score"] for row in found] == pytest.approx(scores.tolist(), abs=1e-4)
    shares = np.exp(scores / 3) / np.exp(scores / 3).sum()
    assert [row["prior"] for row in found] == pytest.approx(shares.tolist(), abs=1e-5)


# ----- deadlines ---------------------------------------------------------------------------------


@dataclass
class Steps:
    """How many answers each step of the generator was of; `then` comes after the fifth."""

    counts: list[int] = field(default_factory=list)
    then: Callable[[], None] = lambda: None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Those of now; no token ends an answer."""
    monkeypatch.setattr("rag2.answering.draft.ends_of", lambda *_: set())
    steps, go_on = Steps(), Mixtures.go_on

    def counted(self: Mixtures, tokens: Sequence[int | None], over: Sequence[bool]) -> None:
        go_on(self, tokens, over)
        steps.counts.append(len(tokens))
        if len(steps.counts) == 5:
            steps.then()

    monkeypatch.setattr(Mixtures, "go_on", counted)
    return steps


def passed(work: Work) -> Callable[[], None]:
    """Let the deadline of a work be a second ago."""
    return lambda: setattr(work, "until", time.monotonic() - 1)


def work(question: str, tokens: int, told: list[Any], streamed: bool = False) -> Work:
    """An answer of so many tokens that has a minute."""
    ask = Ask(question, k=1, max_new_tokens=tokens)
    return Work(ask, told.append, time.monotonic() + 60, streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_passes_its_deadline_while_it_is_written_ends_then(
    system: Rag, question: str, steps: Steps, streamed: bool
):
    engine, late, other = Engine(system, Limits(deadline=7)), list[Any](), list[Any]()
    works = [work(question, 200, late, streamed), work(question, 20, other, streamed)]
    steps.then = passed(works[0])
    engine.submit(works)
    assert engine.close(30)
    assert steps.counts == [2] * 5 + [1] * 15
    *pieces, failed = late
    assert isinstance(failed, ApiError) and failed.status == 408 and "7 s" in str(failed)
    assert all(isinstance(piece, str) for piece in pieces) and (streamed or not pieces)
    *pieces, answer = other
    assert isinstance(answer, Answer) and len(answer.tokens) == 20 and answer.finish == "length"
    assert "".join(pieces) == (answer.text if streamed else "")
    assert engine.live == engine.waiting == 0


def test_the_place_of_an_answer_that_is_late_goes_to_the_next(
    system: Rag, question: str, steps: Steps
):
    engine, late, other = Engine(system, Limits(together=1)), list[Any](), list[Any]()
    works = [work(question, 200, late), work(question, 3, other)]
    steps.then = passed(works[0])
    engine.submit(works)
    assert engine.close(30)
    assert [said.status for said in late] == [408] and len(other[0].tokens) == 3
    assert steps.counts == [1] * 8

"""The server speaks OpenAI's API to clients not made for it, and says what it stands on."""

import base64
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from rag2.answering.rag import Rag
from rag2.evaluation.questions import load_questions
from rag2.serve.server import Server
from small_systems import TOKEN, served, small_system

EDIT = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world."""
    with small_system(home, tmp_path_factory.mktemp("served")) as rag:
        yield rag


@pytest.fixture(scope="module")
def server(system: Rag) -> Iterator[Server]:
    """A server of it."""
    with served(system) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client without opinions."""
    with httpx.Client(base_url=server.address, timeout=30) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def question(home: Path, dice: random.Random) -> str:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl")).question


def test_the_openai_client_gets_the_answer_with_its_citations(
    client: openai.OpenAI, system: Rag, question: str
):
    expected = system.answer(question)
    messages: Any = [{"role": "user", "content": question}]
    got = client.chat.completions.create(model="small", messages=messages, logprobs=True)
    choice: Any = got.choices[0]
    assert choice.message.content == expected.text and choice.finish_reason == expected.finish
    chunks = [cited["chunk"] for cited in choice.message.citations]
    assert chunks == [cited.chunk for cited in expected.citations]
    shares = [cited["posterior"] for cited in choice.message.citations]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([cited.posterior for cited in expected.citations], abs=1e-5)
    best = max(expected.citations, key=lambda cited: cited.posterior or 0)
    noted = choice.message.annotations[0].url_citation
    assert noted.title == best.title and noted.end_index == len(expected.text)
    logps = [token.logprob for token in choice.logprobs.content]
    assert logps == pytest.approx(list(expected.logps), rel=1e-6, abs=1e-5)
    assert got.usage and got.usage.completion_tokens == len(expected.tokens)
    assert got.system_fingerprint == str(expected.place)


def same_citations(some: list[Any], others: list[Any]) -> None:
    """Equal but for rounding: what the generator has read before may have been read in company."""
    for one, other in zip(some, others, strict=True):
        close = {name: pytest.approx(other[name], abs=1e-4) for name in ("posterior", "score")}
        assert one == {**other, **close}


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, question: str):
    messages: Any = [{"role": "user", "content": question}]
    whole: Any = client.chat.completions.create(model="small", messages=messages).choices[0]
    pieces: list[Any] = list(
        client.chat.completions.create(
            model="small", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    *told, used = pieces
    text = "".join(piece.choices[0].delta.content or "" for piece in told)
    assert text == whole.message.content and used.usage.total_tokens > 0
    last = told[-1].choices[0]
    assert last.finish_reason == whole.finish_reason
    same_citations(last.delta.citations, whole.message.citations)


def test_completions_take_the_prompt_as_the_question(client: openai.OpenAI, question: str):
    chat: Any = client.chat.completions.create(
        model="small", messages=[{"role": "user", "content": question}]
    )
    whole: Any = client.completions.create(model="small", prompt=question, logprobs=1)
    assert whole.choices[0].text == chat.choices[0].message.content
    same_citations(whole.choices[0].citations, chat.choices[0].message.citations)
    assert len(whole.choices[0].logprobs.tokens) == whole.usage.completion_tokens
    streamed = client.completions.create(model="small", prompt=question, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == whole.choices[0].text


def test_langchain_answers_through_it(server: Server, question: str, client: openai.OpenAI):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{server.address}/v1", api_key="none", model="small")
    messages: Any = [{"role": "user", "content": question}]
    expected = client.chat.completions.create(model="small", messages=messages)
    # LangChain asks for temperature 1 of nobody: the server's default is the likeliest answer.
    assert model.invoke(question).content == expected.choices[0].message.content


def test_earlier_turns_and_the_systems_words_are_read_before_the_question(
    client: openai.OpenAI, system: Rag, question: str
):
    messages: Any = [
        {"role": "system", "content": "Answer in a word."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ola"},
        {"role": "user", "content": [{"type": "text", "text": question}]},
    ]
    header = "Answer in a word.\n\nQuestion: Who?\nAnswer: Ola\n\n"
    expected = system.answer(question, header=header)
    got = client.chat.completions.create(model="small", messages=messages)
    assert got.choices[0].message.content == expected.text
    assert got.usage and got.usage.prompt_tokens == expected.prompt_tokens


def test_a_request_may_choose_chunks_reading_and_sampling(
    client: openai.OpenAI, system: Rag, question: str
):
    for options in ({"k": 0}, {"k": 1}, {"k": 2, "reading": "concat"}, {"reading": "token"}):
        expected = system.answer(question, **options)
        messages: Any = [{"role": "user", "content": question}]
        got: Any = client.chat.completions.create(
            model="small", messages=messages, extra_body={"rag2": options}
        )
        message = got.choices[0].message
        assert message.content == expected.text
        assert len(message.citations) == len(expected.citations)
    drawn: Any = client.chat.completions.create(
        model="small", messages=messages, temperature=1.5, top_p=0.9, seed=7, n=3, max_tokens=6
    )
    alone = [
        system.answer(question, temperature=1.5, top_p=0.9, seed=7 + n, max_new_tokens=6).text
        for n in range(3)
    ]
    assert [choice.message.content for choice in drawn.choices] == alone
    assert [choice.index for choice in drawn.choices] == [0, 1, 2]


def test_retrieve_and_score_say_what_the_library_says(
    http: httpx.Client, system: Rag, question: str
):
    found = http.post("/v1/retrieve", json={"query": question, "k": 4}).json()["results"]
    expected = system.retrieve(question, 4)
    assert [row["chunk"] for row in found] == [cited.chunk for cited in expected]
    assert [row["prior"] for row in found] == pytest.approx(
        [cited.posterior for cited in expected], abs=1e-5
    )
    body = {"question": question, "choices": ["Ola", "Nora"], "k": 2}
    got = http.post("/v1/score", json=body).json()
    scored = system.score(question, ["Ola", "Nora"], k=2)
    logps = [choice["logprob"] for choice in got["choices"]]
    assert (
        logps == pytest.approx(list(scored.logps), rel=1e-6, abs=1e-5)
        and got["best"] == scored.best
    )
    assert sum(choice["probability"] for choice in got["choices"]) == pytest.approx(1)


def test_rerank_has_coheres_shape_and_the_retrievers_order(
    http: httpx.Client, system: Rag, question: str
):
    texts = [cited.text for cited in system.retrieve(question, 5)]
    body = {"query": question, "documents": [*texts[:3], {"text": texts[3]}], "top_n": 3}
    got = http.post("/rerank", json=body | {"return_documents": True}).json()
    scores = [row["relevance_score"] for row in got["results"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    for row in got["results"]:
        assert row["document"]["text"] == texts[row["index"]]
    everything = http.post("/v1/rerank", json=body | {"top_n": 4}).json()["results"]
    assert sum(row["relevance_score"] for row in everything) == pytest.approx(1)


def test_embeddings_are_the_encoders_in_both_formats(client: openai.OpenAI, system: Rag):
    texts = ["The old mill.", "Karin lives near the harbour."]
    got = client.embeddings.create(model="small", input=texts)  # the client asks for base64
    expected = system.live.view().embedder.embed(texts, "chunk")
    np.testing.assert_allclose([row.embedding for row in got.data], expected, atol=1e-6)
    plain = client.embeddings.create(
        model="small", input=texts[0], encoding_format="float", extra_body={"input_type": "query"}
    )
    expected = system.live.view().embedder.embed(texts[:1], "question")
    np.testing.assert_allclose(plain.data[0].embedding, expected[0], atol=1e-6)


def test_base64_is_little_endian_float32(http: httpx.Client, system: Rag):
    body = {"input": "Karin", "encoding_format": "base64"}
    packed = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    vector_D = np.frombuffer(base64.b64decode(packed), "<f4")
    np.testing.assert_allclose(vector_D, system.live.view().embedder.embed(["Karin"], "chunk")[0])


def test_a_document_is_known_to_the_next_question_and_a_removed_one_to_none(
    http: httpx.Client, dice: random.Random
):
    id = f"a b/ü{dice.randrange(10**9)}"
    document = {"id": id, "title": "Sund", "text": "Aksel keeps it.", "metadata": {"a": [1, None]}}
    before = http.get("/v1/models").json()["data"][0]["rag2"]["version"]
    done = http.post("/v1/documents", json={"documents": [document]}, headers=EDIT).json()
    assert done["added"] == 1 and done["rag2"]["version"] == before + 1
    path = "/v1/documents/" + id.replace(" ", "%20").replace("/", "%2F").replace("ü", "%C3%BC")
    assert http.get(path).json() == {**document, "namespace": ""}
    listed = http.get("/v1/documents", params={"limit": 1000}).json()
    assert id in [row["id"] for row in listed["data"]] and not listed["has_more"]
    found = http.post("/v1/retrieve", json={"query": "Who keeps Sund?", "k": 64}).json()["results"]
    cited = [row for row in found if row["document"] == id]
    again = http.post("/v1/documents", json={"documents": [document]}, headers=EDIT).json()
    assert again["unchanged"] == 1 and again["rag2"]["version"] == before + 1
    assert http.delete(path, headers=EDIT).json()["deleted"]
    assert http.get(path).status_code == http.delete(path, headers=EDIT).status_code == 404
    found = http.post("/v1/retrieve", json={"query": "Who keeps Sund?", "k": 64}).json()["results"]
    assert not [row for row in found if row["document"] == id]
    if cited:  # of 64 chunks it may not have been one
        assert cited[0]["text"] == document["text"]


def test_pages_of_documents_follow_one_another(http: httpx.Client, system: Rag):
    ids, after, more = [], "", True
    while more:
        page = http.get("/v1/documents", params={"limit": 7, "after": after}).json()
        ids += [row["id"] for row in page["data"]]
        after, more = ids[-1], page["has_more"]
    assert ids == sorted(document.id for document in system.documents(limit=10**6))


def test_a_namespace_is_seen_by_those_who_ask_for_it(http: httpx.Client):
    body = {"documents": [{"id": "d", "text": "Only here."}], "namespace": "acme"}
    http.post("/v1/documents", json=body, headers=EDIT)
    asked = {"query": "Where?", "k": 64, "namespaces": ["acme"]}
    assert [r["document"] for r in http.post("/v1/retrieve", json=asked).json()["results"]] == ["d"]
    assert http.get("/v1/documents/d").status_code == 404
    assert http.get("/v1/documents/d", params={"namespace": "acme"}).status_code == 200
    assert "acme" in http.get("/v1/models").json()["data"][0]["rag2"]["namespaces"]
    for _ in ("newer than the index", "in it"):
        ask = {
            "messages": [{"role": "user", "content": "Where?"}],
            "rag2": {"namespaces": ["acme"]},
        }
        told = http.post("/v1/chat/completions", json=ask).json()["choices"][0]["message"]
        (note,) = told["annotations"]
        assert http.get(note["url_citation"]["url"]).json()["text"] == "Only here."
        assert [citation["namespace"] for citation in told["citations"]] == ["acme"]
        http.post("/v1/refresh", headers=EDIT)
    http.delete("/v1/documents/d", params={"namespace": "acme"}, headers=EDIT)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic " + TOKEN, TOKEN])
def test_changing_documents_takes_the_token(http: httpx.Client, header: str | None):
    headers = {} if header is None else {"authorization": header}
    body = {"documents": [{"id": "x", "text": "y"}]}
    for response in (
        http.post("/v1/documents", json=body, headers=headers),
        http.delete("/v1/documents/x", headers=headers),
        http.post("/v1/refresh", headers=headers),
    ):
        assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_token"


def test_a_refresh_swaps_in_a_generation_of_now(http: httpx.Client):
    body = {"documents": [{"id": "fresh", "text": "Something new."}]}
    version = http.post("/v1/documents", json=body, headers=EDIT).json()["rag2"]["version"]
    assert http.post("/v1/refresh", headers=EDIT).json()["rag2"]["generation"] == version
    http.delete("/v1/documents/fresh", headers=EDIT)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, None),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 9}, "n"),
        ("/v1/completions", {"prompt": "x", "temperature": 3}, "temperature"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 2**63}, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "rag2": {"k": 65}}, "rag2.k"),
        ("/v1/completions", {"prompt": "x", "tools": [{}]}, None),
        ("/v1/score", {"question": "x", "choices": []}, "choices"),
        ("/v1/embeddings", {"input": [1, 2]}, None),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
        ("/rerank", {"query": "x", "documents": []}, "documents"),
    ],
)
def test_a_wrong_body_is_422_and_says_where(
    http: httpx.Client, path: str, body: dict[str, Any], param: str | None
):
    response = http.post(path, json=body)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_question_of_white_space_is_400_wherever_it_is_asked(http: httpx.Client):
    for path, body in (
        ("/v1/completions", {"prompt": " \n"}),
        ("/v1/completions", {"prompt": " ", "stream": True}),
        ("/v1/retrieve", {"query": " "}),
        ("/v1/score", {"question": " ", "choices": ["a"]}),
    ):
        response = http.post(path, json=body)
        assert response.status_code == 400 and response.json()["error"]["code"], path


def test_a_question_that_has_no_room_is_400(http: httpx.Client):
    response = http.post("/v1/completions", json={"prompt": "who " * 2000})
    assert response.status_code == 400 and "budget" in response.json()["error"]["message"]


def test_health_readiness_and_metrics_tell_the_state(http: httpx.Client, question: str):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    http.post("/v1/completions", json={"prompt": question})
    text = http.get("/metrics").text
    for name in (
        "queue_waiting",
        "retrieve_seconds",
        "first_token_seconds",
        "tokens",
        "generation",
    ):
        assert f"rag2_{name}" in text
    assert 'rag2_requests_total{path="/v1/completions",status="200"}' in text
    assert question not in text


def test_curl_reads_the_stream(server: Server, question: str):
    """As the README shows it."""
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    body = json.dumps({"messages": [{"role": "user", "content": question}], "stream": True})
    command = ["curl", "-sN", f"{server.address}/v1/chat/completions"]
    command += ["-H", "content-type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    last = json.loads(lines[-3].removeprefix("data: "))
    assert last["choices"][0]["delta"]["citations"]

"""Under load, answers are those of their question and version, and for nobody else's ears."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import serve_faults
import storm_answers
from hostile_requests import hostile
from rag2.answering.ask import Ask
from rag2.answering.rag import Rag
from rag2.evaluation.questions import load_questions
from rag2.serve import engine, errors
from rag2.serve.server import Server
from rag2.types import Document
from small_systems import served, small_system
from wire import asked, chat, edited, exchange

CANARY = "zanzibar-quokka-7741"


@pytest.fixture
def system(home: Path, tmp_path: Path) -> Iterator[Rag]:
    """Random models over the small world; documents may be changed."""
    (tmp_path / "system").mkdir()
    with small_system(home, tmp_path / "system", k=4, max_new_tokens=6) as rag:
        yield rag


@pytest.fixture
def server(system: Rag) -> Iterator[Server]:
    """A server of it."""
    with served(system) as server:
        yield server


@pytest.fixture
def questions(home: Path) -> list[str]:
    """The small world's."""
    return [q.question for q in load_questions(home / "data" / "questions.jsonl")]


def test_answers_under_swaps_are_right_as_of_the_version_that_they_name(server: Server):
    told = storm_answers.swapped(server.address, 8, 2)
    assert told["swaps"] == 8 and told["answers"] > 4 and not told["first"]


@pytest.mark.slow
def test_an_answer_that_names_another_version_is_found(
    system: Rag, monkeypatch: pytest.MonkeyPatch
):
    for name in ("place", "drafts"):
        monkeypatch.setattr(Rag, name, getattr(Rag, name))
    serve_faults.late_name()
    with served(system) as server:
        assert storm_answers.swapped(server.address, 12, 3)["wrong"]


def test_questions_of_several_namespaces_name_the_state_that_each_was_searched_in(
    system: Rag, monkeypatch: pytest.MonkeyPatch
):
    search = system.search

    def changing(*given):  # a document comes between two searches of the same batch
        found = search(*given)
        system.put([Document(f"d{system.live.view().version}", "News.")], "b")
        return found

    monkeypatch.setattr(system, "search", changing)
    drafts = system.drafts([Ask("Who?", namespaces=("",)), Ask("Who?", namespaces=("b",))])
    first, second = (draft.place.version for draft in drafts)
    assert second == first + 1


def test_answers_among_others_are_those_alone(server: Server, questions: list[str], seed: int):
    told = storm_answers.neighbours(server.address, questions, 10, 30, seed, clients=6)
    assert told["differ"] == 0, told


@pytest.mark.slow
def test_answers_that_share_their_chance_are_found(
    system: Rag, questions: list[str], monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(np.random, "Generator", np.random.Generator)
    serve_faults.common_chance()
    with served(system) as server:
        told = storm_answers.neighbours(server.address, questions, 10, 30, seed, clients=6)
    assert told["differ"] > 0


def secrets_told(address: str, seed: int) -> str:
    """Everything that an outsider sees who asks badly: errors and metrics."""
    dice, seen = random.Random(seed), ""
    document = {"id": "safe", "text": f"The word is {CANARY}.", "metadata": {"word": CANARY}}
    assert edited(address, "POST", "/v1/documents", {"documents": [document]}).status == 200
    long = f"{CANARY} " * 400
    bad = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": CANARY}], "n": 99}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"a": CANARY}}]}),
        ("/v1/completions", {"prompt": CANARY, "max_tokens": 4000}),
        ("/v1/score", {"question": long, "choices": ["a"]}),
        ("/v1/score", {"question": CANARY, "choices": [" "], "k": 1}),
        ("/v1/retrieve", {"query": [CANARY]}),
        ("/v1/documents", {"documents": [{"id": "a", "text": CANARY}] * 2}),
        ("/v1/documents", {"documents": [{"id": "", "text": CANARY}]}),
        ("/v1/completions", {"prompt": f"poison of search {CANARY}"}),
    ]
    for path, body in bad:
        got = edited(address, "POST", path, body)
        assert got.status >= 400, (path, body, got)
        seen += got.body.decode()
    for _ in range(20):
        wire = hostile(dice).replace(b"Lasur Haven", CANARY.encode())
        if b"stream" not in wire and b"GET" not in wire[:3] and wire.endswith(b"}"):
            got = exchange(address, wire + b"}")  # no JSON
            seen += got.body.decode() if got is not None and got.status >= 400 else ""
    assert storm_answers.texts(exchange(address, chat(f"What is {CANARY}?", max_tokens=2)))
    return seen + asked(address, "GET", "/metrics").body.decode()


def test_neither_questions_nor_documents_are_in_logs_metrics_or_errors(
    system: Rag, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seed: int
):
    from rag2.answering.draft import Draft
    from rag2.generator.mixture import Mixtures

    for place, name in ((Rag, "drafts"), (Draft, "take"), (Mixtures, "add")):
        monkeypatch.setattr(place, name, getattr(place, name))
    serve_faults.poisoned()
    with caplog.at_level(logging.DEBUG), served(system) as server:
        assert CANARY not in secrets_told(server.address, seed)
    assert "a request failed" in caplog.text and CANARY not in caplog.text
    for place in (errors, engine):
        monkeypatch.setattr(place, "log", place.log)
    serve_faults.talkative()
    with caplog.at_level(logging.DEBUG), served(system) as server:
        exchange(server.address, chat(f"poison of search {CANARY}"))
    assert CANARY in caplog.text

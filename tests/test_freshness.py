"""Facts that change: what is edited, what a live index then finds, and what is counted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag2 import stages
from rag2.evaluation import freshness, revision
from rag2.evaluation.counterfactual import stated
from rag2.evaluation.freshness import Outcome
from rag2.evaluation.questions import load_questions, split
from rag2.index.exact import TorchExact
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.retriever import LiveDense
from rag2.live.view import Embedder
from rag2.registry import UserError
from rag2.retrieval import Dense, gold_chunks
from rag2.retriever.encoder import DualEncoder
from rag2.types import Document, Question
from small_runs import Load
from small_sweeps import in_this_process
from texts import write_jsonl


@pytest.fixture
def asked(home: Path) -> list[Question]:
    return split(load_questions(home / "data" / "questions.jsonl"), "test")


def made(home: Path, questions: list[Question], count: int) -> revision.Revision:
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        chunks, documents = kb.chunks(), {d.id: d for d in kb.documents()}
    return revision.made(questions, gold_chunks(questions, chunks), chunks, documents, count)


def test_changed_documents_state_the_new_answer_and_all_changes_hold_at_once(
    home: Path, asked: list[Question]
):
    news = made(home, asked, 20)
    texts = {document.id: document.text for document in news.documents}
    assert len(texts) == len(news.documents) and len(news.changed) == 20
    before = {question.id: question for question in asked}
    for question in news.changed:
        old = before[question.id]
        assert question.metadata["stale"] == old.answer != question.answer
        said = [texts[id] for id in question.evidence if id in texts]
        assert any(stated(question.gold, text) for text in said)
        assert not any(stated(old.gold, text) for text in said)
    assert {q.id for q in news.unchanged} <= before.keys() - {q.id for q in news.changed}
    assert all(question == before[question.id] for question in news.unchanged)
    for question in news.unchanged:  # none of them lost its answer to a change
        for id in set(question.evidence) & texts.keys():
            assert stated(question.gold, texts[id])
    with pytest.raises(UserError, match=r"edits=9999: of \d+ test questions only \d+ ask for"):
        made(home, asked, 9999)


def test_a_revision_from_files_says_which_answer_is_stale(tmp_path: Path):
    row = {"id": "q", "question": "Where?", "choices": ["here", "there", "away"], "answer": 1}
    updates = write_jsonl(tmp_path / "updates.jsonl", [{"id": "d", "text": "It is there."}])
    good = write_jsonl(tmp_path / "good.jsonl", [row | {"metadata": {"stale": 0}}])
    news = revision.given(updates, good, [])
    assert [d.text for d in news.documents] == ["It is there."] and news.changed[0].gold == "there"
    for stale in (None, 1, 3, True, "here"):
        bad = write_jsonl(tmp_path / "bad.jsonl", [row | {"metadata": {"stale": stale}}])
        with pytest.raises(UserError, match=r"'q': metadata.stale=.* must be .*, one of \[0, 2\]"):
            revision.given(updates, bad, [])
    same = Question("q", "Where?", ("here", "there"), 0)
    assert not revision.given(updates, good, [same]).unchanged  # its answer is another one now
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"id": "d", "text": t} for t in ("x", "y")])
    with pytest.raises(UserError, match="document 'd' is given twice"):
        revision.given(twice, good, [])
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"id": "d"}])
    with pytest.raises(UserError, match=r"updates=.*broken.jsonl:1: no 'text'"):
        revision.given(broken, good, [])
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="empty.jsonl is empty: nothing changes"):
        revision.given(empty, good, [])


def test_the_live_knowledge_base_finds_what_a_new_index_over_it_would(home: Path, tmp_path: Path):
    path = Path(shutil.copy(home / "data" / "kb.sqlite", tmp_path))
    encoder = DualEncoder.load(home / "retriever").eval()
    questions = load_questions(home / "data" / "questions.jsonl")[:9]
    with KnowledgeBase(path) as kb:
        chunker, first = kb.chunker(home / "data" / "tokenizer"), next(kb.documents())
    assert chunker is not None
    with Live(path, Embedder.of(encoder), TorchExact()) as live:
        live.refresh()
        searched = LiveDense(live, float(encoder.scale.detach()))
        new = Document("new", questions[0].question, "An echo")
        live.put([new, Document(first.id, "Nothing is left of it.", first.title)], chunker)
        with KnowledgeBase(path) as kb:
            fresh = Dense.over(encoder, kb.chunks())
            (echo,) = kb.chunks_of("new")
        for k in (1, 7):
            (scores_QK, ids_QK), expected = (
                searched.search(questions, k),
                fresh.search(questions, k),
            )
            np.testing.assert_array_equal(ids_QK, expected[1])
            np.testing.assert_allclose(scores_QK, expected[0], rtol=1e-5, atol=1e-5)
        everything = searched.search(questions[:1], len(fresh.generation))[1]
        assert echo.id in everything


def test_what_is_counted_is_right_stale_and_paired_with_every_other_row():
    changed = [Question(f"q{n}", "?", ("a", "b", "c"), 1, metadata={"stale": 0}) for n in range(10)]
    unchanged = [Question(f"r{n}", "?", ("a", "b"), 0) for n in range(4)]
    stay = np.array([0, 0, 0, 1])
    rows = [
        Outcome("rag", "nothing", np.zeros(10, int), stay),
        Outcome("rag", "kb", np.array([1] * 8 + [2, 0]), stay, 0.6, [0.1, 0.2, 0.3]),
        Outcome("ft", "lora", np.array([1, 1] + [2] * 8), 1 - stay, 50.0),
    ]
    found = freshness.summary(rows, revision.Revision([], changed, unchanged), seed=0)
    shares = [[row[k]["rate"] for k in ("changed", "stale", "unchanged")] for row in found["rows"]]
    assert shares == [[0.0, 1.0, 0.75], [0.8, 0.1, 0.75], [0.2, 0.0, 0.25]]
    one = found["rows"][1]["document_seconds"]
    assert one["p50"] == 0.2 and 0.29 < one["p99"] < 0.3 and one["n"] == 3
    assert found["rows"][2]["document_seconds"] == {"p50": None, "p99": None, "n": 0}
    pairs = {(test["a"], test["b"]): test for test in found["paired"]}
    assert pairs.keys() == {("rag, kb", "rag, nothing"), ("rag, kb", "ft, lora")}
    against = pairs["rag, kb", "ft, lora"]  # 6 questions, all one way
    assert against["difference"] == pytest.approx(0.6)
    assert against["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert against["holm_p"] == pytest.approx(2 * 0.5**6)  # the larger of two
    least = pairs["rag, kb", "rag, nothing"]  # 8 questions, all one way
    assert least["holm_p"] == pytest.approx(2 * least["mcnemar_p"]) == pytest.approx(4 * 0.5**8)


def config_of(home: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "kb": str(home / "data" / "kb.sqlite"),
        "questions": str(home / "data" / "questions.jsonl"),
        "generators": {"base": str(home / "generator"), "ft": str(home / "generator")},
        "retrievers": {"warm": str(home / "retriever")},
        "arms": ["ft", "frozen_rag"],
        "tunings": {"lora": {"tuning": "lora", "steps": 2, "batch_size": 2}},
        "world": {"name": "almanac"},
        "edits": 6,
        "limit": 5,
        "ks": [0, 2],
        "out": str(out),
    } | changes


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_way_of_taking_in_the_changes_is_one_row(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
):
    module, ran, threads = recipe("eval/freshness.py"), [], torch.get_num_threads()
    monkeypatch.setattr(stages, "run", in_this_process(ran))
    given = config_of(home, tmp_path / "out")
    before = (home / "data" / "kb.sqlite").read_bytes()
    try:
        results, *again = [module.main(module.FreshnessConfig(**given)) for _ in range(times)]
    finally:
        torch.set_num_threads(threads)
    (told_of,) = results["revisions"]
    rows = {(row["arm"], row["done"]): row for row in told_of["rows"]}
    assert list(rows) == [
        *(("ft", "nothing"), ("frozen_rag", "nothing"), ("frozen_rag", "kb"), ("ft", "lora")),
    ]
    assert ran == ["lora"]  # the second time it is there already
    assert told_of["n"] == {"documents": 6, "removed": 0, "changed": 6, "unchanged": 5}
    timed = rows["frozen_rag", "kb"]
    assert timed["document_seconds"]["n"] == 6 and timed["seconds"] > 0
    assert rows["ft", "lora"]["seconds"] > 0 and rows["ft", "nothing"]["seconds"] is None
    shares = [[row[k]["rate"] for k in freshness.KINDS] for row in told_of["rows"]]
    for (same,) in (made["revisions"] for made in again):
        assert shares == [[row[k]["rate"] for k in freshness.KINDS] for row in same["rows"]]
    assert (home / "data" / "kb.sqlite").read_bytes() == before  # changes go to a copy
    with KnowledgeBase(tmp_path / "out" / "kb-frozen_rag.sqlite") as kb:
        told = {document.id: document.text for document in kb.documents()}
    test = split(load_questions(home / "data" / "questions.jsonl"), "test")
    assert all(told[document.id] == document.text for document in made(home, test, 6).documents)
    table = (tmp_path / "out" / "freshness.md").read_text()
    assert "| frozen_rag | kb |" in table and (tmp_path / "out" / "freshness.png").stat().st_size
    assert (
        json.loads((tmp_path / "out" / "freshness.json").read_text())["format"] == freshness.FORMAT
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": ["hybrid_rag"]},
            "arms: hybrid_rag reads by hybrid; allowed: closed book",
        ),
        ({"arms": ["ft_ragg"]}, "unknown arm 'ft_ragg'.*Did you mean 'ft_rag'"),
        ({"updates": "x.jsonl"}, "updates=DOCUMENTS and changed=QUESTIONS go together"),
        ({"tunings": {"lora": {"kb": "x"}}}, "tunings.lora.kb is the same for all: set it outside"),
        ({"tunings": {"kb": {}}}, "tunings: 'kb' cannot be a row"),
        ({"tunings": {"x": {"tuningg": "lora"}}}, "tunings.x: .*Did you mean 'tuning'"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_made(
    recipe: Load, home: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    module = recipe("eval/freshness.py")
    given = config_of(home, tmp_path / "out", **changes)
    with pytest.raises(UserError, match=message):
        module.main(module.FreshnessConfig(**given))
    assert not (tmp_path / "out").exists()

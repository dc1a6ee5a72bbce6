"""The recipes: frozen halves, and scores that depend on nothing they should not."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag2.evaluation import arms, score
from rag2.evaluation.questions import load_questions, split, subset
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question
from small_runs import Load, log, start
from small_world import roughen
from texts import write_jsonl

# --- parts of the data ----------------------------------------------------------------------------


def test_a_share_of_the_questions_and_some_of_the_paraphrases_are_what_is_trained_on(
    recipe: Load, home: Path, tmp_path: Path
):
    finetune = recipe("train/finetune.py")
    data = home / "data"
    given = {"kb": str(data / "kb.sqlite"), "questions": str(data / "questions.jsonl")}

    def texts(**changes: Any) -> list:
        data, held = finetune.read_data(finetune.FinetuneConfig(**given, **changes))
        assert held is None
        return list(data)

    train = texts(objective={"name": "supervised"})
    some = texts(objective={"name": "supervised"}, question_share=0.1)
    assert len(some) == math.ceil(len(train) / 10) and all(q in train for q in some)
    assert {question.split for question in train} == {"train"}

    pairs = [(of, f"{of} {n}") for n in range(3) for of in "ab"]
    rows = [{"title": "t", "text": text, "metadata": {"of": of}} for of, text in pairs]
    path = write_jsonl(tmp_path / "paraphrases.jsonl", rows)
    plain = texts()
    for count, kept in ((0, []), (1, ["a 0", "b 0"]), (None, [row["text"] for row in rows])):
        found = texts(paraphrases=str(path), paraphrases_per_document=count)
        assert found == plain + [f"t\n{text}" for text in kept]
    with pytest.raises(UserError, match=r"per_document=4: .*paraphrases.jsonl has at most 3 of a"):
        texts(paraphrases=str(path), paraphrases_per_document=4)
    write_jsonl(path, [{"title": "t", "text": "x"}])
    with pytest.raises(UserError, match=r"paraphrases.jsonl:1: 'metadata.of' must name a document"):
        texts(paraphrases=str(path), paraphrases_per_document=1)


def test_joint_training_on_a_share_asks_that_share_only(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    joint, asked = recipe("train/joint.py"), []
    honest = joint.Proposals

    def proposals(cfg: Any, chunks: list[Chunk], questions: list[Question], seed: int) -> Any:
        asked.append(questions)
        return honest(cfg, chunks, questions, seed)

    monkeypatch.setattr(joint, "Proposals", proposals)
    start(recipe, "joint", home, tmp_path / "some", steps=1, question_share=0.1)
    train = split(load_questions(home / "data" / "questions.jsonl"), "train")
    assert asked == [subset(train, 0.1, 3)] and 0 < len(asked[0]) < len(train)


def test_another_seed_asks_other_questions_in_another_order(
    recipe: Load, home: Path, tmp_path: Path
):
    words = {"dense": 0, "bm25": 4, "random": 0}  # candidates that depend on the question alone
    for seed in (3, 4):
        out = tmp_path / str(seed)
        start(recipe, "joint", home, out, steps=1, seed=seed, candidates=words)
    one, other = (log(tmp_path / str(seed))[0]["retrieved_digest"] for seed in (3, 4))
    assert one != other


# --- frozen halves --------------------------------------------------------------------------------

NONE = {"name": "none"}


@pytest.mark.parametrize("step", ["one_pass", "two_pass"])
def test_joint_training_with_both_halves_frozen_is_frozen_rag(
    recipe: Load, home: Path, chunks: list[Chunk], tmp_path: Path, step: str
):
    out = tmp_path / "frozen"
    start(recipe, "joint", home, out, train=[], step={"name": step}, refresh=NONE)
    warm, base = DualEncoder.load(home / "retriever"), Generator.load(home / "generator")
    after = DualEncoder.load(out / "final" / "retriever")
    reader = Generator.load(out / "final" / "generator")
    assert after.fingerprint() == warm.fingerprint()
    assert reader.fingerprint() == base.fingerprint()
    assert json.loads((out / "final" / "manifest.json").read_text())["meta"] == {
        "trained": {"retriever": 0, "generator": 0}
    }
    rows = log(out)
    assert len(rows) == 9 and all(math.isfinite(row["loss"]) for row in rows)
    assert {row["grad_norm"] for row in rows} == {0.0}
    # Same index, same chunks, same answers.
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:12]
    found = [answered(chunks, *pair, questions) for pair in ((warm, base), (after, reader))]
    for field in ("ids_QK", "scores_QK", "logp_QKC", "closed_QC"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(found[1], field))


def answered(
    chunks: list[Chunk],
    encoder: DualEncoder,
    generator: Generator,
    questions: list[Question],
    batch_tokens: int = 8192,
    k: int = 3,
) -> score.Scores:
    """What frozen RAG with these halves says."""
    from rag2.index.flat import Flat
    from rag2.index.generation import Generation
    from rag2.retrieval import Dense
    from rag2.retriever.embed import embed_corpus

    embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in chunks])
    index = Flat().build(embeddings_ND, np.array([chunk.id for chunk in chunks]))
    generation = Generation.of(index, chunks, encoder_fingerprint=encoder.fingerprint())
    found = arms.retrieve(questions, Dense(encoder, generation), k)
    by_id = {chunk.id: chunk for chunk in chunks}
    return arms.evaluate(
        questions, found, arms.Reader(generator, Prompt(), by_id, batch_tokens=batch_tokens)
    )


@pytest.mark.parametrize(
    ("half", "other"), [("retriever", "generator"), ("generator", "retriever")]
)
def test_a_frozen_half_stays_as_it_is_while_the_other_learns(
    recipe: Load, home: Path, tmp_path: Path, half: str, other: str
):
    changes = {"refresh": NONE} if half == "generator" else {}
    start(recipe, "joint", home, tmp_path / "run", train=[half], **changes)
    prints = {
        "retriever": lambda path: DualEncoder.load(path).fingerprint(),
        "generator": lambda path: Generator.load(path).fingerprint(),
    }
    final = tmp_path / "run" / "final"
    assert prints[other](final / other) == prints[other](home / other)
    assert prints[half](final / half) != prints[half](home / half)


def test_recall_counts_the_questions_that_it_leaves_out(recipe: Load, home: Path, tmp_path: Path):
    data = home / "data"
    rows = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"][:6]
    for row in rows[:2]:
        row["evidence"] = []
    measure = recipe("eval/recall.py")
    parts = {"kb": str(data / "kb.sqlite"), "retriever": str(home / "retriever")}
    questions = str(write_jsonl(tmp_path / "q.jsonl", rows))
    cfg = measure.RecallConfig(**parts, questions=questions, out=str(tmp_path / "out"))
    found = measure.main(cfg)
    assert (found["n"], found["without_evidence"]) == (4, 2)
    assert json.loads((tmp_path / "out" / "recall.json").read_text()) == found


# --- scores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp(home: Path) -> Generator:
    """A random generator whose answers differ: log-probabilities of its choices lie far apart."""
    generator = Generator.load(home / "generator")
    seed = secrets.randbits(31)
    print(f"seed {seed}")  # noqa: T201
    torch.manual_seed(seed)
    roughen(generator.model, 0.05)
    return generator


def test_scores_do_not_depend_on_the_size_of_a_batch(
    home: Path, chunks: list[Chunk], sharp: Generator
):
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:40]
    encoder = DualEncoder.load(home / "retriever")
    runs = [answered(chunks, encoder, sharp, questions, size) for size in (64, 512, 8192)]
    for run in runs[:2]:
        for field in ("logp_QKC", "closed_QC"):
            a, b = getattr(run, field), getattr(runs[2], field)
            assert (np.abs(a - b) <= 1e-5 * np.maximum(1, np.abs(b))).all()
        for k in (0, 1, 3):
            picks = [score.predict(score.marginal(r, k, 1.0)) for r in (run, runs[2])]
            np.testing.assert_array_equal(picks[0], picks[1])
    spread = np.ptp(runs[2].closed_QC, axis=1)
    assert spread.min() > 1e-3  # else the picks would be chance


def test_cloze_scores_do_not_depend_on_the_order_of_the_options(
    home: Path, chunks: list[Chunk], sharp: Generator
):
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:30]
    turned = [
        Question(q.id, q.question, q.choices[::-1], 3 - q.answer, evidence=q.evidence)
        for q in questions
    ]
    encoder = DualEncoder.load(home / "retriever")
    a, b = (answered(chunks, encoder, sharp, asked, k=2) for asked in (questions, turned))
    np.testing.assert_array_equal(a.ids_QK, b.ids_QK)  # options never enter the query
    np.testing.assert_allclose(a.logp_QKC, b.logp_QKC[:, :, ::-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a.closed_QC, b.closed_QC[:, ::-1], rtol=1e-5, atol=1e-5)
    right = [
        score.predict(score.marginal(s, 2)) == score.answers(asked)
        for s, asked in ((a, questions), (b, turned))
    ]
    np.testing.assert_array_equal(right[0], right[1])

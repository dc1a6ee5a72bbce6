"""Steps, epochs, tokens or seconds: each ends where it says, and a resumed run goes on exactly."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag2.evaluation import learning
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.registry import UserError
from rag2.training import batches
from rag2.training.budget import Course
from rag2.training.optim import Schedule
from small_runs import Killed, Load, killed_at, log, start, weights


class Asked:
    """A length, as a configuration says it."""

    seed, batch_size = 3, 4
    steps: int | None = 100
    epochs: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __init__(self, **changes: Any) -> None:
        vars(self).update(changes)


TOKENS_N = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])


def course(**changes: Any) -> Course:
    return Course(Asked(**changes), TOKENS_N)


def test_an_epoch_goes_through_every_row_once_in_an_order_of_its_own():
    plan = course(epochs=3)
    assert plan.steps == 9 and plan.over(9, 0.0) and not plan.over(8, 0.0)
    epochs = [np.concatenate([plan.rows(3 * e + k) for k in range(3)]) for e in range(3)]
    assert [len(plan.rows(step)) for step in range(6)] == [4, 4, 3] * 2
    for rows in epochs:
        assert sorted(rows) == list(range(11))
    assert len({tuple(rows) for rows in epochs}) == 3
    assert (course(epochs=9).rows(7) == plan.rows(7)).all()
    assert (course(epochs=3, seed=4).rows(0) != plan.rows(0)).any()


def test_steps_draw_as_ever_whatever_the_batch():
    plan = course(steps=20)
    assert plan.steps == 20
    for step in range(20):
        assert (plan.rows(step) == batches.sample(11, 4, 3, step)).all()


@pytest.mark.parametrize("given", [{"steps": 30}, {"epochs": 4}, {"tokens": 300}])
def test_the_count_of_tokens_at_any_step_is_that_of_the_rows_before_it(given: dict[str, int]):
    plan, seen, first = course(**given), 0, []
    for step in range(20):
        assert plan.tokens(step) == seen
        first.append(plan.epoch(step))
        seen += int(TOKENS_N[plan.rows(step)].sum())
    ends = [step for step in range(19) if plan.validates(step, over=False)]
    assert ends == [step for step in range(19) if first[step + 1] > first[step]] and ends
    assert plan.validates(0, over=True)


def test_so_many_tokens_end_at_the_first_step_that_has_seen_them():
    total = int(TOKENS_N.sum())
    for tokens in range(1, 3 * total + 2):
        plan = course(tokens=tokens)
        assert plan.steps and plan.tokens(plan.steps) >= tokens > plan.tokens(plan.steps - 1)


def test_the_schedule_runs_over_the_length_that_is_given():
    decay = Schedule(decay="linear", warmup=0, floor=0)
    assert course(epochs=3).factor(decay, 8, 0.0) == pytest.approx(1 / 9)
    plan = course(seconds=10.0)
    assert plan.steps is None and not plan.over(10**6, 9.9) and plan.over(1, 10.0)
    # 20 steps in 5 s: 40 in all, of which half are done.
    assert plan.factor(decay, 20, 5.0) == pytest.approx(0.5)
    assert plan.factor(decay, 40, 10.0) == pytest.approx(1 / 41)
    assert plan.factor(decay, 0, 0.0) == 1.0


def test_two_lengths_and_none_are_refused(recipe: Load):
    cls = recipe("train/finetune.py").FinetuneConfig
    for given, message in (
        ({"epochs": 2, "tokens": 100}, "epochs and tokens both say how long to train"),
        ({"steps": None}, "steps=null: give steps, epochs, tokens or seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(**given)
    assert cls(steps=5, epochs=2).epochs == 2  # what a YAML file says of steps gives way


def test_seconds_are_refused_to_several_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rag2.training.distributed.world", lambda: 2)
    assert course(epochs=1).steps == 3
    with pytest.raises(UserError, match="the clocks of several processes differ"):
        course(seconds=1.0)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paraphrases(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rewordings of every document: the almanac's one, and that with its words turned."""
    rows = map(json.loads, (home / "data/paraphrases.jsonl").read_text().splitlines())
    path = tmp_path_factory.mktemp("texts") / "paraphrases.jsonl"
    with path.open("w") as file:
        for row in rows:
            for text in (row["text"], row["text"].upper(), row["text"].lower()):
                file.write(json.dumps(row | {"text": text}) + "\n")
    return path


SHORT: dict[str, Any] = {"batch_size": 4, "objective": {"name": "unsupervised", "block": 64}}


@pytest.fixture(scope="module")
def few(home: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A knowledge base of the first 24 documents."""
    lines = (home / "data/documents.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path_factory.mktemp("few")
    (folder / "documents.jsonl").write_text("".join(lines[:24]))
    build(folder / "kb.sqlite", [folder / "documents.jsonl"], TokenChunker())
    return str(folder / "kb.sqlite")


@pytest.fixture(scope="module")
def whole(
    recipe: Load, home: Path, tmp_path_factory: pytest.TempPathFactory, paraphrases: Path, few: str
):
    out = tmp_path_factory.mktemp("whole") / "run"
    more = {
        "kb": few,
        "paraphrases": str(paraphrases),
        "paraphrases_per_document": 0,
        "validation": 8,
    }
    start(recipe, "finetune", home, out, epochs=2, steps=None, **SHORT, **more)
    return out, more


def test_epochs_are_logged_with_their_tokens_and_the_held_out_loss_after_each(whole):
    out, _ = whole
    rows = log(out)
    half = len(rows) // 2
    assert [row["epoch"] for row in rows] == [0] * half + [1] * half
    assert rows[-1]["tokens"] == 2 * rows[half - 1]["tokens"]
    measured = [row["step"] for row in rows if "validation_nll" in row]
    assert measured == [half - 1, 2 * half - 1]
    assert [row["step"] for row in rows if "validation_nll_before" in row] == [0]
    before, first, last = (nll for _, nll in learning.perplexities(rows))
    assert before > first > last > 1
    assert before == pytest.approx(math.exp(rows[0]["validation_nll_before"]))
    assert learning.borders(rows) == [half]
    assert (out / learning.PLACE).read_bytes().startswith(b"\x89PNG")
    assert f"steps: {2 * half}" in (out / "config.yaml").read_text()


def test_a_run_of_epochs_that_is_cut_off_goes_on_exactly(
    recipe: Load, home: Path, whole, tmp_path: Path
):
    out, more = whole
    given = {"epochs": 2, **SHORT, **more, "checkpoint_every": 3}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=5)
        start(recipe, "finetune", home, tmp_path / "cut", **given)
    assert (tmp_path / "cut/checkpoints/latest").read_text().strip() == "step-000003"
    start(recipe, "finetune", home, tmp_path / "cut", resume=True, **given)
    assert weights(tmp_path / "cut") == weights(out) and log(tmp_path / "cut") == log(out)
    with pytest.raises(UserError, match="was begun with epochs=2, not None"):
        start(recipe, "finetune", home, out, resume=True, **SHORT, **more)


def test_tokens_and_seconds_end_a_run_and_it_can_go_on(
    recipe: Load, home: Path, few: str, tmp_path: Path
):
    given = {"kb": few, "steps": None, "checkpoint_every": 1, **SHORT}
    start(recipe, "finetune", home, tmp_path / "tokens", tokens=1000, **given)
    rows = log(tmp_path / "tokens")
    assert rows[-1]["tokens"] >= 1000 > rows[-2]["tokens"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=2)
        start(recipe, "finetune", home, tmp_path / "seconds", seconds=0.6, **given)
    start(recipe, "finetune", home, tmp_path / "seconds", seconds=0.6, resume=True, **given)
    lines = (tmp_path / "seconds/log.jsonl").read_text().splitlines()
    spent = np.cumsum([json.loads(line)["seconds"] for line in lines])
    assert spent[-1] >= 0.6 > spent[-2] and (tmp_path / "seconds/final").is_dir()
    assert "steps: null" in (tmp_path / "seconds/config.yaml").read_text()


def test_what_is_held_out_is_not_trained_on(recipe: Load, home: Path, paraphrases: Path):
    finetune = recipe("train/finetune.py")
    given = {"kb": str(home / "data/kb.sqlite"), "questions": str(home / "data/questions.jsonl")}

    def read(**changes: Any):
        return finetune.read_data(finetune.FinetuneConfig(**given | changes))

    data, held = read(paraphrases=str(paraphrases), validation=8)
    assert len(held.paraphrases) == 16 and len({row.document for row in held.paraphrases}) == 8
    rows = {(row.document, row.text) for row in held.paraphrases}
    kept = {(row.document, row.text) for row in data.paraphrases}
    assert not rows & kept and len(rows | kept) == 3 * len({of for of, _ in kept})
    again, _ = read(paraphrases=str(paraphrases), validation=8, paraphrases_per_document=0)
    assert not again.paraphrases and again.chunks == data.chunks
    _, other = read(paraphrases=str(paraphrases), validation=8, seed=1)
    assert other.paraphrases != held.paraphrases
    data, held = read(objective="supervised", validation=5)
    assert {question.split for question in held.questions} == {"validation"}
    assert len(held.questions) == 5 and not held.chunks
    for changes, message in (
        (
            {"objective": "raft", "paraphrases_per_document": 1},
            "paraphrases_per_document=1: objective=raft reads none",
        ),
        ({"validation": 1}, "validation=1: .* none are given: set paraphrases=FILE"),
        ({"validation": 999, "paraphrases": str(paraphrases)}, "rewordings of 192 documents only"),
        ({"validation": 999, "objective": "supervised"}, "has 128 such questions"),
    ):
        with pytest.raises(UserError, match=message):
            read(**changes)

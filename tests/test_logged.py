"""What frozen RAG answered, as questions to fine-tune on: no right answer gets in."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split, to_row
from rag2.registry import UserError


@pytest.fixture(scope="module")
def logged(recipe: Callable[[str], ModuleType], home: Path) -> Callable[..., Path]:
    """`train logged` on the small world; returns the log."""
    module = recipe("train/logged.py")

    def run(out: Path, questions: Path, *changes: str) -> Path:
        words = [f"kb={home / 'data' / 'kb.sqlite'}", f"questions={questions}", f"out={out}"]
        words += [f"generator={home / 'generator'}", f"retriever={home / 'retriever'}"]
        words += ["ks=[1]", "question_share=0.08", "confidence=0", *changes]
        module.main(config.load(module.LoggedConfig, None, words))
        return out / "final" / "questions.jsonl"

    return run


def test_nothing_of_the_right_answers_gets_into_the_log(
    logged: Callable[..., Path], home: Path, tmp_path: Path
):
    world = load_questions(home / "data" / "questions.jsonl")
    world = split(world, "train") + split(world, "validation")[:12]
    labelled = [replace(q, metadata={"told": q.gold}) for q in world]
    wrong = [
        replace(q, answer=(q.answer + 1) % len(q.choices), gold_chunk=1, evidence=("x",))
        if q.split == "train"
        else q
        for q in world
    ]
    logs = []
    for name, questions in (("right", labelled), ("wrong", wrong)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(to_row(q)) + "\n" for q in questions))
        logs.append(logged(tmp_path / name, path, "ks=[0,1]").read_bytes())
    assert logs[0] == logs[1]
    rows = [json.loads(line) for line in logs[0].splitlines()]
    assert {tuple(row) for row in rows} == {
        ("id", "question", "choices", "answer", "split", "metadata")
    }
    assert {tuple(row["metadata"]) for row in rows} == {("confidence",)}
    gold = {q.id: q.answer for q in world if q.split == "train"}
    same = np.mean([row["answer"] == gold[row["id"]] for row in rows])
    assert len(rows) > 20 and same < 0.8, "random models do not answer as the labels say"


def test_the_log_holds_what_frozen_rag_answered_and_only_what_it_was_sure_of(
    logged: Callable[..., Path],
    recipe: Callable[[str], ModuleType],
    home: Path,
    tmp_path: Path,
):
    questions = home / "data" / "questions.jsonl"
    everything = load_questions(logged(tmp_path / "all", questions))
    p = {q.id: float(q.metadata["confidence"]) for q in everything}
    assert all(1 / len(q.choices) - 1e-6 <= p[q.id] <= 1 for q in everything)
    below, above = sorted(p.values())[15:17]
    middle = (below + above) / 2
    kept = load_questions(logged(tmp_path / "sure", questions, f"confidence={middle}"))
    assert {q.id for q in kept} == {id for id, value in p.items() if value >= middle}
    assert kept == [q for q in everything if p[q.id] >= middle]

    # The arm answers the same, asked the logged questions as its test.
    asked = [
        replace(q, split="test") for q in split(load_questions(questions), "train") if q.id in p
    ]
    path = tmp_path / "asked.jsonl"
    validation = split(load_questions(questions), "validation")[:1]  # of one K none is chosen
    path.write_text("".join(json.dumps(to_row(q)) + "\n" for q in [*asked, *validation]))
    compare = recipe("eval/compare.py")
    words = [f"kb={home / 'data' / 'kb.sqlite'}", f"questions={path}", f"out={tmp_path / 'arm'}"]
    words += [f"generators.base={home / 'generator'}", f"retrievers.warm={home / 'retriever'}"]
    compare.main(config.load(compare.CompareConfig, None, [*words, "ks=[1]", "arms=[frozen_rag]"]))
    lines = (tmp_path / "arm" / "samples_frozen_rag.jsonl").read_text().splitlines()
    picks = {row["doc"]["id"]: row["prediction"] for row in map(json.loads, lines)}
    assert picks == {q.id: q.answer for q in everything}


def test_fine_tuning_learns_the_logged_answers(
    logged: Callable[..., Path],
    recipe: Callable[[str], ModuleType],
    home: Path,
    tmp_path: Path,
):
    log = logged(tmp_path / "log", home / "data" / "questions.jsonl")
    finetune = recipe("train/finetune.py")
    words = [f"questions={log}", "objective=supervised", f"generator={home / 'generator'}"]
    words += [f"out={tmp_path / 'ft'}", "steps=1", "batch_size=2"]
    cfg = config.load(finetune.FinetuneConfig, None, words)
    data, held = finetune.read_data(cfg)
    assert list(data.questions) == load_questions(log) and held is None
    finetune.main(cfg)
    assert (tmp_path / "ft" / "final" / "generator").is_dir()


def test_a_log_without_a_sure_answer_and_a_log_of_other_settings_are_refused(
    logged: Callable[..., Path], home: Path, tmp_path: Path
):
    questions = home / "data" / "questions.jsonl"
    with pytest.raises(UserError, match=r"confidence=1.0: none of \d+ answers is as sure; the"):
        logged(tmp_path / "out", questions, "confidence=1")
    assert not (tmp_path / "out").exists()
    log = logged(tmp_path / "out", questions)
    before = log.stat().st_mtime_ns
    assert logged(tmp_path / "out", questions, "resume=true").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made with confidence=0.0, not 0.1: choose another"):
        logged(tmp_path / "out", questions, "confidence=0.1", "resume=true")


def test_a_world_whose_folder_has_no_recipe_for_the_log_does_without_the_staged_arm(
    tmp_path: Path, almanac
):
    for name in ("pretrain", "retriever", "finetune", "joint"):
        (tmp_path / f"{name}.yaml").write_text("steps: 1\n")
    needed: dict[bool, set[str]] = {}
    for there in (False, True):
        if there:
            (tmp_path / "logged.yaml").write_text("question_share: 0.5\n")
        cfg = pipeline.Inputs(world=almanac, recipes=str(tmp_path))
        plan = pipeline.Plan(cfg)
        needed[there] = {name for name in ("logged", "staged") if plan.has_yaml(name)}
        assert all(plan.has_yaml(name) for name in ("base", "ft", "sft", "joint"))
    assert needed == {False: set(), True: {"logged", "staged"}}
    words = pipeline.jobs(cfg, ["staged"])[0].command
    assert any(word.startswith("questions=") and "logged/final" in word for word in words)
    assert not any(word.startswith("log=") for word in words)

"""A run of a recipe: one that was cut off goes on as if nothing had happened; what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rag2 import config
from rag2.evaluation.questions import load_questions, split
from rag2.generator.bpe import train_bpe
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import gold_chunks
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training.log import RunLog
from small_runs import KINDS, Killed, Load, generations, killed_at, log, settings, start, weights
from small_world import SHAPE, forget


@pytest.fixture(scope="module")
def whole(recipe: Load, home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One uninterrupted run of each recipe."""
    outs = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, out in outs.items():
        start(recipe, kind, home, out)
    return outs


# --- interrupted and resumed ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_goes_on_to_the_same_weights_and_the_same_log(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path, kind: str
):
    out = tmp_path / kind
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=7)
        start(recipe, kind, home, out)
    assert not (out / "final").exists()
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-000004"
    start(recipe, kind, home, out, resume=True)
    assert weights(out) == weights(whole[kind])
    assert log(out) == log(whole[kind]) and len(log(out)) == 9
    assert generations(out) == generations(whole[kind])


@pytest.mark.parametrize("forgotten", ["optimizer", "random state", "weights"])
def test_a_resume_that_forgets_something_does_not_pass_for_the_same_run(
    recipe: Load,
    home: Path,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forgotten: str,
):
    out = tmp_path / "finetune"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=7)
        start(recipe, "finetune", home, out)
    forget(monkeypatch, forgotten)
    start(recipe, "finetune", home, out, resume=True)
    assert weights(out) != weights(whole["finetune"]) and log(out) != log(whole["finetune"])


def test_a_joint_run_that_resumes_with_another_index_does_not_pass_for_the_same_run(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path
):
    from rag2.reindex.store import Store

    out = tmp_path / "joint"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=7)
        start(recipe, "joint", home, out)
    with pytest.MonkeyPatch.context() as patch:  # today's weights instead of the stored index
        patch.setattr(Store, "load", lambda self, number: self.build(number, 4))
        start(recipe, "joint", home, out, resume=True)
    assert log(out) != log(whole["joint"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path
):
    start(recipe, "joint", home, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(whole["joint"])
    assert log(tmp_path / "again") == log(whole["joint"])
    module = recipe("train/joint.py")
    changed = settings("joint", home) | {"seed": 4, "steps": 2, "out": str(tmp_path / "other")}
    module.main(module.JointConfig(**changed))
    assert log(tmp_path / "other") != log(whole["joint"])[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_asked_to_stop_commits_its_step_and_goes_on_from_there(
    recipe: Load,
    home: Path,
    whole: dict[str, Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / kind
    before = signal.getsignal(signal.SIGTERM)
    honest = RunLog.write

    def write(self: RunLog, **values: Any) -> None:
        honest(self, **values)
        if values["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", write)
        with pytest.raises(SystemExit) as ended:
            start(recipe, kind, home, out)
    assert ended.value.code == 0 and "stopped after 6 steps" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-000006"
    assert not (out / "final").exists()
    start(recipe, kind, home, out, resume=True)
    assert weights(out) == weights(whole[kind]) and log(out) == log(whole[kind])


def test_resume_without_a_checkpoint_starts_at_zero(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path
):
    start(recipe, "finetune", home, tmp_path / "new", resume=True)
    assert weights(tmp_path / "new") == weights(whole["finetune"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=2)  # before the first checkpoint
        start(recipe, "finetune", home, tmp_path / "cut")
    start(recipe, "finetune", home, tmp_path / "cut", resume=True)
    assert weights(tmp_path / "cut") == weights(whole["finetune"])
    assert log(tmp_path / "cut") == log(whole["finetune"])


def test_a_finished_run_resumes_to_what_it_is(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path
):
    for kind in ("retriever", "joint"):
        shutil.copytree(whole[kind], tmp_path / kind)
        saved = tmp_path / kind / "config.yaml"
        saved.write_text(saved.read_text().replace(str(whole[kind]), str(tmp_path / kind)))
        start(recipe, kind, home, tmp_path / kind, resume=True)
        assert weights(tmp_path / kind) == weights(whole[kind])
        assert log(tmp_path / kind) == log(whole[kind])


def test_a_resume_with_other_settings_is_refused_in_one_line(
    recipe: Load, home: Path, tmp_path: Path
):
    out = tmp_path / "joint"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=5)
        start(recipe, "joint", home, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="was begun with seed=3, not 4") as caught:
        module = recipe("train/joint.py")
        changed = settings("joint", home) | {"seed": 4, "resume": True, "out": str(out)}
        module.main(module.JointConfig(**changed))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# --- the log and the files of a run ---------------------------------------------------------------


def test_a_joint_run_leaves_the_documented_files_and_keys(whole: dict[str, Path], home: Path):
    out = whole["joint"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(9))
    keys = "loss grad_norm lr_retriever lr_generator generation index_age_steps index_age_seconds"
    assert all(
        {*keys.split(), "effective_chunks", "retrieved_digest", "seconds"} <= row.keys()
        for row in rows
    )
    assert [row["generation"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["index_age_steps"] for row in rows] == [0, 1, 2] * 3
    assert all(1 <= row["effective_chunks"] <= 8 and row["kept_prompts"] == 1 for row in rows)
    assert {len(row["retrieved_digest"]) for row in rows} == {64}
    assert all(row["peak_memory_bytes"] > 2**26 for row in rows)
    measured = {row["step"]: row["recall"] for row in rows if "recall" in row}
    assert list(measured) == [0, 3, 6]  # wherever the index is of today's weights
    assert measured[0] == pytest.approx(recall_at_5(home))
    names = {"config.yaml", "log.jsonl", "checkpoints", "generations", "final"}
    assert names <= {p.name for p in out.iterdir()}
    assert (out / "generations" / "current").read_text().strip() == "000003"
    manifest = json.loads((out / "final" / "manifest.json").read_text())
    halves = [DualEncoder.load(out / "final" / "retriever")]
    halves += [Generator.load(out / "final" / "generator").model]
    counts = [sum(p.numel() for p in half.parameters()) for half in halves]
    assert manifest["meta"]["trained"] == {"retriever": counts[0], "generator": counts[1]}
    assert json.loads((out / "final" / "prompt.json").read_text()) == Prompt().model_dump()


def recall_at_5(home: Path) -> float:
    """Of the validation questions, by the encoder that joint training begins with."""
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        chunks = kb.chunks()
    asked = split(load_questions(home / "data" / "questions.jsonl"), "validation")
    encoder = DualEncoder.load(home / "retriever")
    queries_QD = embed_corpus(encoder, [q.question for q in asked], side="question")
    scores_QN = queries_QD @ embed_corpus(encoder, [chunk.passage for chunk in chunks]).T
    best_Q5 = np.argsort(-scores_QN, axis=1)[:, :5]
    gold = gold_chunks(asked, chunks)
    hits = [
        any(chunks[row].id in gold[question.id] for row in rows)
        for question, rows in zip(asked, best_Q5, strict=True)
        if gold[question.id]
    ]
    assert 0 < sum(hits) < len(hits)
    return sum(hits) / len(hits)


def test_the_warm_start_stops_when_validation_stops_rising_and_keeps_its_best(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = recipe("train/retriever.py")
    figures = iter([0.2, 0.4, 0.3, 0.4, 0.9])
    seen: list[str] = []

    def measured(encoder: DualEncoder, *_: object) -> float:
        seen.append(encoder.fingerprint())
        return next(figures)

    monkeypatch.setattr(module, "recall_at_5", measured)
    out = tmp_path / "retriever"
    changes = {"validate_every": 2, "patience": 2, "steps": 40, "checkpoint_every": 8}
    cfg = module.RetrieverConfig(**settings("retriever", home) | changes | {"out": str(out)})
    assert module.main(cfg) == {"recall_at_5": 0.4}
    rows = log(out)
    assert [row["recall"] for row in rows if "recall" in row] == [0.2, 0.4, 0.3, 0.4]
    assert len(rows) == 8
    best = DualEncoder.load(out / "final" / "retriever")
    assert best.fingerprint() == seen[1] and len(set(seen)) == 4

    # Cut off between its last checkpoint and its end, it does not take one step more.
    shutil.rmtree(out / "final")
    again = module.RetrieverConfig(**cfg.model_dump() | {"resume": True})
    assert module.main(again) == {"recall_at_5": 0.4} and log(out) == rows


def test_the_last_steps_of_a_warm_start_are_validated_too(recipe: Load, home: Path, tmp_path: Path):
    start(recipe, "retriever", home, tmp_path / "out", validate_every=7)
    assert [line["step"] for line in log(tmp_path / "out") if "recall" in line] == [6, 8]


def test_a_pretrained_encoder_keeps_its_own_tokenizer(recipe: Load, home: Path, tmp_path: Path):
    own = tmp_path / "own"
    tokenizer = train_bpe(["another text with other words"] * 3, 300)
    network: Any = DualEncoder.build(EncoderConfig(**SHAPE), tokenizer).question_tower
    network.save_pretrained(own)
    tokenizer.save_pretrained(own)
    start(recipe, "retriever", home, tmp_path / "out", encoder={"model": str(own)}, steps=1)
    trained = DualEncoder.load(tmp_path / "out" / "final" / "retriever")
    assert trained.tokenizer.get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize(
    "refresh",
    [
        {"name": "sync", "every": 3},
        {"name": "async", "every": 4, "lag": 3},
        {"name": "sync", "every": 3, "share": 0.4},
    ],
    ids=str,
)
def test_two_processes_that_share_a_joint_run_leave_what_one_leaves(
    recipe: Load, home: Path, tmp_path: Path, refresh: dict[str, Any]
):
    one, two = tmp_path / "one", tmp_path / "two"
    start(recipe, "joint", home, one, refresh=refresh)
    asked = settings("joint", home) | {"refresh": refresh}
    words = [f"{key}={json.dumps(value)}" for key, value in asked.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(config.recipe("train/joint.py"))
    done = subprocess.run([*launch, script, *words, f"out={two}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(log(two)) == len(log(one)) == 9
    assert generations(two).keys() == generations(one).keys()
    for file in sorted((one / "final").rglob("*.safetensors")):
        mine, theirs = load_file(file), load_file(two / file.relative_to(one))
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=0)

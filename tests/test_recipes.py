"""The recipes: a run that was cut off and goes on, frozen halves, scores, and users' mistakes."""

import hashlib
import json
import math
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rag2 import cli, config
from rag2.evaluation import arms, score
from rag2.evaluation.questions import load_questions, split
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training import checkpoint
from rag2.training.log import RunLog
from rag2.types import Question

Load = Callable[[str], ModuleType]
SHAPE = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48}
KINDS = ("pretrain", "retriever", "finetune", "joint")


class Killed(Exception):
    """What stands for the kill of a process."""


def settings(kind: str, home: Path) -> dict[str, Any]:
    """A run of nine steps with a checkpoint every four, small and fast to change its weights."""
    data = home / "data"
    common = {"seed": 3, "steps": 9, "checkpoint_every": 4, "schedule": {"warmup": 2}}
    made = {"kb": str(data / "kb.sqlite"), "questions": str(data / "questions.jsonl")}
    base = {"generator": str(home / "generator")}
    return (
        common
        | {
            "pretrain": {
                "corpus": str(data / "pretrain.jsonl"),
                "tokenizer": str(data / "tokenizer"),
                "network": SHAPE,
                "batch_size": 4,
            },
            "retriever": made
            | {
                "tokenizer": str(data / "tokenizer"),
                "encoder": SHAPE,
                "batch_size": 8,
                "validate_every": 3,
                "schedule": {"warmup": 2, "decay": "constant"},
            },
            # Dropout: only a run that restores the random state goes on as it would have.
            "finetune": made
            | base
            | {
                "tuning": {"name": "lora", "rank": 4, "dropout": 0.2},
                "objective": {"name": "unsupervised", "block": 64},
                "batch_size": 4,
                "lr": 1e-2,
            },
            # Re-indexed after steps 3, 6, 9: at the kill the index is younger than the checkpoint.
            "joint": made
            | base
            | {
                "retriever": str(home / "retriever"),
                "refresh": {"name": "sync", "every": 3},
                "batch_size": 4,
                "lr_retriever": 3e-3,
                "lr_generator": 1e-3,
            },
        }[kind]
    )


def start(recipe: Load, kind: str, home: Path, out: Path, **changes: Any) -> dict[str, float]:
    """Run a recipe in this process."""
    module = recipe(f"train/{kind}.py")
    cls = getattr(module, f"{kind.title()}Config")
    return module.main(cls(**settings(kind, home), **{"out": str(out)} | changes))


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run die in the middle of writing the line of `step` to its log."""
    honest = RunLog.write

    def write(self: RunLog, **values: Any) -> None:
        if values["step"] == step:
            self._file.write(json.dumps(values)[:20])
            self.close()
            raise Killed
        honest(self, **values)

    monkeypatch.setattr(RunLog, "write", write)


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without wall-clock times."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in final/."""
    paths = sorted((out / "final").rglob("*.safetensors"))
    assert paths
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def generations(out: Path) -> dict[str, str]:
    """SHA-256 of the index files that lie in generations/."""
    paths = sorted((out / "generations").rglob("*"))
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in paths
        if p.is_file()
    }


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
    if forgotten == "optimizer":
        monkeypatch.setattr(checkpoint, "_restore_optimizer", lambda *_: None)
    elif forgotten == "weights":
        monkeypatch.setattr(checkpoint, "_restore", lambda *_: None)
    else:
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    start(recipe, "finetune", home, out, resume=True)
    assert weights(out) != weights(whole["finetune"]) and log(out) != log(whole["finetune"])


def test_a_joint_run_that_resumes_with_another_index_does_not_pass_for_the_same_run(
    recipe: Load, home: Path, whole: dict[str, Path], tmp_path: Path
):
    from rag2.reindex import Reindexer

    out = tmp_path / "joint"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=7)
        start(recipe, "joint", home, out)
    with pytest.MonkeyPatch.context() as patch:  # today's weights instead of the stored index
        patch.setattr(Reindexer, "load", lambda self, number: self.build(4))
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


def test_a_joint_run_leaves_the_documented_files_and_keys(whole: dict[str, Path]):
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
    names = {"config.yaml", "log.jsonl", "checkpoints", "generations", "final"}
    assert names <= {p.name for p in out.iterdir()}
    assert (out / "generations" / "current").read_text().strip() == "000003"
    manifest = json.loads((out / "final" / "manifest.json").read_text())
    halves = [DualEncoder.load(out / "final" / "retriever")]
    halves += [Generator.load(out / "final" / "generator").model]
    count = sum(p.numel() for half in halves for p in half.parameters())
    assert manifest["meta"]["trained_parameters"] == count
    assert json.loads((out / "final" / "prompt.json").read_text()) == Prompt().model_dump()


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


# --- frozen halves --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["one_pass", "two_pass"])
def test_joint_training_with_both_halves_frozen_is_frozen_rag(
    recipe: Load, home: Path, tmp_path: Path, step: str
):
    out = tmp_path / "frozen"
    start(recipe, "joint", home, out, train=[], step={"name": step})
    warm, base = DualEncoder.load(home / "retriever"), Generator.load(home / "generator")
    after = DualEncoder.load(out / "final" / "retriever")
    reader = Generator.load(out / "final" / "generator")
    assert after.fingerprint() == warm.fingerprint()
    assert reader.fingerprint() == base.fingerprint()
    assert json.loads((out / "final" / "manifest.json").read_text())["meta"] == {
        "trained_parameters": 0
    }
    rows = log(out)
    assert len(rows) == 9 and all(math.isfinite(row["loss"]) for row in rows)
    assert {row["grad_norm"] for row in rows} == {0.0}
    # Same index, same chunks, same answers.
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:12]
    found = [answered(home, *pair, questions) for pair in ((warm, base), (after, reader))]
    for field in ("ids_QK", "scores_QK", "logp_QKC", "closed_QC"):
        np.testing.assert_array_equal(getattr(found[0], field), getattr(found[1], field))


def answered(
    home: Path,
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

    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        chunks = kb.chunks()
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
    start(recipe, "joint", home, tmp_path / "run", train=[half])
    prints = {
        "retriever": lambda path: DualEncoder.load(path).fingerprint(),
        "generator": lambda path: Generator.load(path).fingerprint(),
    }
    final = tmp_path / "run" / "final"
    assert prints[other](final / other) == prints[other](home / other)
    assert prints[half](final / half) != prints[half](home / half)


# --- scores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp(home: Path) -> Generator:
    """A random generator whose answers differ: log-probabilities of its choices lie far apart."""
    generator = Generator.load(home / "generator")
    seed = secrets.randbits(31)
    print(f"seed {seed}")  # noqa: T201
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in generator.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return generator


def test_scores_do_not_depend_on_the_size_of_a_batch(home: Path, sharp: Generator):
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:40]
    encoder = DualEncoder.load(home / "retriever")
    runs = [answered(home, encoder, sharp, questions, size) for size in (64, 512, 8192)]
    for run in runs[:2]:
        for field in ("logp_QKC", "closed_QC"):
            a, b = getattr(run, field), getattr(runs[2], field)
            assert (np.abs(a - b) <= 1e-5 * np.maximum(1, np.abs(b))).all()
        for k in (0, 1, 3):
            picks = [score.predict(score.marginal(r, k, 1.0)) for r in (run, runs[2])]
            np.testing.assert_array_equal(picks[0], picks[1])
    spread = np.ptp(runs[2].closed_QC, axis=1)
    assert spread.min() > 1e-3  # else the picks would be chance


def test_cloze_scores_do_not_depend_on_the_order_of_the_options(home: Path, sharp: Generator):
    questions = split(load_questions(home / "data" / "questions.jsonl"), "test")[:30]
    turned = [
        Question(q.id, q.question, q.choices[::-1], 3 - q.answer, evidence=q.evidence)
        for q in questions
    ]
    encoder = DualEncoder.load(home / "retriever")
    a, b = (answered(home, encoder, sharp, asked, k=2) for asked in (questions, turned))
    np.testing.assert_array_equal(a.ids_QK, b.ids_QK)  # options never enter the query
    np.testing.assert_allclose(a.logp_QKC, b.logp_QKC[:, :, ::-1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a.closed_QC, b.closed_QC[:, ::-1], rtol=1e-5, atol=1e-5)
    right = [
        score.predict(score.marginal(s, 2)) == score.answers(asked)
        for s, asked in ((a, questions), (b, turned))
    ]
    np.testing.assert_array_equal(right[0], right[1])


# --- users' mistakes ------------------------------------------------------------------------------


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., str]:
    """Runs a command that must fail; returns its one line. It leaves nothing in `out`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        out = tmp_path / "out"
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, f"out={out}"])
        shown = capsys.readouterr()
        assert caught.value.code == 2, shown.err
        lines = [line for line in shown.err.splitlines() if line.strip()]
        assert lines and lines[-1].startswith("error: "), shown.err
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in shown.err + shown.out
        assert not out.exists(), sorted(out.rglob("*"))
        return lines[-1]

    return run


def command(kind: str, home: Path, **changes: Any) -> list[str]:
    """The command line of a recipe's run with small settings."""
    return ["train", kind] + [
        f"{key}={json.dumps(value)}" for key, value in (settings(kind, home) | changes).items()
    ]


def test_a_typo_in_a_key_is_answered_with_the_nearest_key(
    refused: Callable[..., str], home: Path, tmp_path: Path
):
    assert "batch_sise" in (line := refused(*command("joint", home, batch_sise=3)))
    assert "batch_size" in line
    line = refused(*command("joint", home), "candidates.dence=3")
    assert "candidates.dence" in line and "dense" in line
    (tmp_path / "mine.yaml").write_text("stepz: 3\n")
    assert "steps" in refused("train", "pretrain", "-c", "mine.yaml")
    assert "two_pass" in refused(*command("joint", home, step="two_pas"))


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("joint", "kb"),
        ("joint", "questions"),
        ("joint", "generator"),
        ("joint", "retriever"),
        ("retriever", "kb"),
        ("retriever", "questions"),
        ("retriever", "tokenizer"),
        ("finetune", "generator"),
        ("finetune", "kb"),
        ("finetune", "paraphrases"),
        ("pretrain", "corpus"),
        ("pretrain", "tokenizer"),
    ],
)
def test_a_missing_file_is_named(refused: Callable[..., str], home: Path, kind: str, key: str):
    line = refused(*command(kind, home, **{key: "nowhere/at-all/x"}))
    assert "nowhere/at-all/x" in line


@pytest.mark.parametrize(
    ("kind", "key"), [("joint", "kb"), ("finetune", "generator"), ("pretrain", "corpus")]
)
def test_an_input_that_is_not_given_is_named(
    refused: Callable[..., str], home: Path, kind: str, key: str
):
    assert f"{key} is not given" in refused(*command(kind, home, **{key: None}))


def test_an_empty_corpus_is_named(refused: Callable[..., str], home: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: no rows" in refused(*command("pretrain", home, corpus="empty.jsonl"))
    empty = tmp_path / "empty.sqlite"
    KnowledgeBase(empty, create=True).close()
    for kind in ("joint", "retriever", "finetune"):
        line = refused(*command(kind, home, kb=str(empty)))
        assert "empty.sqlite" in line or "0 chunks" in line, line


def test_a_question_without_choices_is_named_by_file_and_line(
    refused: Callable[..., str], home: Path, tmp_path: Path
):
    good = {"id": "a", "question": "Who?", "choices": ["x", "y"], "answer": 0, "split": "train"}
    bad = {"id": "b", "question": "Who?", "answers": ["x"], "split": "train"}
    rows = [json.dumps(good), json.dumps(bad)]
    (tmp_path / "q.jsonl").write_text("\n".join(rows) + "\n")
    for words in (
        command("joint", home, questions="q.jsonl"),
        command("finetune", home, questions="q.jsonl", objective="supervised"),
        ["eval", "mc", f"generator={home / 'generator'}", "questions=q.jsonl"],
    ):
        assert "q.jsonl:2" in refused(*words)


def test_a_k_larger_than_the_corpus_is_refused(refused: Callable[..., str], home: Path):
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        count = len(kb.chunks())
    line = refused(*command("joint", home, candidates={"dense": 2000, "bm25": 0, "random": 0}))
    assert "K = 2000" in line and f"{count} chunks" in line
    recall = ["eval", "recall", f"retriever={home / 'retriever'}", "split=test", "ks=[1,5000]"]
    data = home / "data"
    line = refused(*recall, f"kb={data / 'kb.sqlite'}", f"questions={data / 'questions.jsonl'}")
    assert "5000" in line and str(count) in line


def test_a_mistake_ends_a_process_with_status_two_and_one_line(home: Path, tmp_path: Path):
    import os
    import subprocess

    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root / "kernels")])}
    words = command("joint", home, kb="nowhere.sqlite")[2:]
    done = subprocess.run(
        [sys.executable, str(config.recipe("train/joint.py")), *words, "out=out"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "nowhere.sqlite" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "out").exists()

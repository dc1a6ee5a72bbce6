"""How runs end and go on: what is committed last, what a resume may not touch, and what it says."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rag2 import artifact, config
from rag2.generator.load import Generator, build_llama
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.reindex.collapse import Guard, Health
from rag2.training.log import RunLog
from rag2.training.run import Run
from small_runs import KINDS, Killed, Load, killed_at, log, settings, start, weights
from small_world import SHAPE, tokenizer_of


@pytest.fixture(scope="module")
def whole(recipe: Load, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "a"
    start(recipe, "joint", home, out)
    return out


def named(out: Path) -> str:
    return (out / "checkpoints" / "latest").read_text().strip()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sigterm_while_the_result_is_written_loses_nothing(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    honest = Run.finish

    def finish(self: Run, **parts: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        honest(self, **parts)

    monkeypatch.setattr(Run, "finish", finish)
    start(recipe, kind, home, tmp_path / "a", steps=3)
    artifact.verify(tmp_path / "a" / "final")
    assert named(tmp_path / "a") == "step-000003"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open log
def test_a_result_stays_until_the_next_one_is_whole_and_the_last_step_is_not_lost(
    recipe: Load, home: Path, tmp_path: Path, whole: Path
):
    out = tmp_path / "a"
    start(recipe, "joint", home, out, steps=5)
    before = weights(out)
    with pytest.MonkeyPatch.context() as patch:

        def save(self: Generator, *_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(Generator, "save", save)
        with pytest.raises(OSError, match="No space left"):
            start(recipe, "joint", home, out, resume=True)
    assert weights(out) == before and named(out) == "step-000009"
    start(recipe, "joint", home, out, resume=True)
    artifact.verify(out / "final")
    assert len(log(out)) == 9 and not list(out.glob(".final*"))


def test_a_refused_resume_changes_nothing(recipe: Load, home: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    made = {"kb": str(data / "kb.sqlite"), "questions": str(data / "questions.jsonl")}
    out = tmp_path / "a"
    start(recipe, "joint", home, out, steps=5, **made)
    (out / "checkpoints" / "latest").write_text("step-000004\n")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with KnowledgeBase(data / "kb.sqlite") as kb:
        kb.remove([kb.chunks()[0].document])
    with pytest.raises(UserError, match="questions, texts or knowledge base .* have changed"):
        start(recipe, "joint", home, out, steps=9, resume=True, **made)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_every_retained_checkpoint_can_be_gone_back_to_also_after_a_resume(
    recipe: Load, home: Path, tmp_path: Path, whole: Path
):
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=8)
        start(recipe, "joint", home, out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=8)
        start(recipe, "joint", home, out, resume=True)
    (out / "checkpoints" / "latest").write_text("step-000004\n")
    start(recipe, "joint", home, out, resume=True)
    assert log(out) == log(whole) and weights(out) == weights(whole)


def test_a_run_without_its_pointer_goes_on_from_the_last_whole_checkpoint(
    recipe: Load, home: Path, tmp_path: Path, whole: Path
):
    out = tmp_path / "a"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=8)
        start(recipe, "joint", home, out)
    (out / "checkpoints" / "latest").unlink()
    with pytest.MonkeyPatch.context() as patch:
        first = []
        honest = RunLog.__init__

        def opened(self: RunLog, folder: Path, step: int) -> None:
            first.append(step)
            honest(self, folder, step)

        patch.setattr(RunLog, "__init__", opened)
        start(recipe, "joint", home, out, resume=True)
    assert first == [8]
    assert log(out) == log(whole) and weights(out) == weights(whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its open log
@pytest.mark.parametrize("name", ["log.jsonl", "swaps.jsonl"])
def test_a_log_that_another_made_is_neither_written_over_nor_taken_for_ours(
    recipe: Load, home: Path, tmp_path: Path, whole: Path, name: str
):
    out = tmp_path / "a"
    out.mkdir()
    (out / name).write_text("my own notes\n")
    with pytest.raises(UserError, match=f"holds {name} of another run"):
        start(recipe, "joint", home, out)
    assert (out / name).read_text() == "my own notes\n"
    shutil.copytree(whole, tmp_path / "b")
    (tmp_path / "b" / name).write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match=rf"{name}:1: not a line"):
        start(recipe, "joint", home, tmp_path / "b", resume=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_was_trained_when_the_guard_stopped_is_there_for_one_that_only_warns(
    recipe: Load, home: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    def complaints(self: Guard, first: Health, now: Health) -> list[str]:
        return [] if now == first else ["planted"]

    monkeypatch.setattr(Guard, "complaints", complaints)
    out = tmp_path / "a"
    with pytest.raises(UserError, match="resume=true guard.action=warn"):
        start(recipe, "joint", home, out, guard={"action": "stop"})
    assert named(out) == "step-000003"
    start(recipe, "joint", home, out, guard={"action": "warn"}, resume=True)
    assert log(out) == log(whole) and weights(out) == weights(whole)


def test_a_generator_of_another_size_is_refused_by_the_tensor(
    recipe: Load, home: Path, tmp_path: Path
):
    start(recipe, "joint", home, tmp_path / "a", steps=2)
    wide = SHAPE | {"hidden": 2 * SHAPE["hidden"]}
    build_llama(tokenizer_of(home), **wide, max_positions=512).save(tmp_path / "wide")
    shutil.copytree(home / "generator", tmp_path / "generator")
    changes = {"generator": str(tmp_path / "generator"), "steps": 2}
    start(recipe, "joint", home, tmp_path / "b", **changes)
    shutil.rmtree(tmp_path / "generator")
    (tmp_path / "wide").rename(tmp_path / "generator")
    with pytest.raises(UserError, match=r"tensor '.*' is \[.*\], but \[.*\] in this configuration"):
        start(recipe, "joint", home, tmp_path / "b", resume=True, **changes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_is_one_line(number: int, tmp_path: Path):
    assert config.blame(OSError(number, os.strerror(number))) == f"[Errno {number}] " + os.strerror(
        number
    )
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        with artifact.committing(tmp_path / "a", kind="x"):
            raise RuntimeError(f"FAISS: write error: {os.strerror(number)}")
    assert caught.value.filename == str(tmp_path / "a") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"candidates": {"dense": 0, "bm25": 0, "random": 0, "null": True}}, "none but the NULL"),
        ({"candidates": {"dense": 0, "over": 10}}, "over=10 with dense=0"),
        ({"candidates": {"remove_source": True, "in_batch": True}}, "its negative"),
    ],
)
def test_settings_under_which_nothing_is_learned_are_refused(
    recipe: Load, home: Path, changes: dict[str, Any], line: str
):
    with pytest.raises(ValueError, match=line):
        recipe("train/joint.py").JointConfig(**settings("joint", home) | changes)


def test_a_generator_that_no_loss_teaches_is_refused(recipe: Load, home: Path, tmp_path: Path):
    loss = {"name": "pdist", "reader": "none"}
    changes = {"train": ["generator"], "refresh": {"name": "none"}, "loss": loss}
    with pytest.raises(UserError, match="nothing learns"):
        start(recipe, "joint", home, tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_the_checkpoint_of_the_last_step_is_not_made_twice(whole: Path):
    steps = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert steps == ["step-000008", "step-000009"]
    assert json.loads((whole / "checkpoints" / steps[1] / "state.json").read_text())["step"] == 9

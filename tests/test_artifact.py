"""The commit primitive: whole or not there, durable before named, checked before read."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from committed import commit, fill, names
from rag2 import artifact
from rag2.artifact import committing, follow, sweep, verify
from rag2.reindex.journal import Journal

SRC = Path(artifact.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("seed")


def test_a_committed_directory_verifies_and_carries_its_meta(tmp_path: Path):
    manifest = verify(commit(tmp_path / "runs/a/step-3"), kind="checkpoint")
    assert manifest["meta"] == {"step": 3} and manifest["format"] == artifact.FORMAT
    assert set(manifest["files"]) == {"weights.safetensors", "state.json", "folder/ids.json"}
    assert names(tmp_path / "runs/a") == {"step-3"}  # no staging directory stays behind


def test_meta_may_be_filled_while_the_files_are_written(tmp_path: Path):
    meta: dict[str, int] = {}
    with committing(tmp_path / "a", kind="x", meta=meta) as staging:
        (staging / "f").write_text("f")
        meta["rows"] = 17
    assert verify(tmp_path / "a")["meta"] == {"rows": 17}


def test_a_committed_directory_is_readable_like_any_other(tmp_path: Path):
    commit(tmp_path / "a")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_while_writing_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    pointer = tmp_path / "latest"
    commit(tmp_path / "step-1", pointer)
    with pytest.raises(error):
        with committing(tmp_path / "step-2", kind="checkpoint", pointer=pointer) as staging:
            fill(staging)
            raise error
    assert names(tmp_path) == {"step-1", "latest"}
    assert follow(pointer) == tmp_path / "step-1"


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_failing_system_call_leaves_the_previous_artifact_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    pointer = tmp_path / "latest"
    commit(tmp_path / "step-1", pointer)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError):
        commit(tmp_path / "step-2", pointer)
    monkeypatch.undo()
    assert follow(pointer) == tmp_path / "step-1"
    committed = {"step-2"} if call == "replace" else set()  # durable, but not yet named
    assert names(tmp_path) == {"step-1", "latest"} | committed


def test_a_full_disk_is_named_whichever_library_noticed_it(tmp_path: Path):
    said = "write error in x: 1048531 != 3200000 (No space left on device)"  # as FAISS says it
    with pytest.raises(OSError, match="No space left") as caught:
        with committing(tmp_path / "g", kind="generation"):
            raise RuntimeError(said)
    assert caught.value.filename == str(tmp_path / "g") and names(tmp_path) == set()


CRASH = """
import os, pathlib, sys
sys.path.insert(0, {src!r})
from rag2 import artifact
calls = 0
def counted(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == {fatal}:
            os._exit(9)  # like a kill: no handler runs
        return real(*args, **kwargs)
    return call
for name in ("fsync", "rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
here = pathlib.Path({here!r})
with artifact.committing(here / "step-2", kind="checkpoint", pointer=here / "latest") as staging:
    (staging / "a.json").write_text("[]")
    (staging / "b.json").write_text("[]")
"""


def test_a_kill_at_any_call_leaves_an_artifact_that_verifies(tmp_path: Path):
    outcomes, status = [], None
    for fatal in range(1, 40):
        here = tmp_path / str(fatal)
        commit(here / "step-1", here / "latest")
        code = CRASH.format(src=str(SRC), fatal=fatal, here=str(here))
        status = subprocess.run([sys.executable, "-c", code]).returncode
        current = follow(here / "latest")
        assert current is not None
        verify(current)
        if (here / "step-2").exists():
            verify(here / "step-2")
        assert len(sweep(here)) == (status == 9 and not (here / "step-2").exists())
        assert not list(here.glob(".*.staging-*"))
        outcomes.append(current.name)
        if status == 0:
            break
    assert status == 0 and outcomes[-1] == "step-2" and outcomes[0] == "step-1"
    assert outcomes == sorted(outcomes) and len(outcomes) >= 9  # every call was the fatal one once


# ----- the order of durability -----------------------------------------------------------------


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch):
    """The names of what is fsynced, renamed and replaced, in order."""
    events: list[tuple[str, str]] = []

    def label(path: str) -> str:
        return "staging" if ".staging-" in Path(path).name else Path(path).name

    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        events.append(("fsync", label(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def rename(source: str, target: str) -> None:
        events.append(("rename", label(str(target))))
        real_rename(source, target)

    def replace(source: str, target: str) -> None:
        events.append(("replace", label(str(target))))
        real_replace(source, target)

    with monkeypatch.context() as patch:
        for name, fake in {"fsync": fsync, "rename": rename, "replace": replace}.items():
            patch.setattr(os, name, fake)
        yield events


def test_a_swap_is_durable_in_its_file_and_folder_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    journal = Journal(tmp_path / "swaps.jsonl", keep=True, resumed=False)
    with recorded(monkeypatch) as events:
        journal.add(1, 5)
        journal.add(2, 9)
    file = ("fsync", "swaps.jsonl")
    assert events == [file, ("fsync", tmp_path.name), file]


def misordered(events: list[tuple[str, str]], files: list[str], parent: str) -> list[str]:
    """Every pair of events that a crash between them would turn into a broken promise."""
    chain = [[("fsync", name) for name in files]]
    chain += [[("fsync", "staging")], [("fsync", "manifest.json")], [("rename", "step-3")]]
    chain += [[("fsync", parent)], [("replace", "latest")]]
    wrong = [f"{e} never happened" for stage in chain for e in stage if e not in events]
    if not wrong:
        at = [[events.index(e) for e in stage] for stage in chain]
        at[4] = [i for i, e in enumerate(events) if e == ("fsync", parent) and i > min(at[3])][:1]
        for before, after in zip(range(len(chain) - 1), range(1, len(chain)), strict=True):
            if not at[after] or max(at[before]) > min(at[after]):
                wrong.append(f"{chain[before]} after {chain[after]}")
    if not wrong and ("fsync", "staging") not in events[events.index(chain[2][0]) :]:
        wrong.append("the manifest's entry in its directory was not made durable")
    if not wrong and events[-1] != ("fsync", parent):
        wrong.append("the pointer's entry was not made durable")
    return wrong


FILES = ["weights.safetensors", "state.json", "ids.json", "folder"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names descriptors through /proc")
def test_the_pointer_moves_only_after_everything_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "runs").mkdir()
    with recorded(monkeypatch) as events:
        commit(tmp_path / "runs/step-3", tmp_path / "runs/latest")
    assert not misordered(events, FILES, "runs")


def early_pointer(directory: Path, pointer: Path) -> None:
    pointer.with_name("new").write_text(directory.name)
    os.replace(pointer.with_name("new"), pointer)
    commit(directory, pointer)


def early_rename(directory: Path, pointer: Path) -> None:
    real = artifact._write_manifest

    def late(staging: Path, kind: str, meta: dict) -> None:
        os.rename(staging, directory)
        os.rename(directory, staging)
        real(staging, kind, meta)

    artifact._write_manifest = late
    try:
        commit(directory, pointer)
    finally:
        artifact._write_manifest = real


def without(name: str) -> Callable[[Path, Path], None]:
    def broken(directory: Path, pointer: Path) -> None:
        real = getattr(artifact, name)
        setattr(artifact, name, lambda path: None)
        try:
            commit(directory, pointer)
        finally:
            setattr(artifact, name, real)

    return broken


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names descriptors through /proc")
@pytest.mark.parametrize(
    "broken", [early_pointer, early_rename, without("_sync_file"), without("_sync_directory")]
)
def test_the_order_check_catches_a_planted_wrong_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Path, Path], None]
):
    (tmp_path / "runs").mkdir()
    with recorded(monkeypatch) as events:
        broken(tmp_path / "runs/step-3", tmp_path / "runs/latest")
    assert misordered(events, FILES, "runs")

"""The commit primitive: whole or not there, durable before named, checked before read."""

import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from rag2 import artifact
from rag2.artifact import ArtifactError, committing, follow, is_complete, sweep, verify
from rag2.registry import UserError

SRC = Path(artifact.__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh_inputs():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    random.seed(seed)


def fill(staging: Path) -> None:
    """Three files of fresh random content, one of them in a folder."""
    (staging / "folder").mkdir()
    for name in ("weights.safetensors", "state.json", "folder/ids.json"):
        (staging / name).write_bytes(random.randbytes(random.randrange(1, 5000)))


def commit(directory: Path, pointer: Path | None = None) -> Path:
    with committing(directory, kind="checkpoint", meta={"step": 3}, pointer=pointer) as staging:
        fill(staging)
    return directory


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


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


# ----- refusals ----------------------------------------------------------------------------------


def change_a_byte(directory: Path) -> None:
    path = random.choice([p for p in directory.rglob("*") if p.is_file()])
    print(f"changed {path.name}")  # noqa: T201
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def swap_two_files(directory: Path) -> None:
    a, b = directory / "state.json", directory / "folder/ids.json"
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)


def link(directory: Path) -> None:
    (directory / "state.json").rename(directory.parent / "outside")
    (directory / "state.json").symlink_to(directory.parent / "outside")


def link_a_folder(directory: Path) -> None:
    (directory / "folder").rename(directory.parent / "folder")
    (directory / "folder").symlink_to(directory.parent / "folder")


def edit_manifest(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        manifest = json.loads((directory / "manifest.json").read_text())
        edit(manifest)
        (directory / "manifest.json").write_text(json.dumps(manifest))

    return damage


def cut_manifest(directory: Path) -> None:
    data = (directory / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(data[: random.randrange(len(data))])


DAMAGE: list[Callable[[Path], object]] = [
    change_a_byte,
    swap_two_files,
    link,
    link_a_folder,
    cut_manifest,
    lambda d: (d / "state.json").unlink(),
    lambda d: (d / "extra.json").write_text("{}"),
    lambda d: (d / "folder/extra.pkl").write_bytes(b""),
    lambda d: os.mkfifo(d / "pipe"),
    lambda d: (d / "state.json").write_bytes(b""),
    lambda d: (d / "manifest.json").unlink(),
    lambda d: (d / "manifest.json").write_bytes(b""),
    lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe"),
    lambda d: (d / "manifest.json").write_text("[]"),
    lambda d: (d / "manifest.json").write_text("[" * 100_000),
    edit_manifest(lambda m: m.update(format=2)),
    edit_manifest(lambda m: m.update(meta={"step": 4})),
    edit_manifest(lambda m: m.update(unknown=1)),
    edit_manifest(lambda m: m["files"].pop("state.json")),
    edit_manifest(lambda m: m["files"].update({"../outside": m["files"]["state.json"]})),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], object]):
    directory = commit(tmp_path / "step-3")
    verify(directory)
    damage(directory)
    with pytest.raises(ArtifactError) as caught:
        verify(directory)
    assert len(str(caught.value).splitlines()) == 1 and "step-3" in str(caught.value)


def test_every_byte_of_a_manifest_is_covered(tmp_path: Path):
    with committing(tmp_path / "a", kind="x", meta={"parent": "b"}) as staging:
        (staging / "f").write_text("f")
    path = tmp_path / "a/manifest.json"
    data = path.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << random.randrange(7)
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            verify(tmp_path / "a")
    path.write_bytes(data)
    verify(tmp_path / "a")


def test_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="is a 'checkpoint' artifact, not a 'generation'"):
        verify(commit(tmp_path / "a"), kind="generation")


def test_a_missing_directory_is_refused_as_a_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="is not a directory"):
        verify(tmp_path / "none")


def test_nothing_is_ever_overwritten(tmp_path: Path):
    commit(tmp_path / "a")
    before = verify(tmp_path / "a")
    with pytest.raises(ArtifactError, match="exists already"):
        commit(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="exists already"):
        commit(tmp_path / "empty")
    assert verify(tmp_path / "a") == before and names(tmp_path) == {"a", "empty"}


def test_a_directory_that_appears_meanwhile_wins(tmp_path: Path):
    with pytest.raises(ArtifactError, match="exists already"):
        with committing(tmp_path / "a", kind="late") as staging:
            (staging / "f").write_text("late")
            commit(tmp_path / "a")
    assert verify(tmp_path / "a")["kind"] == "checkpoint" and names(tmp_path) == {"a"}


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/hostname", path)])
def test_a_writer_cannot_commit_what_a_reader_would_refuse(tmp_path: Path, make: Callable):
    with pytest.raises(ArtifactError, match="no regular file"):
        with committing(tmp_path / "a", kind="x") as staging:
            make(staging / "odd")
    assert not names(tmp_path)


# ----- pointers and leftovers --------------------------------------------------------------------


def test_a_pointer_may_lie_in_a_folder_above(tmp_path: Path):
    commit(tmp_path / "checkpoints/step-3", tmp_path / "latest")
    assert (tmp_path / "latest").read_text() == "checkpoints/step-3\n"
    assert follow(tmp_path / "latest") == tmp_path / "checkpoints/step-3"


def test_no_pointer_means_nothing_yet(tmp_path: Path):
    assert follow(tmp_path / "latest") is None and not is_complete(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "..", "../a", "/etc", "a/../../b", "a\nb", "a//b", "gone", "\0"]
)
def test_a_pointer_that_names_no_artifact_beside_it_is_refused(tmp_path: Path, text: str):
    commit(tmp_path / "a")
    (tmp_path / "latest").write_text(text)
    with pytest.raises(ArtifactError):
        follow(tmp_path / "latest")


def test_sweep_removes_what_killed_writers_left_and_spares_living_ones(tmp_path: Path):
    dead = tmp_path / ".step-1.staging-abc"
    dead.mkdir()
    (dead / "half").write_text("half")
    (tmp_path / ".x.staging-link").symlink_to(tmp_path)
    commit(tmp_path / "step-0")
    with committing(tmp_path / "step-2", kind="checkpoint") as living:
        fill(living)
        assert sweep(tmp_path) == [dead]
    verify(tmp_path / "step-2")
    assert names(tmp_path) == {"step-0", "step-2", ".x.staging-link"} and not sweep(tmp_path)

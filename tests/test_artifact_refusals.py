"""What an artifact refuses: damage, overwriting, pointers to nothing."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from committed import commit, fill, names
from rag2.artifact import ArtifactError, committing, follow, is_complete, sweep, verify
from rag2.registry import UserError

pytestmark = pytest.mark.usefixtures("seed")


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


def test_of_one_file_the_bytes_and_of_the_others_the_sizes_are_checked(tmp_path: Path):
    directory = commit(tmp_path / "a")
    mine, other = directory / "state.json", directory / "weights.safetensors"
    kept = mine.read_bytes()
    for path in (mine, other):
        data = path.read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ArtifactError, match="bytes of file 'state.json' have changed"):
        verify(directory, only=mine.name)
    mine.write_bytes(kept)
    assert verify(directory, only=mine.name)["meta"] == {"step": 3}
    other.write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"'weights\.safetensors' has 0 bytes instead of"):
        verify(directory, only=mine.name)


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

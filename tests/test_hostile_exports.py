"""What an export may not hold is refused before anything parses it, and nothing in it ever runs."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from exports import edit, exported, hostile, put
from hostile_exports import CODE, HOSTILE, NPY, mutated
from rag2.answering.exported import Exported
from rag2.registry import UserError

HELPERS = Path(__file__).resolve().parent / "helpers"
SOURCES = [HELPERS.parents[1] / "src", HELPERS.parents[1] / "kernels", HELPERS]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """The export of a small system."""
    return exported(home, tmp_path_factory.mktemp("good")).directory


def audited(
    good: Path, paths: list[Path], folder: Path, *plant: str, parts: list[str] | None = None
) -> list[dict[str, Any]]:
    """What came of loading each in a process of its own that is watched; the good one is first."""
    folder.mkdir(parents=True)
    (folder / "list.json").write_text(
        json.dumps(list(zip(map(str, paths), parts or ["all"] * len(paths), strict=True)))
    )
    script = [str(HELPERS / "audited.py"), str(good), "list.json", "out.json", *plant]
    run = (
        f"import sys, runpy; sys.path[:0] = {[str(p) for p in SOURCES]!r}; sys.argv[:] = {script!r}"
    )
    code = f"{run}; runpy.run_path({script[0]!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out.json").read_text())
    assert found["first"] == "loaded", found["first"]
    # What pickles and modules of ours do when they run.
    assert not (folder / "unpickled").exists() or plant, "something was unpickled"
    assert not (folder / "executed").exists() or plant, "something was executed"
    return found["rows"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_export_is_refused_in_one_line(tmp_path: Path, good: Path, name: str):
    change, reason = HOSTILE[name]
    path = hostile(good, tmp_path / "export", change, seal="listed" not in change.__qualname__)
    with pytest.raises(UserError) as caught:
        Exported.open(path)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line and len(line) < 500, line
    assert any(part in line for part in reason.split("|")), line


def test_no_hostile_export_runs_reaches_out_or_writes(tmp_path: Path, good: Path):
    paths = [
        hostile(good, tmp_path / f"{i}", change, seal="listed" not in change.__qualname__)
        for i, (change, _) in enumerate(HOSTILE.values())
    ]
    before = files(good)
    first, *rows = audited(good, paths, tmp_path / "audit")
    assert first["told"] == "loaded" and not first["seen"], first["seen"]
    assert files(good) == before
    for name, row in zip(HOSTILE, rows, strict=True):
        assert row["told"].startswith("refused: "), (name, row["told"])
        assert not row["seen"], (name, row["seen"])


def test_a_changed_byte_in_any_file_is_refused_before_anything_looks_at_it(
    tmp_path: Path, good: Path, dice: random.Random
):
    names = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    paths = []
    for number, name in enumerate(names):

        def flip(directory: Path, name: Path = name) -> None:
            data = bytearray((directory / name).read_bytes())
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            (directory / name).write_bytes(data)

        paths.append(hostile(good, tmp_path / f"{number}", flip, seal=False))
    assert len(paths) > 20
    rows = audited(good, paths, tmp_path / "audit", "reached")[1:]
    for name, row in zip(names, rows, strict=True):
        assert row["told"].startswith("refused: "), (name, row["told"])
        assert not row["seen"], (name, row["seen"])


def test_the_audit_sees_a_loader_that_is_wrong(tmp_path: Path, good: Path):
    planted = {
        "evil.npy": (NPY.getvalue(), "pickle.find_class"),
        "a/evil.npy": (NPY.getvalue(), "os.system"),
        "evil.py": (CODE.encode(), "exec of"),
        "b/evil.py": (b"import module_of_theirs", "import module_of_theirs"),
        "c/evil.py": (b"import socket; socket.socket().connect(('127.0.0.1', 9))", "socket."),
        "d/evil.py": (b"import os; os.fork() or os._exit(0)", "os.fork"),
        "e/evil.py": (b"import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        "evil.txt": (b"", "open for writing"),
    }
    paths = [
        hostile(good, tmp_path / f"{number}", put(name, content))
        for number, (name, (content, _)) in enumerate(planted.items())
    ]
    first, *rows = audited(good, paths, tmp_path / "audit", "wrong")
    assert not first["seen"]
    for (name, (_, trace)), row in zip(planted.items(), rows, strict=True):
        assert any(trace in what for what in row["seen"]), (name, row)


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_random_changes_are_refused_or_harmless(
    tmp_path: Path, good: Path, dice: random.Random, count: int
):
    told: Counter[str] = Counter()
    for start in range(0, count, 500):
        paths, notes = [], []
        for number in range(start, min(start + 500, count)):
            paths.append(tmp_path / f"{number}")
            hostile(good, paths[-1], lambda d, notes=notes: notes.append(mutated(dice, d)))
        parts = [part for part, _ in notes]
        rows = audited(good, paths, tmp_path / f"audit{start}", parts=parts)[1:]
        for path, (_, note), row in zip(paths, notes, rows, strict=True):
            kind = row["told"].partition(":")[0]
            assert kind in ("refused", "parsed", "loaded"), (note, row["told"])
            assert not row["seen"], (note, row["seen"])
            told[kind] += 1
            shutil.rmtree(path)
    print(told)  # noqa: T201 (pytest shows it with -s)
    assert told["refused"] > count / 3


def test_an_encoder_that_did_not_make_the_index_is_refused(tmp_path: Path, good: Path, home: Path):
    other = exported(home, tmp_path / "other").directory

    def swap(directory: Path) -> None:
        shutil.rmtree(directory / "retriever")
        shutil.copytree(other / "retriever", directory / "retriever")

    path = hostile(good, tmp_path / "export", swap)
    with pytest.raises(UserError, match=r"retriever/ is encoder \w+, but the one that .* names is"):
        Exported.open(path).retriever()
    encoder = Exported.open(other).meta["encoder"]
    path = hostile(
        path, tmp_path / "lies", edit("manifest.json", lambda m: m["meta"].update(encoder=encoder))
    )
    with pytest.raises(UserError, match=r"but the one that made the index is"):
        Exported.open(path).retriever()
    with pytest.raises(UserError, match="was embedded by encoder"):
        Exported.open(path).generation()


def test_an_index_of_other_documents_is_refused(tmp_path: Path, good: Path):
    from hostile_exports import sql

    rename = sql("UPDATE chunks SET text = 'x' || text WHERE id = 1")
    path = hostile(good, tmp_path / "text", rename)
    with pytest.raises(UserError, match="kb.sqlite and index/ are of different versions"):
        Exported.open(path).generation()
    path = hostile(good, tmp_path / "ids", sql("UPDATE chunks SET id = id + 1000"))
    with pytest.raises(UserError, match="index/ has other chunks than kb.sqlite"):
        Exported.open(path).generation()


def files(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and when it was changed."""
    paths = (p for p in directory.parent.rglob("*") if p.is_file())
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}

"""What an export may not hold is refused before anything parses it, and nothing in it ever runs."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
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
    return exported(home, tmp_path_factory.mktemp("good"), index="flat").directory


class Audited:
    """A process that loads exports and is watched while it does."""

    def __init__(self, good: Path, folder: Path) -> None:
        self.folder = folder
        script = [str(HELPERS / "audited.py"), str(good)]
        paths = [str(path) for path in SOURCES]
        run = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv[:] = {script!r}"
        code = f"{run}; runpy.run_path({script[0]!r}, run_name='__main__')"
        with (folder / "stderr").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._answer() == "loaded"

    def __call__(self, path: Path, part: str = "all", spoiled: str | None = None) -> dict[str, Any]:
        """What came of loading a part of an export, and what was seen."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([str(path), part, spoiled]) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        for trace in ("unpickled", "executed"):  # what pickles and modules of ours leave behind
            left = self.folder / trace
            assert spoiled == "wrong" or not left.exists(), trace
            left.unlink(missing_ok=True)
        return answer

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, (self.folder / "stderr").read_text()[-3000:]
        return json.loads(line)


@pytest.fixture(scope="module")
def audited(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """Such a process, which has loaded the good export."""
    watched = Audited(good, tmp_path_factory.mktemp("audit"))
    yield watched
    watched.process.kill()
    watched.process.communicate()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_export_is_refused_in_one_line(tmp_path: Path, good: Path, name: str):
    change, reason = HOSTILE[name]
    path = hostile(good, tmp_path / "export", change, seal="listed" not in change.__qualname__)
    with pytest.raises(UserError) as caught:
        Exported.open(path)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line and len(line) < 500, line
    assert any(part in line for part in reason.split("|")), line


def test_no_hostile_export_runs_reaches_out_or_writes(tmp_path: Path, good: Path, audited: Audited):
    before = files(good)
    assert audited(good) == {"told": "loaded", "seen": []}
    assert files(good) == before
    for number, (name, (change, _)) in enumerate(HOSTILE.items()):
        seal = "listed" not in change.__qualname__
        found = audited(hostile(good, tmp_path / f"{number}", change, seal))
        assert found["told"].startswith("refused: ") and not found["seen"], (name, found)


def test_a_changed_byte_in_any_file_is_refused_before_anything_looks_at_it(
    tmp_path: Path, good: Path, dice: random.Random, audited: Audited
):
    names = sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file())
    assert len(names) > 20
    for number, name in enumerate(names):
        path = hostile(good, tmp_path / f"{number}", lambda _: None, seal=False)
        data = bytearray((path / name).read_bytes())
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        (path / name).write_bytes(data)
        found = audited(path, spoiled="reached")
        assert found["told"].startswith("refused: ") and not found["seen"], (name, found)


def test_the_audit_sees_a_loader_that_is_wrong(tmp_path: Path, good: Path, audited: Audited):
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
    for number, (name, (content, trace)) in enumerate(planted.items()):
        path = hostile(good, tmp_path / f"{number}", put(name, content))
        found = audited(path, spoiled="wrong")
        assert any(trace in what for what in found["seen"]), (name, found)
        assert not audited(path)["seen"]


@pytest.mark.parametrize("count", [200, pytest.param(4000, marks=pytest.mark.slow)])
def test_random_changes_are_refused_or_harmless(
    tmp_path: Path, good: Path, dice: random.Random, count: int, audited: Audited
):
    told: Counter[str] = Counter()
    for number in range(count):
        path, notes = tmp_path / f"{number}", []
        hostile(good, path, lambda d, notes=notes: notes.append(mutated(dice, d)))
        part, note = notes[0]
        found = audited(path, part)
        kind = found["told"].partition(":")[0]
        assert kind in ("refused", "parsed", "loaded") and not found["seen"], (note, found)
        told[kind] += 1
        shutil.rmtree(path)
    print(told)  # noqa: T201 (pytest shows it with -s)
    assert told["refused"] > count / 3


def test_an_encoder_that_did_not_make_the_index_is_refused(tmp_path: Path, good: Path, home: Path):
    other = exported(home, tmp_path / "other", index="flat").directory

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

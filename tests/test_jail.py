"""Hostile files: one reason each, in bounded time and memory, and the next file is read."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from bombs import CLOSE, OPEN, docx_part, laughs, page, paragraph, pdf, repeated, squeezed
from rag2.kb import jail
from rag2.kb.jail import Limits
from rag2.kb.read import read
from rag2.registry import TABLES, UserError
from rag2.types import Document


def outcomes(folder: Path, limits: Limits | None = None) -> dict[str, str]:
    """By place: the text of a document after `ok `, or the reason."""
    return {
        place: f"ok {item.text}" if isinstance(item, Document) else item
        for place, item in read(folder, limits=limits)
    }


def test_a_bomb_is_one_rejected_item_and_takes_little_memory(tmp_path):
    bomb = repeated(b"BT (x) Tj ET " * 80_000, 100)
    docx_part(tmp_path / "a.docx", [OPEN, *[b" " * 2**20] * 65, CLOSE])
    (tmp_path / "b.docx").write_bytes((tmp_path / "a.docx").read_bytes()[:-100])
    pdf(tmp_path / "d.pdf", bomb)
    pdf(
        tmp_path / "e.pdf",
        zlib.compress(zlib.compress(bomb)),
        filters=b"[/FlateDecode /FlateDecode /FlateDecode]",
    )
    whole = pdf(tmp_path / "f.pdf", page("x")).read_bytes()
    (tmp_path / "f.pdf").write_bytes(whole.replace(b"/Kids [4 0 R]", b"/Kids [2 0 R]"))
    squeezed(tmp_path / "g.jsonl.gz", b"x" * 2**20, 17)
    table = pyarrow.table({"text": pyarrow.array(["x"] * 300_000).dictionary_encode()})
    parquet.write_table(table, tmp_path / "h.parquet")
    (tmp_path / "i.html").write_bytes(b"<p>" * (16 * 2**20 // 3 + 1))
    (tmp_path / "z.txt").write_text("still alive")
    found = outcomes(tmp_path, Limits(memory=3 * 2**27))  # needs no more than 384 MiB
    expected = {
        "a.docx": "bytes of XML; allowed",
        "b.docx": "no Word file",
        "d.pdf": "Limit reached",
        "e.pdf": "Limit reached",
        "f.pdf": "cyclic",
        "g.jsonl.gz:1": "a row of more than 16,777,216 characters",
        "h.parquet": "declares 300,000 rows",
        "i.html": "a document of more than",
        "z.txt": "ok still alive",
    }
    assert found.keys() == expected.keys()
    for place, part in expected.items():
        assert part in found[place], (place, found[place])


@pytest.mark.parametrize(
    ("parser", "places", "reason"),
    [
        ("endless", ["b.pdf:1", "b.pdf:2", "b.pdf"], "parsing took longer than 2 s, after 2 rows"),
        ("greedy", ["b.pdf"], "parsing needs more than 256 MiB of memory"),
        ("broken", ["b.pdf:1", "b.pdf"], "the parser crashed (SIGSEGV), after 1 rows"),
        ("ending", ["b.pdf"], "the parser crashed (status 3)"),
        ("lying", ["b.pdf"], "the parser says what is no row"),
        ("endless_frame", ["b.pdf"], "a row of more than 67,108,864 bytes"),
    ],
)
def test_a_parser_that_fails_costs_its_own_file_only(
    tmp_path, monkeypatch, parser: str, places: list[str], reason: str
):
    monkeypatch.setitem(TABLES["parser"], "pdf", f"failing_parsers:{parser}")
    monkeypatch.setitem(TABLES["parser"], "htm", "rag2.kb.plain:read_text")
    for name in ("a.htm", "b.pdf", "c.htm"):
        (tmp_path / name).write_text("good")
    found = outcomes(tmp_path, Limits(memory=2**28, seconds=2 if parser == "endless" else 60))
    assert list(found) == ["a.htm", *places, "c.htm"]
    assert found["a.htm"] == found["c.htm"] == "ok good"
    assert found["b.pdf"] == reason


def test_the_parent_checks_and_cleans_what_the_child_says(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES["parser"], "pdf", "failing_parsers:odd")
    monkeypatch.setitem(TABLES["parser"], "docx", "failing_parsers:talkative")
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "b.docx").write_text("printed  text\x00 ")
    items = list(read(tmp_path))
    assert [isinstance(item, Document) for _, item in items] == [False] * 8 + [True, True]
    assert all(isinstance(item, Document) or item for _, item in items)
    assert items[8][0] == "a\\x1b[31m\\nb"
    assert items[9][1] == Document("b.docx", "printed text")


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES["parser"], "pdf", "no_such_package:read")
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf needs .*no_such_package.*pip install .*ingest"):
        list(read(tmp_path))


def test_one_child_serves_many_files(tmp_path, monkeypatch):
    for number in range(60):
        (tmp_path / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}'))
    (tmp_path / "b.pdf").write_text("x")
    monkeypatch.setitem(TABLES["parser"], "pdf", "failing_parsers:ending")
    children: list[int] = []
    start = jail.Jail._start

    def counted(self: jail.Jail):
        child = start(self)
        children.append(child.pid)
        return child

    monkeypatch.setattr(jail.Jail, "_start", counted)
    monkeypatch.setattr(jail, "FILES", 25)
    assert len(outcomes(tmp_path)) == 61
    assert len(children) == 3  # of 25, 25 and 10 files; the file that ended the last came last


@pytest.mark.slow
def test_what_takes_for_ever_or_nests_too_deep_ends_at_the_limits(tmp_path):
    docx_part(tmp_path / "a.docx", [laughs()])
    deep = [b"<w:sdt><w:sdtContent>" * 100_000, b"</w:sdtContent></w:sdt>" * 100_000]
    docx_part(tmp_path / "b.docx", [OPEN, *deep, CLOSE])
    many = paragraph("x").encode() * 10_000
    docx_part(tmp_path / "c.docx", [OPEN, *[many] * 190, CLOSE])
    pdf(tmp_path / "d.pdf", repeated(b"BT /F1 12 Tf (x) Tj ET " * 100_000, 20))
    squeezed(tmp_path / "e.jsonl.gz", b"\n" * 10_000_000, 300)
    (tmp_path / "f.html").write_bytes(b"<div>" * 3_000_000 + b"deep")
    (tmp_path / "g.html").write_bytes(b"<p>x" * 4_000_000)
    (tmp_path / "h.html").write_bytes(b"<a " + b"x=1 " * 4_000_000 + b">t")
    (tmp_path / "i.html").write_bytes(b"<" * 16_000_000)
    found = outcomes(tmp_path, Limits(seconds=5))
    assert len(found) == 9
    for place, reason in found.items():
        limits = "amplification|maximum recursion|longer than 5 s|more than 1024 MiB"
        assert re.search(limits, reason), (place, reason)


@pytest.mark.slow
def test_no_child_outlives_its_parent_for_long(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    code = (
        "import sys; from rag2.kb.read import read; from rag2.kb.jail import Limits;"
        "from rag2.registry import TABLES;"
        "TABLES['parser']['pdf'] = 'failing_parsers:endless';"
        "items = read(sys.argv[1], limits=Limits(seconds=2));"
        "[print(next(items), flush=True) for _ in range(2)]; list(items)"
    )
    helpers = [f"import sys; sys.path[:0] = {sys.path!r}; {code}"]
    with subprocess.Popen(
        [sys.executable, "-c", *helpers, str(tmp_path)], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None and parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) == 1
        parent.kill()
    deadline = time.monotonic() + 10
    while running(children[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(children[0])


def running(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_what_lies_in_the_folder_that_is_read_is_never_run(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "wax"}\n'))
    monkeypatch.chdir(tmp_path)
    assert "ok wax" in outcomes(tmp_path).values() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("parser", ["endless", "silent"])
def test_a_child_whose_parent_is_gone_ends_by_itself(tmp_path, parser: str):
    request = {"parser": f"failing_parsers:{parser}", "path": str(tmp_path), "name": "a"}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "rag2.kb.jail", str(2**30), "0.1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as orphan:  # nobody reads what it says, or kills it
        assert orphan.stdin is not None
        orphan.stdin.write(json.dumps(request).encode() + b"\n")
        orphan.stdin.flush()
        try:
            assert orphan.wait(timeout=15) == -signal.SIGALRM
        finally:
            orphan.kill()

"""Names that cannot be, documents that are none, leftovers of killed writers: one clear line."""

import io
import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from bombs import squeezed
from lines import Lines
from rag2 import artifact, cli
from rag2.kb import ingest as ingestion
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.kb.ingest import ingest
from rag2.kb.store import KnowledgeBase
from rag2.kb.transfer import export
from rag2.registry import UserError
from rag2.types import Document
from texts import write_jsonl

WHOLE = TokenChunker()
BYTE = "\udcff"  # what Python makes of a byte of the command line that is not UTF-8


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    """With the same document in two namespaces."""
    path = tmp_path / "kb.sqlite"
    with KnowledgeBase(path, create=True) as kb:
        for space in ("", "acme"):
            kb.add([Document("ferry", "The ferry leaves.")], WHOLE, space)
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of error of a `rag2 kb` that ends with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["kb", *map(str, words)])
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "words",
    ["list", "show ferry", "search ferry", "remove ferry", "export OUT", "add IN", "update IN"],
)
def test_a_namespace_that_is_no_text_or_too_long_or_not_there_is_one_line(
    kb: Path, capsys: pytest.CaptureFixture[str], words: str, tmp_path: Path
):
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "new", "text": "new"}])
    places = {"OUT": tmp_path / "out.jsonl", "IN": source}
    command, *rest = [places.get(word, word) for word in words.split()]
    before = kb.read_bytes()

    def line(namespace: str) -> str:
        return refused(capsys, command, kb, *rest, "--namespace", namespace)

    assert "lone surrogate" in line(BYTE)
    told = line("x" * 100_000)
    assert "more than 2,000" in told if "IN" in words else "has no" in told
    if "IN" not in words:
        assert "acme" in line("acm")  # where it is instead, or the nearest
    assert kb.read_bytes() == before and not (tmp_path / "out.jsonl").exists()


def test_a_chunker_that_is_none_of_ours_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "kb.sqlite"
    with KnowledgeBase(path, create=True) as kb:
        kb.add([Document("a", "one")], Lines())
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "new"}])
    assert "somebody's own chunker" in refused(capsys, "add", path, source)


def test_an_id_that_is_no_text_is_one_line(kb: Path, capsys: pytest.CaptureFixture[str]):
    for command in ("show", "remove"):
        assert "id '\\udcff' holds a lone surrogate" in refused(capsys, command, kb, BYTE)


def test_what_is_no_document_or_no_text_changes_nothing(kb: Path):
    with KnowledgeBase(kb) as base:
        before = base.version, base.content_hash()
        for change in (base.put, base.add):
            with pytest.raises(TypeError, match="'x' is a str, not a Document"):
                change(["x"], WHOLE)  # pyright: ignore[reportArgumentType]
            for wrong in (Document(BYTE, "a"), Document("a", BYTE), Document("a", "b", BYTE)):
                with pytest.raises(UserError, match="surrogate"):
                    change([Document("good", "good"), wrong], WHOLE)
            with pytest.raises(UserError, match="surrogate"):
                change([Document("a", "b", metadata={"key": BYTE})], WHOLE)
            with pytest.raises(UserError, match="id .* has more than 2,000 characters"):
                change([Document("x" * 2001, "b")], WHOLE)
        assert (base.version, base.content_hash()) == before


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"id": None}, "id of document None is a NoneType, not a str"),
        ({"title": None}, "title of document 'a' is a NoneType, not a str"),
        ({"text": b"b"}, "text of document 'a' is a bytes, not a str"),
        ({"metadata": ["n"]}, "metadata of document 'a' is a list, not a dict"),
        ({"metadata": {"n": float("nan")}}, "metadata of document 'a' is no JSON: .*"),
        ({"metadata": {"n": 1, 2: 3}}, "metadata of document 'a' is no JSON: .*"),
        ({"metadata": {"n": object()}}, "metadata of document 'a' is no JSON: .*"),
    ],
)
def test_a_document_that_cannot_be_kept_changes_nothing(kb: Path, given: dict, told: str):
    with KnowledgeBase(kb) as base:
        before = base.version, base.content_hash()
        wrong = replace(Document("a", "b"), **given)
        for change in (base.put, base.add):
            with pytest.raises(UserError, match=f"^{told}$"):
                change([Document("good", "good"), wrong], WHOLE)
        assert (base.version, base.content_hash()) == before


def test_cells_that_are_not_separated_by_commas_are_told_so(tmp_path: Path, chunker: TokenChunker):
    for mark in (";", "\t", "|"):
        (tmp_path / "a.csv").write_text(f"id{mark}text\n1{mark}one\n")
        with pytest.raises(UserError, match="separated by commas, not by"):
            build(tmp_path / "kb", [tmp_path / "a.csv"], chunker)


# ----- rejects without bound ----------------------------------------------------------------------


def test_of_many_rejects_the_first_are_told_and_all_are_counted(
    tmp_path: Path, chunker: TokenChunker, capsys: pytest.CaptureFixture[str]
):
    rows = [{"id": str(n), "text": "good" if n % 100 == 0 else ""} for n in range(2500)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        summary = ingest(kb, [source], chunker, keep_duplicates=True)
    assert (summary.accepted, summary.rejected, summary.total) == (25, 2475, 2500)
    assert [r.place for r in summary.rejects][:2] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert len(summary.rejects) == ingestion.KEPT == 1000
    words = ["kb", "build", str(tmp_path / "b"), str(source), "--keep-duplicates"]
    with pytest.raises(SystemExit):
        cli.main(words)
    out, err = capsys.readouterr()
    assert "25 accepted + 2475 rejected = 2500 documents" in out
    assert len(err.splitlines()) == 1001 and "rejected 1475 more, which are not listed" in err


PEAK = """
import sys
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
summary = build(sys.argv[1], sys.argv[2:], TokenChunker(), keep_duplicates=True)
status = open("/proc/self/status").read()
print(summary.rejected, status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_a_million_rejects_of_a_small_archive_take_no_more_memory_than_a_thousand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "good"}])
    peaks = []
    for count in (1000, 1_000_000):
        bomb = squeezed(tmp_path / f"{count}.jsonl.gz", b"0\n" * 1000, count // 1000)
        words = [sys.executable, "-c", PEAK, str(tmp_path / f"kb{count}"), str(good), str(bomb)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        rejected, peak = map(int, done.stdout.split())
        assert rejected == count
        peaks.append(peak)
        print(count, bomb.stat().st_size, "bytes", peak, "KiB")  # noqa: T201 (for the docs)
    assert peaks[1] - peaks[0] < 16 * 2**10


# ----- leftovers ----------------------------------------------------------------------------------


def test_what_killed_writers_left_is_swept_by_the_next_and_what_is_being_written_is_not(
    kb: Path, tmp_path: Path, chunker: TokenChunker
):
    out = tmp_path / "out.jsonl"
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "good"}])
    dead = [tmp_path / ".out.jsonl.staging-dead", tmp_path / ".k.sqlite.staging-dead"]
    for folder in dead:
        folder.mkdir()
        (folder / "half").write_text("half")
    with artifact.staged(out) as theirs, artifact.staged(tmp_path / "k.sqlite") as other:
        theirs.write_text("theirs")
        other.write_text("other")
        assert not dead[0].exists() and not dead[1].exists()
        with closing(KnowledgeBase(kb)) as base:
            assert export(base, out) == 1
        build(tmp_path / "k.sqlite", [source], chunker)
        assert theirs.read_text() == "theirs" and other.read_text() == "other"
    assert not list(tmp_path.glob(".*"))


def test_a_killed_export_is_swept_by_the_next(kb: Path, tmp_path: Path):
    code = (
        "import os, signal, sys; from pathlib import Path; from rag2.kb import transfer;"
        "from rag2.kb.store import KnowledgeBase;"
        "transfer.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "transfer.export(KnowledgeBase(sys.argv[1]), Path(sys.argv[2]))"
    )
    out = tmp_path / "out" / "docs.jsonl"
    out.parent.mkdir()
    subprocess.run([sys.executable, "-c", code, str(kb), str(out)], check=False)
    assert list(out.parent.iterdir()) and not out.exists()
    with closing(KnowledgeBase(kb)) as base:
        export(base, out)
    assert list(out.parent.iterdir()) == [out]
    assert json.loads(io.StringIO(out.read_text()).readline())["id"] == "ferry"

"""Every row, however mutated, is accepted or rejected; the account catches planted faults."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rag2.kb import plain
from rag2.kb.chunk import TokenChunker
from rag2.kb.clean import clean
from rag2.kb.ingest import Summary, ingest
from rag2.kb.store import KnowledgeBase
from rag2.kb.table import Malformed

ROW = {"text": "caf\u00e9 \U0001f600 the ferry", "title": "T", "n": "1.5"}
SPICE = [
    b"\x00",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    b"\\ud800",
    b"\\u0000",
    b"{",
    b",",
    b"\\",
]


def mutated(dice: random.Random, data: bytes, spared: bytes) -> bytes:
    """Data with some bytes replaced, pieces put in, or cut short; without `spared` bytes."""
    line = bytearray(data)
    for _ in range(dice.choice([0, 0, 1, 1, 2, 3, 4])):
        if dice.random() < 0.2:
            place = dice.randrange(len(line) + 1)
            line[place:place] = dice.choice(SPICE)
        elif line:
            line[dice.randrange(len(line))] = dice.randrange(256)
        if dice.random() < 0.05:
            del line[dice.randrange(len(line) + 1) :]
    return bytes(byte for byte in line if byte not in spared)


def mutated_jsonl(folder: Path, dice: random.Random, rows: int) -> int:
    """Writes rows; returns how many are not blank, which is how many there are."""
    lines = [
        mutated(dice, json.dumps({"id": str(n), **ROW}, ensure_ascii=n % 2 > 0).encode(), b"\n")
        for n in range(rows)
    ]
    lines[0] = b'{"text": "first"}'  # no mark of another encoding
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return sum(bool(line.strip()) for line in lines)


def mutated_csv(folder: Path, dice: random.Random, rows: int) -> int:
    """Writes rows under a header, each on a line; returns how many there are."""
    whole = [f"{n},{','.join(ROW.values())}".encode() for n in range(rows)]
    lines = [mutated(dice, line, b'"\r\n') or b"," for line in whole]
    (folder / "rows.csv").write_bytes(b"\n".join([b"id,text,title,n", *lines]))
    return rows


def mutated_parquet(folder: Path, dice: random.Random, rows: int) -> int:
    """Writes rows whose strings are any bytes; returns how many there are."""
    columns: dict[str, list[bytes]] = {name: [] for name in ("id", *ROW)}
    for number in range(rows):
        values = {"id": str(number), **ROW}
        one = dice.choice(list(values))
        for name, value in values.items():
            data = value.encode()
            columns[name].append(mutated(dice, data, b"") if name == one else data)
    arrays = {
        name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string())
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(arrays), folder / "rows.parquet", row_group_size=1000)
    return rows


MUTATED = {"jsonl": mutated_jsonl, "csv": mutated_csv, "parquet": mutated_parquet}


def check_account(
    folder: Path, chunker: TokenChunker, make: Callable[[Path, random.Random, int], int], rows: int
) -> Summary:
    """Ingest so many mutated rows and hold the summary to them, and the documents to their form."""
    dice = random.Random(rows)
    total = make(folder, dice, rows)
    with KnowledgeBase(folder / "kb", create=True) as kb:
        sources = sorted(folder.glob("rows.*"))
        summary = ingest(kb, sources, chunker, keep_duplicates=True)
        assert summary.accepted + summary.rejected == summary.total == total
        places = [reject.place for reject in summary.rejects]
        assert len(set(places)) == len(places) and all(r.reason for r in summary.rejects)
        assert summary.added == summary.accepted == sum(1 for _ in kb.documents())
        for document in kb.documents():
            assert document.text.encode().decode() == document.text == clean(document.text)
            assert unicodedata.is_normalized("NFC", document.text) and "\x00" not in document.text
            json.dumps([document.id, document.title, document.metadata], allow_nan=False).encode()
        digest, version = kb.content_hash(), kb.version
        again = ingest(kb, sources, chunker, keep_duplicates=True)
        assert (kb.content_hash(), kb.version) == (digest, version)
        assert again.unchanged == summary.accepted and again.rejects == summary.rejects
    return summary


@pytest.fixture
def whole() -> TokenChunker:
    """Few chunks, cheaply."""
    return TokenChunker()


@pytest.mark.parametrize("format", MUTATED)
def test_every_mutated_row_is_accepted_or_rejected(tmp_path, whole, format: str):
    summary = check_account(tmp_path, whole, MUTATED[format], 1000)
    assert summary.accepted > 100 and summary.rejected > 100


@pytest.mark.slow
@pytest.mark.parametrize("format", MUTATED)
def test_every_one_of_1e5_mutated_rows_is_accepted_or_rejected(tmp_path, whole, format: str):
    summary = check_account(tmp_path, whole, MUTATED[format], 100_000)
    print(format, summary.accepted, summary.rejected)  # noqa: T201 (for docs/ingestion.md)


def drops_bad_rows(path: Path, name: str) -> Iterator[tuple[str, object]]:
    """A reader as they are written in a hurry."""
    return (row for row in plain.read_jsonl(path, name) if not isinstance(row[1], Malformed))


def misplaces_bad_rows(path: Path, name: str) -> Iterator[tuple[str, object]]:
    """A reader that counts rows from the last good one."""
    last = name
    for place, row in plain.read_jsonl(path, name):
        last = last if isinstance(row, Malformed) else place
        yield last, row


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("read.lookup", lambda table, name: drops_bad_rows),
        ("read.lookup", lambda table, name: misplaces_bad_rows),
        ("rows.clean", lambda text: text),
        ("ingest._batches", lambda inputs: ([one] for one in inputs if len(one.id) < 3)),
    ],
    ids=["dropped", "misplaced", "not cleaned", "lost between reader and store"],
)
def test_the_account_catches_a_planted_fault(tmp_path, whole, monkeypatch, place: str, fault):
    monkeypatch.setattr(f"rag2.kb.{place}", fault)
    with pytest.raises(AssertionError):
        check_account(tmp_path, whole, mutated_jsonl, 300)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "md", "html", "jsonl.gz"])
def test_a_line_of_1_gb_is_rejected_in_little_memory(tmp_path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl.gz":
        from bombs import squeezed

        squeezed(path, b"x" * 2**20, 1024)
    else:
        with path.open("wb") as file:
            file.write(b"text\n" if suffix == "csv" else b"")
            file.truncate(2**30)
    code = (
        "import sys; from rag2.kb.read import read;"
        "[print(item) for item in read(sys.argv[1])];"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    *items, peak = done.stdout.splitlines()
    assert len(items) == 1 and "of more than 16,777,216" in items[0]
    assert int(peak) < 128 * 2**10  # KiB

"""Ingestion accounts for every input, changes nothing the second time, and survives kills."""

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from rag2.kb import table
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.kb.duplicates import Near, _shingles, _sketch
from rag2.kb.ingest import Inputs, Reject, _batches, ingest
from rag2.kb.read import Item, read
from rag2.kb.store import KnowledgeBase
from rag2.kb.transfer import add_new
from rag2.registry import UserError
from rag2.types import Document
from texts import ODD, WORDS, write_jsonl

# ----- every row, however damaged ------------------------------------------------------------

BAD_JSON = [
    *('{"text"', '{"text":', '{"text": "a"', '{"text": "a",}', '{"text" "a"}', "{'text': 'a'}"),
    *('{text: "a"}', '{"text": "a"}}', '{"text": "a"} x', '{"text": "a"}{"text": "b"}'),
    *('{"text": "a" "id": 1}', '{,"text": "a"}', '{"text": "a",, "id": 1}', '{"text": "a"]'),
    *('{"text": "\t"}', '{"text": "\x01"}', '{"text": "\x00"}', '{"text": "\x1f"}'),
    *(r'{"text": "\x41"}', r'{"text": "\u12"}', r'{"text": "\u12G4"}', r'{"text": "\"}'),
    *(r'{"text": "\ud800"}', r'{"text": "\udc00\ud800"}', r'{"\ud800": 1, "text": "a"}'),
    *('{"text": "a", "n": 01}', '{"text": "a", "n": +1}', '{"text": "a", "n": .5}'),
    *('{"text": "a", "n": 1.}', '{"text": "a", "n": 1e}', '{"text": "a", "n": 0x1F}'),
    *('{"text": "a", "n": NaN}', '{"text": "a", "n": -Infinity}', '{"text": "a", "n": 1e999}'),
    *('{"text": "a", "n": nan}', '{"text": "a", "n": True}', '{"text": "a", "n": undefined}'),
    *('{"text": "a", "n": - 1}', '{"text": "a", "n": 1_000}', '{"text": "a", "n": \uff11}'),
    '{"text": "a", "n": ' + "9" * 5000 + "}",
    '{"text": "a", "text": "b"}',
    '{"text": "a", "m": {"k": 1, "k": 2}}',
    *(
        '/* c */ {"text": "a"}',
        '{"text": "a"} // c',
        '{"text": "a" # c\f}',
        '\ufeff\ufeff{"text": "a"}',
    ),
    *('[{"text": "a"}]', '"text"', "5", "null", "true", "[]", "{}", "[", "]", "{", "}", ":", ","),
    *('{"text": null}', '{"text": 5}', '{"text": ["a"]}', '{"text": {"a": 1}}', '{"text": true}'),
    *('{"text": ""}', '{"text": " \\n\\u200b"}', '{"text": "\\u0000"}', '{"Text": "a"}'),
    *('{"text": "a", "id": 1.5}', '{"text": "a", "id": []}', '{"text": "a", "title": 3}'),
    *('{"text": "a", "metadata": "x"}', '{"text": "a", "metadata": [1]}', "nul", "\u00a0", "\x1a"),
    *("[" * 100_000, '{"a":' * 50_000, '{"text": "a", "n": ' + "[" * 50_000 + "]" * 50_000 + "}"),
]
BAD_BYTES = [
    *(b'{"text": "\xff"}', b'{"text": "\xc0\xaf"}', b'{"text": "\xed\xa0\x80"}'),
    *(b'{"text": "\xf4\x90\x80\x80"}', b'{"text": "\xe2\x82"}', b'{"text": "\x80"}', b"\xfe\xff"),
    *(b'{"text": "a"}\x00', b"\x00", b'\xef\xbb{"text": "a"}', b'{"te\xfft": "a", "text": "a"}'),
]
GOOD_JSON = [
    *('{"text": "a"}', ' \t{"text": "a"}\r', '{"text": "\\u0061\\n\\/\\""}', '{"text": "\u2028a"}'),
    *(
        '{"text": "a\x7f"}',
        '{"text": "\\ud83d\\ude00"}',
        '{"text": "\\u0000a"}',
        '{"text":"\ufdd0a"}',
    ),
    *('{"text": "a", "n": [-0, 1e-9, 1E+2, {"": []}]}', '{"text": "a", "id": "", "title": null}'),
    *(
        '{"text": "a", "n": 123456789012345678901234567890}',
        '{"\u00e9": "\U0001f600", "text": "a"}',
    ),
    '{"text": "a", "n": ' + "[" * 400 + "]" * 400 + "}",
]


def test_malformed_json_gets_a_reason_each_and_good_json_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [*(text.encode("utf-8", "surrogatepass") for text in BAD_JSON), *BAD_BYTES]
    path.write_bytes(b"{}\n" + b"\n".join(lines))
    items = list(read(path))
    assert [place for place, _ in items] == [f"rows.jsonl:{n + 1}" for n in range(len(lines) + 1)]
    for line, (_, item) in zip([b"{}", *lines], items, strict=True):
        assert isinstance(item, str) and item and len(item) <= 503, (line[:80], item)
        assert item.isprintable()
    assert len({item for _, item in items}) > 30  # of its own, not one for all
    path.write_text("\n".join(GOOD_JSON), newline="")
    for line, (_, item) in zip(GOOD_JSON, read(path), strict=True):
        assert isinstance(item, Document), (line[:80], item)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_text_in_any_unicode_encoding_with_a_mark_is_read(tmp_path, encoding: str):
    row = {"id": "x", "text": "caf\u00e9 \u65e5\u672c \U0001f600 \u010a"}  # a byte 0a in a letter
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    mark = b"\x00\x00\xfe\xff" if encoding == "utf-32-be" else mark
    cells = io.StringIO()
    csv.writer(cells).writerows([["id", "text"], ["y", row["text"] + "\nline"], ["z", "end"]])
    contents = {
        "a.txt": row["text"],
        "b.md": f"# Title\n{row['text']}",
        "c.jsonl": "\n".join([json.dumps(row, ensure_ascii=False), '{"text": "two"}', "{", ""]),
        "d.csv": cells.getvalue(),
    }
    for name, text in contents.items():
        (tmp_path / name).write_bytes(mark + text.encode(encoding))
    items = dict(read(tmp_path))
    texts = {place: item.text for place, item in items.items() if isinstance(item, Document)}
    assert texts == {
        "a.txt": row["text"],
        "b.md": row["text"],
        "c.jsonl:1": row["text"],
        "c.jsonl:2": "two",
        "d.csv:2": row["text"] + "\nline",
        "d.csv:4": "end",
    }
    assert items.keys() - texts.keys() == {"c.jsonl:3"}


def test_what_is_in_no_unicode_encoding_has_a_reason(tmp_path):
    rows = '{"text": "one"}\n{"text": "two"}\n'
    for suffix in ("txt", "jsonl", "csv"):
        head = "text\n" if suffix == "csv" else ""
        (tmp_path / f"a.{suffix}").write_bytes((head + rows).encode("utf-16-le"))  # without a mark
        (tmp_path / f"b.{suffix}").write_bytes((head + rows).encode("utf-16")[:-1])
        (tmp_path / f"c.{suffix}").write_bytes(
            b"\xff\xfe" + head.encode("utf-16-le") + b"\x00\xd8" + rows.encode("utf-16-le")
        )
        (tmp_path / f"d.{suffix}").write_bytes(f"{head}caf\u00e9".encode("latin-1"))
    items = list(read(tmp_path))
    reasons = {place: item for place, item in items if isinstance(item, str)}
    assert reasons["a.txt"] == "looks like UTF-16 or UTF-32 without a byte order mark"
    assert reasons["a.txt"] == reasons["a.jsonl:1"] == reasons["a.csv:1"]
    assert "truncated data" in reasons["b.txt"] and "truncated data" in reasons["b.jsonl:2"]
    assert "truncated data" in reasons["b.csv:3"]
    assert all("lone surrogate" in reasons[f"c.{end}"] for end in ("txt", "jsonl:1", "csv:2"))
    assert all("invalid UTF-8" in reasons[f"d.{end}"] for end in ("txt", "jsonl:1", "csv:2"))
    assert sum(isinstance(item, Document) for _, item in items) == 4  # rows beside bad ones


def test_a_row_that_is_too_long_is_rejected_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "LIMIT", 1000)
    long = "x" * 5000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "1"}}\n{{"text": "{long}"}}\n{{"text": "3"}}')
    rows = f"text\n1\n{long}\n" + '"' + "cell\n" * 1000 + '"\n3\n'
    (tmp_path / "b.csv").write_text(rows)
    (tmp_path / "c.csv").write_text(f"text\r1\r{long}\r3\r")
    items = list(read(tmp_path))
    found = [(place, item.text if isinstance(item, Document) else item) for place, item in items]
    reason = "a row of more than 1,000 characters"
    assert found[:3] == [("a.jsonl:1", "1"), ("a.jsonl:2", reason), ("a.jsonl:3", "3")]
    assert found[3:5] == [("b.csv:2", "1"), ("b.csv:3", reason)]
    assert found[5:7] == [("b.csv:4", reason), ("b.csv:1005", "3")]
    assert found[-3:] == [("c.csv:2", "1"), ("c.csv:3", reason), ("c.csv:4", "3")]


# ----- duplicates ----------------------------------------------------------------------------


def test_exact_duplicates_are_rejected_with_the_place_of_the_first(tmp_path, chunker):
    rows = [
        {"id": "a", "text": "The ferry leaves."},
        {"id": "b", "text": " The  ferry\nleaves. "},
        {"id": "c", "title": "T", "text": "The ferry leaves."},
        {"id": "d", "text": "The ferry arrives."},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "copy.txt").write_text("cafe\u0301")
    (tmp_path / "copy2.txt").write_text("caf\u00e9\x00")
    summary = build(tmp_path / "kb", [tmp_path / "rows.jsonl", *tmp_path.glob("*.txt")], chunker)
    assert summary.rejects[0] == Reject("rows.jsonl:2", "exact duplicate of rows.jsonl:1")
    assert "exact duplicate of copy" in summary.rejects[1].reason
    assert (summary.accepted, summary.rejected) == (4, 2)
    kept = build(tmp_path / "kb2", [tmp_path / "rows.jsonl"], chunker, keep_duplicates=True)
    assert kept.accepted == 4


def test_near_duplicates_are_those_that_share_most_three_word_shingles(tmp_path, dice):
    estimates = []
    near = Near(0.8)
    for number in range(60):
        text = [f"{dice.choice(WORDS)}{dice.randrange(999)}" for _ in range(200)]
        rate = dice.choice([0.005, 0.02, 0.2])
        other = [f"x{number}" if dice.random() < rate else word for word in text]
        one, two = (set(_shingles(" ".join(words))) for words in (text, other))
        share = len(one & two) / len(one | two)
        assert not near.find(Document("a", " ".join(text)), f"place {number}")
        reason = near.find(Document("b", " ".join(other).upper()), "again")
        assert share < 0.92 or reason, share
        assert share > 0.68 or not reason, share
        if reason:
            assert reason.startswith(f"near duplicate of place {number} (")
            estimates.append(abs(float(reason.split("(")[1].split()[0]) - share))
    assert len(estimates) > 10 and sum(estimates) / len(estimates) < 0.05


def test_texts_that_share_less_than_was_asked_for_are_none_though_the_index_proposes_them(dice):
    near, proposed = Near(0.5), 0
    for number in range(100):
        words = [f"{dice.choice(WORDS)}{dice.randrange(999)}" for _ in range(400)]
        other = [f"x{number}" if n % 5 == 0 else word for n, word in enumerate(words)]
        one, two = (set(_shingles(" ".join(text))) for text in (words, other))
        assert len(one & two) / len(one | two) < 0.3  # more than four standard errors less
        assert not near.find(Document("a", " ".join(words)), "one")
        proposed += len(near._index.query(_sketch(" ".join(other)))) > 0
        assert not near.find(Document("b", " ".join(other)), "two")
    assert proposed


def test_near_duplicates_are_told_in_any_script_and_only_if_asked_for(tmp_path, chunker):
    text = "".join(chr(0x4E00 + n * 7) for n in range(300))
    rows = [{"text": text}, {"text": text[:150] + "\u3042" + text[150:]}, {"text": text[::-1]}]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert build(tmp_path / "a", [source], chunker).accepted == 3
    summary = build(tmp_path / "b", [source], chunker, near=0.9)
    (reject,) = summary.rejects
    assert reject.place == "rows.jsonl:2"
    assert reject.reason.startswith("near duplicate of rows.jsonl:1 (")
    for near in (0, -1, 1.01):
        with pytest.raises(UserError, match="near="):
            Inputs([source], near=near)


# ----- the same again, changes and kills -----------------------------------------------------


def contents(items: Iterator[Item]) -> dict[str, str]:
    return {item.id: item.text for _, item in items if isinstance(item, Document)}


def test_ingesting_adds_what_is_new_replaces_what_changed_and_keeps_the_rest(tmp_path, chunker):
    source = tmp_path / "rows.jsonl"
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        write_jsonl(source, [{"id": n, "text": f"{n} is here"} for n in range(5)])
        first = ingest(kb, [source], chunker)
        assert (first.added, first.updated, first.unchanged, first.chunks) == (5, 0, 0, 5)
        rows = [{"id": n, "text": f"{n} is {'there' if n == 2 else 'here'}"} for n in range(2, 7)]
        write_jsonl(source, [*rows, {"id": 9}])
        second = ingest(kb, [source], chunker)
        assert (second.added, second.updated, second.unchanged, second.total) == (2, 1, 2, 6)
        assert sorted(d.text for d in kb.documents())[:3] == [
            "0 is here",
            "1 is here",
            "2 is there",
        ]
        ingest(kb, [source], chunker, namespace="other")
        assert len(list(kb.documents("other"))) == 5 and len(list(kb.documents())) == 7 + 5
        write_jsonl(source, [{"id": 9}])
        with pytest.raises(UserError, match="no document was accepted"):
            ingest(kb, [source], chunker)


def test_the_same_again_is_the_same_also_where_a_duplicate_and_a_change_meet(tmp_path, chunker):
    # If the knowledge base were asked too, b would be a duplicate of a's old text and be lost.
    source = tmp_path / "rows.jsonl"
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        write_jsonl(source, [{"id": "a", "text": "noon"}])
        ingest(kb, [source], chunker)
        write_jsonl(source, [{"id": "b", "text": "noon"}, {"id": "a", "text": "midnight"}])
        ingest(kb, [source], chunker)
        digest = kb.content_hash()
        assert {d.id: d.text for d in kb.documents()} == {"a": "midnight", "b": "noon"}
        assert ingest(kb, [source], chunker).unchanged == 2 and kb.content_hash() == digest


@pytest.mark.parametrize("near", [None, 0.9])
def test_a_document_that_was_refused_takes_nobody_with_it(tmp_path, chunker, near):
    source = tmp_path / "rows.jsonl"
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        write_jsonl(source, [{"id": "a", "text": "old"}])
        add_new(kb, [source], chunker)
        write_jsonl(source, [{"id": id, "text": "brand new"} for id in "aabc"])
        summary = add_new(kb, [source], chunker, near=near)
        assert {d.id: d.text for d in kb.documents()} == {"a": "old", "b": "brand new"}
        assert (summary.accepted, summary.rejected) == (1, 3)
        reason = "document 'a' is there already; an update replaces it"
        assert [reject.reason for reject in summary.rejects[:2]] == [reason] * 2
        assert summary.rejects[2] == Reject("rows.jsonl:4", "exact duplicate of rows.jsonl:3")


@pytest.mark.parametrize("near", [None, 0.9])
def test_a_new_version_is_taken_though_its_text_is_anothers_too(tmp_path, chunker, near):
    source = tmp_path / "rows.jsonl"
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        write_jsonl(source, [{"id": "a", "text": "noon"}, {"id": "b", "text": "stale"}])
        ingest(kb, [source], chunker)
        write_jsonl(source, [{"id": id, "text": "noon"} for id in "abc"])
        summary = ingest(kb, [source], chunker, near=near)
        assert {d.id: d.text for d in kb.documents()} == {"a": "noon", "b": "noon"}
        assert summary.rejects == [Reject("rows.jsonl:3", "exact duplicate of rows.jsonl:1")]
        assert (summary.updated, summary.unchanged, summary.total) == (1, 1, 3)
        digest, again = kb.content_hash(), ingest(kb, [source], chunker, near=near)
        assert (again.unchanged, again.total) == (2, 3) and kb.content_hash() == digest


def source_of(folder: Path, dice: random.Random, documents: int) -> Path:
    """A folder of three formats with duplicates and bad rows among so many good ones."""
    folder.mkdir()
    texts = [" ".join(dice.choices([*WORDS, *ODD], k=30)) + f" {n}" for n in range(documents)]
    rows = [{"id": str(n), "text": text} for n, text in enumerate(texts[: documents // 2])]
    write_jsonl(folder / "a.jsonl", [*rows, {"text": ""}, {"text": texts[5]}, {"id": "7"}])
    (folder / "b.txt").write_text(texts[documents // 2])
    parquet.write_table(pyarrow.table({"text": texts[documents // 2 + 1 :]}), folder / "c.parquet")
    return folder


def check_kills(
    folder: Path, chunker: TokenChunker, dice: random.Random, kills: int, documents: int
) -> int:
    """Kill ingestions at random moments and complete them; returns how many were cut short."""
    source = source_of(folder / "source", dice, documents)
    with KnowledgeBase(folder / "clean", create=True) as kb:
        ingest(kb, [source], chunker)
        expected, ids = kb.content_hash(), {document.id for document in kb.documents()}
    code = (
        "import sys; from rag2.kb.ingest import ingest; from rag2.kb import ingest as module;"
        "from rag2.kb.chunk import TokenChunker; from rag2.kb.store import KnowledgeBase;"
        "module.DOCUMENTS = 20;"
        "kb = KnowledgeBase(sys.argv[1]); print('ready', flush=True);"
        "ingest(kb, [sys.argv[2]], TokenChunker.model_validate_json(sys.argv[3]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    cut = 0
    for number in range(kills):
        path = folder / f"kb{number}"
        KnowledgeBase(path, create=True).close()
        words = [sys.executable, "-c", code, path, source, chunker.model_dump_json()]
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            while path.stat().st_size < 2**16 and not path.with_name(f"{path.name}-wal").exists():
                time.sleep(0.001)
            time.sleep(dice.random() * 0.5)
            process.send_signal(signal.SIGKILL)
        with KnowledgeBase(path) as kb:
            there = {document.id for document in kb.documents()}
            assert there <= ids
            cut += 0 < len(there) < len(ids)
            summary = ingest(kb, [source], chunker)
            assert kb.content_hash() == expected
            assert (summary.unchanged, summary.updated) == (len(there), 0)
            assert ingest(kb, [source], chunker).added == 0 and kb.content_hash() == expected
    return cut


def test_a_killed_ingestion_is_completed_by_the_next_to_the_same_content(tmp_path, dice):
    check_kills(tmp_path, TokenChunker(), dice, kills=1, documents=300)


@pytest.mark.slow
def test_fifty_killed_ingestions_are_completed_to_the_same_content(tmp_path, dice):
    assert (
        check_kills(tmp_path, TokenChunker(), dice, kills=50, documents=1500) > 10
    )  # the kills came in the middle


def test_long_documents_are_committed_after_so_many_characters():
    texts = ["x" * (2**18 + n) for n in range(40)]
    batches = [
        [len(document.text) for document in batch]
        for batch in _batches(Document(str(n), text) for n, text in enumerate(texts))
    ]
    assert sum(batches, []) == [*map(len, texts)] and len(batches) == 3
    for batch in batches[:-1]:
        assert 2**22 <= sum(batch) + 3 * len(batch) < 2**22 + 2**19

"""Files in, cleaned documents out: nothing is lost in silence."""

import errno
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from rag2.kb import rows
from rag2.kb.clean import clean, is_blank
from rag2.kb.read import Item, read
from rag2.kb.table import Malformed
from rag2.registry import UserError
from rag2.types import Document
from texts import random_text


def read_all(items: Iterable[Item]) -> dict[str, Any]:
    return dict(items)


def reasons(items: Iterable[Item]) -> list[str]:
    return [item for _, item in items if isinstance(item, str)]


# ----- cleaning ------------------------------------------------------------------------------


def test_cleaning_keeps_what_is_visible_and_is_stable(dice):
    for _ in range(300):
        raw = random_text(dice, 30) + dice.choice(["", "\x00", "\r\n", "\u2028", "\ufeff", "\x85"])
        cleaned = clean(raw)
        assert clean(cleaned) == cleaned
        assert unicodedata.is_normalized("NFC", cleaned) and cleaned == cleaned.strip()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\ufeff]|\n\n\n| \n", cleaned)
        dropped = "[\x00-\x08\x7f-\x9f\ufeff]"
        seen_raw, seen = ("".join(re.sub(dropped, "", text).split()) for text in (raw, cleaned))
        assert unicodedata.normalize("NFC", seen) == unicodedata.normalize("NFC", seen_raw)


def test_cleaning_keeps_paragraphs_and_indentation():
    assert clean(" \r\n a  b\t \r\n\r\n\r\n\r\n  - c\x00d\u00a0 e \n") == "a b\n\n  - cd e"


def test_text_of_spaces_and_format_characters_is_blank():
    assert is_blank("\u200b \u00a0\n\u3000\u200d") and not is_blank("\u200b.")


# ----- reading -------------------------------------------------------------------------------


def test_jsonl_rows_become_documents_or_a_reason_each_with_its_line(tmp_path):
    good = {"id": 7, "title": " A\nB ", "text": "x\r\ny", "url": "u", "metadata": {"k": [1, None]}}
    lines = [
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b"",
        b'{"text": "no id", "title": null}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "half an emoji \\ud83d"}',
        b'{"text": "whole emoji \\ud83d\\ude00"}',
        b'{"text": "meta", "metadata": {"\\udc00": 1}}',
        b'{"text": 5}',
        b'{"text": "t", "id": true}',
        b'{"text": "t", "metadata": []}',
        b'{"text": "t", "metadata": {"x": NaN}}',
        b'{"txet": "typo"}',
        b'{"text": " \\u0000 \\u200b"}',
        b'["text"]',
        b'{"text": "cut',
        b"[" * 100_000,
        b"9" * 5000,
    ]
    path = tmp_path / "sub/rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join(lines))
    items = read_all(read(tmp_path))
    assert [int(place.removeprefix("sub/rows.jsonl:")) for place in items] == [1, *range(3, 18)]
    documents = {place[15:]: item for place, item in items.items() if isinstance(item, Document)}
    assert documents.keys() == {"1", "3", "6"}
    assert documents["1"] == Document("7", "x\ny", "A B", {"url": "u", "k": [1, None]})
    assert documents["3"] == Document("sub/rows.jsonl:3", "no id")
    assert documents["6"].text == "whole emoji \U0001f600"
    assert "byte 14" in items["sub/rows.jsonl:4"]
    assert "surrogate" in items["sub/rows.jsonl:5"] and "surrogate" in items["sub/rows.jsonl:7"]
    assert "Did you mean 'txet'" in items["sub/rows.jsonl:12"]
    assert items["sub/rows.jsonl:13"] == "no text"


def test_csv_rows_have_a_header_and_the_other_columns_are_metadata(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text,title,year\na,"two\nlines, one cell",T,1999\n\n,no id,,\n'
        b"b,too,many,cells,here\nc,bad \xff byte,,\nd,,empty,\ne,"
        + b"x"
        * 200_000
        + b',,\n"f"g,h\n'
        b"i,last,,"
    )
    items = read_all(read(path))
    assert items["rows.csv:2"] == Document("a", "two\nlines, one cell", "T", {"year": "1999"})
    assert items["rows.csv:5"] == Document("rows.csv:5", "no id")
    assert "5 cells under a header of 4" in items["rows.csv:6"]
    assert "surrogate" in items["rows.csv:7"] and "no 'text'" in items["rows.csv:8"]
    assert len(items["rows.csv:9"].text) == 200_000  # the csv module's own limit is lower
    assert "malformed CSV" in items["rows.csv:10"] and items["rows.csv:11"].id == "i"
    assert len(items) == 8
    for header in ["id,txt\na,b", "text,text\na,b"]:
        path.write_text(header)
        assert len(reasons(read(path))) == 1


def test_a_text_file_is_one_document_and_a_markdown_heading_its_title(tmp_path):
    path = tmp_path / "note.md"
    path.write_text("\n# The *ferry* #\r\n\r\nIt leaves.\n# Not the title\n")
    expected = Document("note.md", "It leaves.\n# Not the title", "The *ferry*")
    assert list(read(path)) == [("note.md", expected)]
    path.write_text("# Only a heading\n")
    assert next(read(path))[1] == Document("note.md", "# Only a heading")
    path.write_bytes(b"caf\xe9")
    assert reasons(read(path)) == ["invalid UTF-8 or a lone surrogate"]


def test_everything_in_a_folder_is_read_or_has_a_reason(tmp_path):
    for name in ("b/a.TXT", "b.md", "image.png", ".hidden", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for ever
    items = list(read(tmp_path))
    assert [place for place, _ in items] == ["b/a.TXT", "b.md", "gone.txt", "image.png", "pipe.txt"]
    assert [item.id for _, item in items if isinstance(item, Document)] == ["b/a.TXT", "b.md"]
    assert "'.png'; allowed: .txt, .md" in reasons(items)[1]
    for source in ("image.png", "missing.txt"):
        with pytest.raises(UserError, match=source):
            list(read(tmp_path / source))


def test_what_may_not_be_read_has_a_reason_and_the_rest_is_read(tmp_path, monkeypatch):
    for name in ("a.txt", "closed.txt", "folder/b.txt", "listed/c.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    closed = {str(tmp_path / name) for name in ("closed.txt", "folder", "listed/c.txt")}

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(path) in closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *args, **options)

        return call

    for name in ("stat", "scandir", "listdir"):  # root may do everything
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    found = dict(read(tmp_path))
    assert [place for place, item in found.items() if isinstance(item, Document)] == [
        "a.txt",
        "z.txt",
    ]
    denied = "cannot be read: Permission denied"
    assert reasons(found.items()) == [denied] * 3 and len(found) == 5
    with pytest.raises(UserError, match=f"closed.txt': {denied}"):
        list(read(tmp_path / "closed.txt"))


def test_rows_without_an_id_under_a_long_path_have_one_each(tmp_path):
    deep = tmp_path / "/".join("d" * 200 for _ in range(3))
    deeper = deep / "/".join("e" * 200 for _ in range(8))
    for folder in (deep, deeper):
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    items = list(read(tmp_path))
    ids = [item.id for _, item in items if isinstance(item, Document)]
    assert ids == [f"{deep.relative_to(tmp_path)}/rows.jsonl:{row}" for row in (1, 2)]
    assert reasons(items) == ["'id' has more than 2,000 characters"] * 2
    assert all(len(place) <= 503 for place, _ in items)


def test_a_text_that_is_too_long_has_a_reason_whoever_read_it(monkeypatch):
    monkeypatch.setattr(rows, "LIMIT", 1000)
    assert rows.document("a", {"text": "x" * 1000}).id == "a"
    with pytest.raises(Malformed, match="^a text of more than 1,000 characters$"):
        rows.document("a", {"text": "x" * 1001})


def test_an_id_that_grows_as_it_is_cleaned_is_not_too_long_for_the_others(tmp_path):
    grown = {"id": "\U0001d160" * 1000, "text": "one"}  # a note, three characters in NFC
    (tmp_path / "a.jsonl").write_text(json.dumps(grown) + '\n{"text": "two"}\n')
    items = list(read(tmp_path))
    assert reasons(items) == ["'id' has more than 2,000 characters"]
    assert isinstance(items[1][1], Document)


def test_every_mutated_row_is_accounted_for(tmp_path, dice):
    row = json.dumps({"id": "a", "text": "caf\u00e9 \U0001f600", "metadata": {"n": 1.5}}).encode()
    lines = []
    for _ in range(3000):
        line = bytearray(row)
        for _ in range(dice.randrange(4)):
            line[dice.randrange(len(line))] = dice.randrange(256)
        lines.append(bytes(line).replace(b"\n", b" "))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = list(read(path))
    assert [place for place, _ in items] == [f"rows.jsonl:{n}" for n in range(1, 3001)]
    assert 100 < len(reasons(items)) < 2900
    for _, item in items:
        if isinstance(item, Document):
            assert json.dumps([item.id, item.text, item.title, item.metadata]).encode()
            assert item.text.encode() and clean(item.text) == item.text


def test_what_would_take_for_ever_or_swell_has_a_reason(tmp_path):
    (tmp_path / "a.md").write_text("# " + "#" * 200_000 + "x\n\nbody")
    (tmp_path / "b.md").write_text("# Title ##\n\nbody")
    marks = "a" + "\u0300" * 20_000 + "\u0316" * 20_000
    (tmp_path / "c.txt").write_text(marks)
    (tmp_path / "d.md").write_text(f"# {marks}\nbody")
    (tmp_path / "e.jsonl").write_text(json.dumps({"title": "t" * 2_001, "text": "x"}) + "\n")
    parted = "a" + ("\u0301" * 31 + "\u0316" * 31 + "\x00\ufeff") * 2
    (tmp_path / "f.txt").write_text(parted)
    (tmp_path / "g.md").write_text(f"# {parted}\nbody")
    few = "a" + ("\u0301" * 31 + "\u0316" * 31 + "\x85") * 2  # a line break parts them for good
    (tmp_path / "h.txt").write_text(few)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    found = dict(read(tmp_path))
    assert "more than 2,000 characters" in str(found["a.md"])
    assert found["b.md"] == Document("b.md", "body", "Title")
    assert all("combining marks" in str(found[name]) for name in ("c.txt", "d.md"))
    assert all("combining marks" in str(found[name]) for name in ("f.txt", "g.md"))
    assert isinstance(found["h.txt"], Document)
    assert found["e.jsonl:1"] == "'title' has more than 2,000 characters"
    assert found["link"] == "a link to a folder, which is not followed"

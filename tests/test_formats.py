"""Every format: the text that a reader of it sees, with its title, and nothing else."""

import datetime
import decimal
import gzip
import json
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from bombs import docx, page, paragraph, pdf
from rag2.kb.build import build
from rag2.kb.clean import clean
from rag2.kb.read import read
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Document
from texts import random_text

PAGE = """<html><head><title>Rye &amp; bread</title><style>p {color: red}</style></head><body>
<nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<article><h1>Rye bread</h1><p>The ferry leaves at <b>noon</b>.</p><script>alert(1)</script>
<table><tr><th>day</th><th>price</th></tr><tr><td>Monday</td><td>2&nbsp;&euro;</td></tr></table>
<p>Caf\u00e9 is open.</p></article>
<footer>Copyright 2020, all rights reserved</footer></body></html>"""


def document(source) -> Document:
    """The one document of a source."""
    ((_, item),) = read(source)
    assert isinstance(item, Document), item
    return item


def reasons(*sources) -> list[str]:
    return [item for _, item in read(*sources) if isinstance(item, str)]


def test_a_page_gives_its_main_text_without_menus_markup_and_scripts(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    found = document(path)
    assert (found.id, found.title) == ("page.html", "Rye & bread")
    assert "The ferry leaves at noon." in found.text and "Caf\u00e9 is open." in found.text
    assert "Monday | 2 \u20ac" in found.text
    for gone in ("Home", "About us", "Copyright", "alert", "color", "<"):
        assert gone not in found.text


def test_a_page_of_a_few_words_gives_all_that_it_shows(tmp_path):
    (tmp_path / "a.htm").write_text(
        "<title>T</title><p>The</p><p>short<br>one</p><script>x</script>"
    )
    (tmp_path / "b.htm").write_text("<html><script>x</script></html>")
    (_, item), (_, reason) = read(tmp_path)
    assert isinstance(item, Document) and item.text.split() == ["The", "short", "one"]
    assert reason == "no text"


def test_a_page_is_decoded_as_it_says_or_rejected(tmp_path):
    for encoding in ("latin-1", "windows-1252", "utf-8", "utf-16", "shift_jis"):
        word = "\u65e5\u672c" if encoding == "shift_jis" else "caf\u00e9"
        page = f'<meta charset="{encoding}"><p>It says {word}.</p>'
        (tmp_path / f"{encoding}.html").write_bytes(page.encode(encoding))
    bad = {
        "none": "invalid UTF-8",
        "utf-8": "is not in utf-8, which it says",
        "klingon": "is not in klingon",
        "base64": "is not in base64",
    }
    for declared in bad:
        mark = b"" if declared == "none" else f'<meta charset="{declared}">'.encode()
        (tmp_path / f"x-{declared}.html").write_bytes(mark + b"<p>caf\xe9 and a few words</p>")
    for place, item in read(tmp_path):
        if place.startswith("x-"):
            assert bad[place[2:-5]] in str(item) and isinstance(item, str)
        else:
            assert isinstance(item, Document), (place, item)
            assert item.text in ("It says caf\u00e9.", "It says \u65e5\u672c.")


def test_a_pdf_gives_the_text_of_its_pages_and_its_title(tmp_path):
    path = pdf(
        tmp_path / "a.pdf", page("The ferry", "leaves."), page("Rye"), info=b"/Title (Ports)"
    )
    found = document(path)
    assert (found.id, found.title) == ("a.pdf", "Ports")
    assert [part.split() for part in found.text.split("\n\n")] == [
        ["The", "ferry", "leaves."],
        ["Rye"],
    ]
    empty = pdf(tmp_path / "b.pdf", page())
    path.write_bytes(b"no pdf at all")
    without, broken = reasons(empty, path)
    assert without == "no text in 1 pages; pictures of text are not read"
    assert "cannot be parsed" in broken


def test_a_word_file_gives_paragraphs_tables_and_insertions_but_no_deletions(tmp_path):
    cells = "".join(f"<w:tc>{paragraph(text)}</w:tc>" for text in ("day", "price"))
    body = (
        paragraph("Bread", "Heading1")
        + '<w:p><w:r><w:t xml:space="preserve">One </w:t></w:r>'
        + '<w:ins w:id="1"><w:r><w:t>new</w:t></w:r></w:ins>'
        + '<w:del w:id="2"><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>'
        + f"<w:tbl><w:tr>{cells}</w:tr><w:tr>{cells}</w:tr></w:tbl>"
        + f"<w:sdt><w:sdtContent>{paragraph('1 < 2 & so on')}</w:sdtContent></w:sdt>"
    )
    docx(tmp_path / "a.docx", body)
    docx(tmp_path / "b.docx", paragraph("Alone", "Heading1"))
    docx(tmp_path / "c.docx", "<w:p/>")
    text = "One new\n\nday | price\nday | price\n\n1 < 2 & so on"
    assert [item for _, item in read(tmp_path)] == [
        Document("a.docx", text, "Bread"),
        Document("b.docx", "Alone"),
        "no text",
    ]


def test_a_row_of_parquet_is_as_one_of_jsonl(tmp_path):
    rows = {
        "id": [7, 8, 9],
        "text": ["one", None, "three"],
        "score": [1.5, 2.5, float("nan")],
        "day": [datetime.date(2020, 2, 29)] * 3,
        "at": pyarrow.array([1_600_000_000_000_000_001] * 3, pyarrow.timestamp("ns")),
        "price": [decimal.Decimal("1.10")] * 3,
        "metadata": [{"tags": ["a", "b"]}] * 3,
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    first, second, third = (item for _, item in read(tmp_path / "t.parquet"))
    assert isinstance(first, Document) and isinstance(third, Document)
    assert (first.id, first.text) == ("7", "one") and second == "no 'text'."
    stamp = "2020-09-13T12:26:40.000000001"
    known = {"day": "2020-02-29", "at": stamp, "price": "1.10", "tags": ["a", "b"]}
    assert first.metadata == {"score": 1.5, **known} and third.metadata == known
    cases = [
        ({"txt": ["x"]}, "no column 'text' among txt. Did you mean 'txt'?"),
        ({"text": ["x"], "image": [b"\x89PNG"]}, "'image' holds bytes, which metadata cannot"),
        ({"text": ["x"], "n": [float("inf")]}, "'n' holds float, which metadata cannot"),
        ({"text": [5]}, "'text' is a int, not a str"),
    ]
    paths = [tmp_path / f"{n}.parquet" for n in range(4)]
    for path, (table, _) in zip(paths, cases, strict=True):
        parquet.write_table(pyarrow.table(table), path)
    assert reasons(*paths) == [reason for _, reason in cases]


def test_a_parquet_file_with_a_spoiled_part_accounts_for_every_row(tmp_path, dice):
    path = tmp_path / "t.parquet"
    texts = [f"row {n} {dice.random()}" for n in range(400)]
    table = pyarrow.table({"id": range(400), "text": texts})
    parquet.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = parquet.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[place + 40 : place + 400] = bytes(360)
    path.write_bytes(bytes(data))
    items = list(read(path))
    assert [place for place, _ in items] == [f"t.parquet:{n}" for n in range(1, 401)]
    lost = [n for n, (_, item) in enumerate(items) if isinstance(item, str)]
    assert lost == list(range(100, 200)) and "row group 2 cannot be read" in str(items[100][1])


def test_a_saved_data_set_is_read_by_name_and_split(tmp_path):
    parts: Any = {
        "train": datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]}),
        "test": datasets.Dataset.from_dict({"id": ["t"], "text": ["three"]}),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    parts["train"].select([1]).save_to_disk(tmp_path / "single")
    name = f"hf:{tmp_path}/set"
    items = list(read(name, f"{name}:test", f"hf:{tmp_path}/single", f"{name}:dev"))
    assert [item.text for _, item in items if isinstance(item, Document)] == [
        *("one", "two", "three"),
        *("three", "two"),
    ]
    assert items[1][0].endswith("set[train]:2") and items[1][1] == Document(
        items[1][0], "two", "", {"n": 2}
    )
    assert "no split 'dev'; there are train, test" in str(items[-1][1])


def test_compressed_jsonl_is_as_jsonl(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": 2}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 9)[:-9])
    (tmp_path / "c.txt.gz").write_bytes(b"x")
    items = list(read(tmp_path))
    assert items[0] == ("a.jsonl.gz:1", Document("a.jsonl.gz:1", "one"))
    assert items[1] == ("a.jsonl.gz:3", "'text' is a int, not a str")
    assert items[-2][0] == "b.jsonl.gz" and "cannot be parsed" in str(items[-2][1])
    assert "unknown file type '.txt.gz'" in str(items[-1][1])


def test_chunks_are_the_stated_characters_of_the_document_in_every_format(tmp_path, dice, chunker):
    folder = tmp_path / "docs"
    folder.mkdir()
    texts = [clean(random_text(dice, 60)).replace("<", "") + f" end {n}" for n in range(9)]
    xml = [
        "".join(c if c.isprintable() or c in "\n\u200b" else " " for c in text) for text in texts
    ]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.md").write_text(f"# T\n\n{texts[1]}")
    (folder / "c.jsonl").write_text(json.dumps({"text": texts[2]}))
    (folder / "d.csv").write_text('text\n"{}"\n'.format(texts[3].replace('"', "")))
    (folder / "e.html").write_text(f"<title>T</title><p>{texts[4].replace('&', '')}</p>")
    docx(folder / "f.docx", "".join(map(paragraph, xml[5].split("\n"))))
    pdf(folder / "g.pdf", page(*["The ferry leaves at noon (1)".replace("(1)", "")] * 9))
    parquet.write_table(pyarrow.table({"text": [texts[7]]}), folder / "h.parquet")
    (folder / "i.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": texts[8]}).encode()))
    assert build(tmp_path / "kb", [folder], chunker).accepted == 9
    with KnowledgeBase(tmp_path / "kb") as kb:
        stored = {document.id: document.text for document in kb.documents()}
        chunks = kb.chunks()
        assert {chunk.document for chunk in chunks} == stored.keys()
        for chunk in chunks:
            assert chunk.text == stored[chunk.document][chunk.start : chunk.end] != ""
        for text in stored.values():
            assert clean(text) == text and text.encode().decode() == text
        for number in (0, 2, 7, 8):
            assert texts[number] in stored.values()


def test_a_source_that_is_missing_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"missing\.pdf' does not exist"):
        next(read(tmp_path / "a.txt", tmp_path / "missing.pdf"))

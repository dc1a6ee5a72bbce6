"""Files -> documents: one reader per suffix; what is no document keeps its place and a reason.

A reader takes a path and the name to call it by, and yields one `Item` per document.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag2.kb.clean import clean, clean_line, is_blank
from rag2.kb.table import Malformed, csv_rows
from rag2.registry import TABLES, UserError, lookup, nearest
from rag2.types import Document

FIELDS = ("id", "title", "text", "metadata")
HEADING = re.compile(r"#[ \t]+(.*?)[ \t#]*(?:\n|$)")


# Where (`file.jsonl:17`, or a file's name), and the document or why there is none.
Item = tuple[str, Document | str]


def read(source: Path) -> Iterator[Item]:
    """Every document of a file, or of a folder and its subfolders.

    Files of a folder come in the order of their relative paths; hidden ones are skipped, those of
    an unknown type give a reason. Raises UserError if `source` is missing or of unknown type.
    """
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source)
            if not path.is_dir() and not any(part.startswith(".") for part in name.parts):
                yield from _read_file(path, name.as_posix())
    elif not source.exists():
        raise UserError(f"source {str(source)!r} does not exist")
    else:
        if reason := _unreadable(source):
            raise UserError(f"source {str(source)!r}: {reason}")
        yield from _read_file(source, source.name)


def read_text(path: Path, name: str = "") -> Iterator[Item]:
    """The one document of a plain text file; its id is `name`, by default the file's name."""
    name = name or path.name
    yield name, _document(name, {"id": name, "text": _decode(path.read_bytes())})


def read_markdown(path: Path, name: str = "") -> Iterator[Item]:
    """The one document of a Markdown file; a level-one heading at its top becomes the title."""
    name = name or path.name
    text = clean(_decode(path.read_bytes()))
    heading = HEADING.match(text)
    if heading and not is_blank(text[heading.end() :]):
        row = {"id": name, "title": heading[1], "text": text[heading.end() :]}
    else:
        row = {"id": name, "text": text}
    yield name, _document(name, row)


def read_jsonl(path: Path, name: str = "") -> Iterator[Item]:
    """One document per line: {"id"?, "title"?, "text", "metadata"?}; other keys join the metadata.

    A row without id is called `<name>:<line>`. Blank lines are no rows.
    """
    name = name or path.name
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                row = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
            except UnicodeDecodeError as error:
                yield place, f"invalid UTF-8 at byte {error.start} of the line"
            except json.JSONDecodeError as error:
                yield place, f"malformed JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:  # NaN, giant numbers, deep nesting
                yield place, f"malformed JSON: {error}"
            else:
                yield place, _document(place, row)


def read_csv(path: Path, name: str = "") -> Iterator[Item]:
    """One document per row under a header with `text`; id and title if there, the rest is metadata.

    A row without id is called `<name>:<line>`, the line it starts on.
    """
    name = name or path.name
    header: list[str] | None = None
    for place, cells in csv_rows(path, name):
        if isinstance(cells, Malformed):
            yield place, str(cells)
            if header is None:
                return
        elif header is None:
            header = [cell.strip() for cell in cells]
            if reason := _bad_header(header):
                yield place, reason
                return
        elif len(cells) != len(header):
            yield place, f"{len(cells)} cells under a header of {len(header)}"
        else:
            row = {key: cell for key, cell in zip(header, cells, strict=True) if cell}
            own = {key: row.pop(key) for key in FIELDS[:3] if key in row}
            yield place, _document(place, {**own, "metadata": row})


def _read_file(path: Path, name: str) -> Iterator[Item]:
    """Every document of one file; a file that cannot be read is one item with the reason."""
    if reason := _unreadable(path):
        yield name, reason
        return
    try:
        yield from lookup("reader", _suffix(path))(path, name)
    except OSError as error:
        yield name, f"cannot be read: {error.strerror}"


def _unreadable(path: Path) -> str:
    """Why no reader takes this path, or nothing."""
    if not path.is_file():
        return "not a regular file"
    if _suffix(path) in TABLES["reader"]:
        return ""
    allowed = ", ".join(f".{suffix}" for suffix in TABLES["reader"])
    return f"unknown file type {path.suffix!r}; allowed: {allowed}"


def _suffix(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()


def _decode(data: bytes) -> str:
    """UTF-8 text; each invalid byte becomes a lone surrogate, which `_document` refuses."""
    return data.decode("utf-8-sig", errors="surrogateescape")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _bad_header(header: list[str]) -> str:
    """Why a CSV header is of no use, or nothing."""
    if "text" not in header:
        return f"no column 'text' among {', '.join(header)}.{nearest('text', header)}"
    twice = [column for column in header if header.count(column) > 1]
    return f"column {twice[0]!r} appears twice" if twice else ""


def _document(place: str, row: Any) -> Document | str:
    """The cleaned document of one row, or why it is none."""
    if not isinstance(row, dict):
        return f"expected an object, got {type(row).__name__}"
    row = {key: value for key, value in row.items() if value is not None}
    if "text" not in row:
        return f"no 'text'.{nearest('text', row)}"
    expected = {"id": (str, int), "title": (str,), "text": (str,), "metadata": (dict,)}
    for key, types in expected.items():
        if key in row and (not isinstance(row[key], types) or isinstance(row[key], bool)):
            return f"{key!r} is a {type(row[key]).__name__}, not a {types[0].__name__}"
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "invalid UTF-8 or a lone surrogate"
    text = clean(row["text"])
    if is_blank(text):
        return "no text"
    others = {key: value for key, value in row.items() if key not in FIELDS}
    return Document(
        id=clean_line(str(row.get("id", ""))) or place,
        text=text,
        title=clean_line(row.get("title", "")),
        metadata={**others, **row.get("metadata", {})},
    )

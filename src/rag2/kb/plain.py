"""Text, Markdown, JSONL and CSV -> rows; parsed in this process, in bounded memory."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from rag2.kb.clean import clean, is_blank, is_overmarked
from rag2.kb.rows import FIELDS, Row
from rag2.kb.table import LIMIT, Malformed, csv_rows, decode, lines
from rag2.registry import nearest

HEADING = re.compile(r"#[ \t]+(.*)(?:\n|$)")
SURROGATE = re.compile("[\ud800-\udfff]")  # also what a byte that is not UTF-8 has become


def read_text(path: Path, name: str) -> Iterator[Row]:
    """The one document of a plain text file; its id is `name`."""
    yield name, {"id": name, "text": decode(file_bytes(path))}


def read_markdown(path: Path, name: str) -> Iterator[Row]:
    """The one document of a Markdown file; a level-one heading at its top becomes the title."""
    raw = decode(file_bytes(path))
    if is_overmarked(raw):  # told by `rows.document`
        yield name, {"id": name, "text": raw}
        return
    text = clean(raw)
    heading = HEADING.match(text)
    if heading and not is_blank(text[heading.end() :]):
        title = heading[1].rstrip(" \t#")
        yield name, {"id": name, "title": title, "text": text[heading.end() :]}
    else:
        yield name, {"id": name, "text": text}


def read_jsonl(path: Path, name: str) -> Iterator[Row]:
    """One document per line: {"id"?, "title"?, "text", "metadata"?}; other keys join the metadata.

    A row without id is called `<name>:<line>`. Blank lines are no rows.
    """
    return json_rows(path.open("rb", buffering=0), name)


def json_rows(file: IO[bytes] | io.BufferedIOBase, name: str) -> Iterator[Row]:
    """As `read_jsonl`, of an open file, which it closes."""
    for number, line in enumerate(lines(file), 1):
        if isinstance(line, Malformed):
            yield f"{name}:{number}", line
        elif line.strip(" \t\r\n\v\f"):
            yield f"{name}:{number}", _json(line)


def read_csv(path: Path, name: str) -> Iterator[Row]:
    """One document per row under a header with `text`; id and title if there, the rest is metadata.

    A row without id is called `<name>:<line>`, the line it starts on.
    """
    header: list[str] | None = None
    for place, cells in csv_rows(path, name):
        if isinstance(cells, Malformed):
            yield place, cells
            if header is None:
                return
        elif header is None:
            header = [cell.strip() for cell in cells]
            if reason := bad_header(header):
                yield place, Malformed(reason)
                return
        elif len(cells) != len(header):
            yield place, Malformed(f"{len(cells)} cells under a header of {len(header)}")
        else:
            row = {key: cell for key, cell in zip(header, cells, strict=True) if cell}
            own = {key: row.pop(key) for key in FIELDS[:3] if key in row}
            yield place, {**own, "metadata": row}


def bad_header(header: list[str]) -> str:
    """Why the columns of a table are of no use, or nothing."""
    if "text" not in header:
        (other,) = re.findall(r"[;\t|]", header[0])[:1] or [""] if len(header) == 1 else [""]
        hint = f" Cells are separated by commas, not by {other!r}." if other else ""
        return f"no column 'text' among {', '.join(header)}.{nearest('text', header)}{hint}"
    twice = [column for column in header if header.count(column) > 1]
    return f"column {twice[0]!r} appears twice" if twice else ""


def file_bytes(path: Path) -> bytes:
    """All of a file that is one document; raises Malformed if it is too long."""
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise Malformed(f"a document of more than {LIMIT:,} bytes")
    return data


def _json(line: str) -> Any | Malformed:
    """The value that a line holds, or why it holds none."""
    if spoiled := SURROGATE.search(line):
        byte = len(line[: spoiled.start()].encode("utf-8"))
        return Malformed(f"invalid UTF-8 or a lone surrogate at byte {byte} of the line")
    try:
        return JSON.decode(line)
    except json.JSONDecodeError as error:
        return Malformed(f"malformed JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # NaN, giant numbers, deep nesting
        return Malformed(f"malformed JSON: {error}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if number - number:  # infinite: what is written back would be no JSON
        raise ValueError(f"{text[:20]} is beyond the range of a float")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values for one key, one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return row


JSON = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_object)

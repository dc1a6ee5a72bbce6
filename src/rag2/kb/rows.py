"""A row of input -> a cleaned document, or why it is none."""

import json
from typing import Any

from rag2.kb.clean import clean, clean_line, is_blank, is_overmarked
from rag2.kb.table import LIMIT, Malformed
from rag2.registry import nearest
from rag2.types import Document

LONGEST = 2_000  # characters of an id or a title
FIELDS = ("id", "title", "text", "metadata")
TYPES = {"id": (str, int), "title": (str,), "text": (str,), "metadata": (dict,)}

# Where (`file.jsonl:17`, or a file's name), and what is there: an object, or why there is none.
Row = tuple[str, Any | Malformed]


def document(place: str, row: Any) -> Document:
    """The cleaned document of one row; raises Malformed, with the reason, if it is none."""
    if isinstance(row, Malformed):
        raise row
    if not isinstance(row, dict):
        raise Malformed(f"expected an object, got {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    if "text" not in row:
        raise Malformed(f"no 'text'.{nearest('text', row)}")
    for key, types in TYPES.items():
        if key in row and (not isinstance(row[key], types) or isinstance(row[key], bool)):
            raise Malformed(f"{key!r} is a {type(row[key]).__name__}, not a {types[0].__name__}")
    if len(row["text"]) > LIMIT:
        raise Malformed(f"a text of more than {LIMIT:,} characters")
    if any(is_overmarked(str(row.get(key, ""))) for key in FIELDS[:3]):
        raise Malformed("64 or more combining marks on one character")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("invalid UTF-8 or a lone surrogate") from None
    id, title = clean_line(str(row.get("id", ""))) or place, clean_line(row.get("title", ""))
    for key, value in (("id", id), ("title", title)):  # each chunk of the document repeats them
        if len(value) > LONGEST:
            raise Malformed(f"{key!r} has more than {LONGEST:,} characters")
    text = clean(row["text"])
    if is_blank(text):
        raise Malformed("no text")
    others = {key: value for key, value in row.items() if key not in FIELDS}
    return Document(
        id=id,
        text=text,
        title=title,
        metadata={**others, **row.get("metadata", {})},
    )

"""What the readers of data sets share: files and rows with their places, splits by hash.

A reader takes the folder of a data set and yields one `Item` for each thing it meets.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rag2.kb.table import Malformed as Malformed
from rag2.kb.table import csv_rows
from rag2.registry import UserError, nearest
from rag2.types import Document

# Where (`mc.jsonl:17`), and a document, the row of a question as in questions.jsonl, or why it is
# neither.
Item = tuple[str, Document | Mapping[str, Any] | str]
Row = Mapping[str, Any]

# Where a data set has no split of its own: tenths of the groups, by the hash of a group's name.
SHARES = {"train": 4, "validation": 2, "test": 4}


def existing(path: Path) -> Path:
    """The path; raises UserError, with the nearest name beside it, if there is nothing."""
    if path.exists():
        return path
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(f"source {str(path)!r} does not exist.{nearest(path.name, beside)}")


def field(row: Any, key: str, kind: type) -> Any:
    """The value of a key; raises Malformed if the row is no object or the value of another type."""
    if not isinstance(row, Mapping):
        raise Malformed(f"expected an object, got {type(row).__name__}")
    if key not in row:
        raise Malformed(f"no {key!r}.{nearest(key, row)}")
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Malformed(f"{key!r} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def strings(row: Any, key: str) -> list[str]:
    """The list of strings under a key; raises Malformed for anything else."""
    values = field(row, key, list)
    if not all(isinstance(value, str) for value in values):
        raise Malformed(f"{key!r} holds something else than strings")
    return values


def by_hash(group: str, shares: Mapping[str, int] = SHARES) -> str:
    """The split of a group: always the same, whatever other groups there are."""
    bucket = int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogatepass")).digest()[:8])
    names = [name for name, share in shares.items() for _ in range(share)]
    return names[bucket % len(names)]


def json_file(path: Path) -> Any:
    """The value in a JSON file; raises UserError, one line, for anything else."""
    data = existing(path).read_bytes()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON: {error}") from None


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value or Malformed) of each line of a .jsonl or .jsonl.gz file; blank ones are none.

    Raises UserError for a missing file and for a broken archive.
    """
    opened = gzip.open if existing(path).suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path.name}:{number}", _parsed(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken archive: {error}") from None


def csv_table(path: Path, name: str) -> Iterator[tuple[str, dict[str, str] | Malformed]]:
    """As `csv_rows` for a file with a header: cells by column."""
    header: list[str] | None = None
    for place, cells in csv_rows(existing(path), name):
        if isinstance(cells, Malformed):
            yield place, cells
        elif header is None:
            header = [cell.strip() for cell in cells]
        elif len(cells) != len(header):
            yield place, Malformed(f"{len(cells)} cells under a header of {len(header)}")
        else:
            yield place, dict(zip(header, cells, strict=True))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8 (byte {error.start + 1} of the line)")
    except (ValueError, RecursionError) as error:
        return Malformed(f"malformed JSON: {error}")

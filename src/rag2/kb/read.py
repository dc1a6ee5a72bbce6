"""Files, folders and data sets -> documents; what is no document keeps its place and a reason.

A reader takes a path and the name to call it by, and yields the rows of that file. Those in the
registry's table `reader` run here; those in `parser` in a child process with limits.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from rag2.kb.jail import Jail, Limits
from rag2.kb.rows import Row, document
from rag2.kb.table import Malformed
from rag2.registry import TABLES, UserError, lookup
from rag2.types import Document

HUB = "hf"
# Where (`file.jsonl:17`, or a file's name), and the document or why there is none.
Item = tuple[str, Document | str]


def read(*sources: Path | str, limits: Limits | None = None) -> Iterator[Item]:
    """Every document of files, of folders and their subfolders, and of data sets `hf:NAME[:SPLIT]`.

    Files of a folder come in the order of their relative paths; hidden ones are skipped, those of
    an unknown type give a reason. Raises UserError, before anything is read, if a source is missing
    or of unknown type, and if the package that parses a format is not installed.
    """
    for source in sources:
        _check(source)
    with Jail(limits or Limits()) as jail:
        for source in sources:
            for place, row in _rows(source, jail):
                try:
                    yield printable(place), document(escaped(place), row)
                except Malformed as error:
                    yield printable(place), printable(str(error))


def escaped(text: str) -> str:
    """Text on one line that does nothing to a terminal: escapes for what is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: str, most: int = 500) -> str:
    """The beginning of a text, to be told: escaped, and cut where it is too long."""
    shown = escaped(text[: most + 1])
    return shown if len(shown) <= most else f"{shown[:most]}..."


def _check(source: Path | str) -> None:
    """Raise UserError for a source that cannot be read at all."""
    path = Path(source)
    try:
        if _data_set(source) or path.is_dir():
            return
        if not path.exists():
            raise UserError(f"source {str(source)!r} does not exist")
        reason = _unreadable(path)
    except OSError as error:
        reason = _closed(error)
    if reason:
        raise UserError(f"source {str(source)!r}: {reason}")


def _rows(source: Path | str, jail: Jail) -> Iterator[Row]:
    """Every row of one source."""
    path = Path(source)
    if name := _data_set(source):
        yield from jail.rows(HUB, name, name)
    elif path.is_dir():
        for file, reason in _walk(path):
            name = file.relative_to(path)
            if any(part.startswith(".") for part in name.parts):
                continue
            if reason:
                yield name.as_posix(), Malformed(reason)
            else:
                yield from _file_rows(file, name.as_posix(), jail)
    else:
        yield from _file_rows(path, path.name, jail)


def _walk(folder: Path) -> list[tuple[Path, str]]:
    """The files below a folder in the order of their paths; of what is not gone into, why."""
    found: list[tuple[Path, str]] = []

    def failed(error: OSError) -> None:
        found.append((Path(error.filename), _closed(error)))

    for root, folders, files in os.walk(folder, onerror=failed):
        found += [(Path(root, name), "") for name in files]
        linked = [Path(root, name) for name in folders if os.path.islink(Path(root, name))]
        found += [(path, "a link to a folder, which is not followed") for path in linked]
    return sorted(found)


def _file_rows(path: Path, name: str, jail: Jail) -> Iterator[Row]:
    """Every row of one file; a file that cannot be read is one row with the reason."""
    suffix = _suffix(path)
    try:
        if reason := _unreadable(path):
            yield name, Malformed(reason)
        elif suffix in TABLES["parser"]:
            yield from jail.rows(suffix, str(path), name)
        else:
            yield from lookup("reader", suffix)(path, name)
    except Malformed as error:
        yield name, error.with_traceback(None)
    except OSError as error:
        yield name, Malformed(_closed(error))


def _data_set(source: Path | str) -> str:
    """The name of a data set, or nothing where the source is a file or a folder."""
    scheme, _, name = str(source).partition(":")
    return name if scheme == HUB else ""


def _unreadable(path: Path) -> str:
    """Why no reader takes this path, or nothing."""
    if not path.is_file():
        return "not a regular file"
    known = [*TABLES["reader"], *(name for name in TABLES["parser"] if name != HUB)]
    if _suffix(path) in known:
        return ""
    allowed = ", ".join(f".{suffix}" for suffix in known)
    return f"unknown file type {'.' + _suffix(path)!r}; allowed: {allowed}"


def _closed(error: OSError) -> str:
    """Why the system gives no access."""
    return f"cannot be read: {error.strerror}"


def _suffix(path: Path) -> str:
    """What tells the type: the last suffix, or the last two of a compressed file."""
    suffixes = path.name.lower().split(".")[1:]
    return ".".join(suffixes[-2:] if suffixes[-1:] == ["gz"] else suffixes[-1:])

"""Lines of a text file, and rows of a CSV file, each of bounded length or with the reason why not.

A byte that is not UTF-8 becomes a lone surrogate, which spoils its own row, not the file.
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

# Characters of a row and of a document's text, bytes of a file that is one document. Cutting a text
# of this length into chunks takes about 1 GiB of memory.
LIMIT = 16 * 2**20
SKIP = 2**20  # characters of an overlong line that are read at a time
BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",  # before UTF-16's, with which it begins
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


class Malformed(ValueError):
    """A row that is not what it should be; the message is the reason."""


def decode(data: bytes) -> str:
    """The text of a whole file; raises Malformed for what is no text in any Unicode encoding."""
    encoding, errors = _encoding(data[:4])
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise Malformed(f"malformed {error.encoding}: {error.reason}") from None


def lines(file: IO[bytes] | io.BufferedIOBase, newline: str = "\n") -> Iterator[str | Malformed]:
    """Each line of a file with its end, or why it cannot be had; at most LIMIT characters of it.

    `newline` is that of `open`: "" ends lines at carriage returns too. A UTF-16 or UTF-32 file
    begins with a byte order mark. Closes the file.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, file))  # peeks, into a compressed file too
    try:
        encoding, errors = _encoding(buffered.peek(4)[:4])
        with io.TextIOWrapper(buffered, encoding, errors, newline) as text:
            while line := text.readline(LIMIT + 1):
                if len(line) > LIMIT:
                    while line and not line.endswith(("\n", "\r")):
                        line = text.readline(SKIP)
                    yield Malformed(f"a row of more than {LIMIT:,} characters")
                else:
                    yield line
    except UnicodeDecodeError as error:  # only UTF-16 and UTF-32, where nobody can go on
        yield Malformed(f"malformed {error.encoding} from here on: {error.reason}")
    except Malformed as error:
        yield error.with_traceback(None)  # which would hold the file
    finally:
        buffered.close()


def csv_rows(path: Path, name: str) -> Iterator[tuple[str, list[str] | Malformed]]:
    """(place, cells or Malformed) of each row; the place is `name:line`, where the row begins."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    source = _Lines(path)
    rows = csv.reader(source, strict=True)
    while True:
        place = f"{name}:{source.begin() + 1}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, Malformed(f"malformed CSV: {error}")
        except Malformed as error:
            yield place, error.with_traceback(None)
        else:
            if cells:  # no blank line
                yield place, cells


class _Lines:
    """The lines that a csv.reader takes, counted; a row of many lines is bounded as one of one."""

    def __init__(self, path: Path) -> None:
        self._lines = lines(path.open("rb", buffering=0), newline="")
        self._number = self._length = 0

    def begin(self) -> int:
        """A row begins: how many lines were taken before."""
        self._length = 0
        return self._number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1
        if isinstance(line, Malformed):
            raise line
        self._length += len(line)
        if self._length > LIMIT:
            raise Malformed(f"a row of more than {LIMIT:,} characters")
        return line


def _encoding(head: bytes) -> tuple[str, str]:
    """Encoding and error handler of a text that begins so; raises Malformed for a guess."""
    for mark, name in BOMS.items():
        if head.startswith(mark):
            return name, "surrogatepass"
    if len(head) == 4 and 0 in head and head.count(0) in (2, 3) and any(head):
        raise Malformed("looks like UTF-16 or UTF-32 without a byte order mark")
    return "utf-8-sig", "surrogateescape"

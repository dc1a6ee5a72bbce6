"""Lines of a text file, and rows of a CSV file, each of bounded length or with the reason why not.

A byte that is not UTF-8 becomes a lone surrogate, which spoils its own row, not the file.
"""

import csv
import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

# Characters of a row and of a document's text, bytes of a file that is one document. Cutting a text
# of this length into chunks takes about 1 GiB of memory.
LIMIT = 16 * 2**20
SKIP = 2**20  # characters of an overlong line that are read at a time
# Whole cells with the commas behind them; in a cell that no quote begins, a quote is a letter.
CELLS = re.compile(r'(?:(?:"[^"]*+(?:""[^"]*+)*+"[^,]*+|(?!")[^,]*+),)*+')
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


def lines(file: IO[bytes] | io.BufferedIOBase) -> Iterator[str | Malformed]:
    """Each line of a file with its end, or why it cannot be had; at most LIMIT characters of it.

    A line ends with a line feed. Closes the file.
    """
    try:
        with _opened(file, newline="\n") as text:
            while line := text.readline(LIMIT + 1):
                if len(line) > LIMIT:
                    while line and not line.endswith("\n"):
                        line = text.readline(SKIP)
                    yield _too_long()
                else:
                    yield line
    except Malformed as error:
        yield error.with_traceback(None)  # which would hold the file


def csv_rows(path: Path, name: str) -> Iterator[tuple[str, list[str] | Malformed]]:
    """(place, cells or Malformed) of each row; the place is `name:line`, where the row begins."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    place = f"{name}:1"
    try:
        with _opened(path.open("rb", buffering=0), newline="") as text:
            source = _Lines(text)
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
    except Malformed as error:
        yield place, error.with_traceback(None)


class _Lines:
    """The lines that a csv.reader takes, counted; a row of many lines is bounded as one of one."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._number = self._length = 0
        self._cut = False

    def begin(self) -> int:
        """A row begins: how many lines were taken before."""
        self._length = 0
        return self._number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._read(LIMIT + 1 - self._length)
        if not line:
            raise StopIteration
        if self._length + len(line) > LIMIT:
            self._skip(line)
            raise _too_long()
        self._number += 1
        self._length += len(line)
        return line

    def _skip(self, piece: str) -> None:
        """Go to the end of a row, from a piece of it that is at hand."""
        cell = '"' if self._length else ""  # a row goes on in a line below within quotes alone
        while piece:
            cell = CELLS.sub("", cell + piece, count=1)
            quoted = cell.startswith('"')
            open = quoted and cell.count('"') % 2 == 1
            ended = piece.endswith(("\n", "\r"))
            self._number += ended
            if ended and not open:
                return
            # What makes the next piece begin in the same state.
            cell = '"' if open else '""' if quoted else cell[:1]
            piece = self._read(SKIP)

    def _read(self, most: int) -> str:
        """The next line, or so much of it; a line feed that was cut off its line is left out."""
        piece = self._text.readline(most)
        if piece == "\n" and self._cut:
            piece = self._text.readline(most)
        self._cut = len(piece) == most and piece.endswith("\r")
        return piece


@contextmanager
def _opened(file: IO[bytes] | io.BufferedIOBase, newline: str) -> Iterator[io.TextIOWrapper]:
    """A file as text, with the `newline` of `open`; closed in the end.

    A UTF-16 or UTF-32 file begins with a byte order mark. Raises Malformed, also inside, where
    nobody can go on.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, file))  # peeks, into a compressed file too
    try:
        encoding, errors = _encoding(buffered.peek(4)[:4])
        with io.TextIOWrapper(buffered, encoding, errors, newline) as text:
            yield text
    except UnicodeDecodeError as error:  # only UTF-16 and UTF-32
        raise Malformed(f"malformed {error.encoding} from here on: {error.reason}") from None
    finally:
        buffered.close()


def _too_long() -> Malformed:
    return Malformed(f"a row of more than {LIMIT:,} characters")


def _encoding(head: bytes) -> tuple[str, str]:
    """Encoding and error handler of a text that begins so; raises Malformed for a guess."""
    for mark, name in BOMS.items():
        if head.startswith(mark):
            return name, "surrogatepass"
    if len(head) == 4 and 0 in head and head.count(0) in (2, 3) and any(head):
        raise Malformed("looks like UTF-16 or UTF-32 without a byte order mark")
    return "utf-8-sig", "surrogateescape"

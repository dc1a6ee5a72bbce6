"""A CSV file -> its rows, each with its place; a row that is none says why."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path


class Malformed(ValueError):
    """A row that is not what it should be; the message is the reason."""


def csv_rows(path: Path, name: str) -> Iterator[tuple[str, list[str] | Malformed]]:
    """(place, cells or Malformed) of each row; the place is `name:line`, where the row begins.

    A byte that is not UTF-8 becomes a lone surrogate, which spoils its own row, not the file.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses cells over 128 KiB
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        while True:
            place = f"{name}:{rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, Malformed(f"malformed CSV: {error}")
                continue
            if cells:  # no blank line
                yield place, cells

"""The table of results: its columns, and a CSV that is complete after every row."""

import csv
from pathlib import Path
from typing import Any

SIZES = ("M", "B", "K", "T", "L", "N", "D", "H", "V")
SHAPE = ("op", *SIZES, "dtype", "pass", "f")
COLUMNS = (
    *SHAPE,
    *("provider", "versions", "device", "p20_ms", "p50_ms", "p80_ms", "of_plain", "peak_mib"),
    *("flops", "tflops", "floor_ms", "share_of_floor", "target_ms", "target_mib"),
    *("error", "allowed", "match", "twice_equal", "note"),
)

Row = dict[str, Any]


class Table:
    """Rows in memory and in a file, flushed one by one."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.rows: list[Row] = read(path) if resumed and path.exists() else []
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def add(self, row: Row) -> None:
        """Write one row; absent columns are empty."""
        # As a CSV gives it back, so that reports read both alike.
        self.rows.append({name: str(row.get(name, "")) for name in COLUMNS})
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow(self.rows[-1])

    def has(self, row: Row) -> bool:
        """Whether there is a row of the same shape and provider."""
        wanted = [str(row.get(name, "")) for name in (*SHAPE, "provider")]
        return any([got[name] for name in (*SHAPE, "provider")] == wanted for got in self.rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV, all values as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

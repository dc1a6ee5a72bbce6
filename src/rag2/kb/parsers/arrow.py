"""Parquet files and data sets -> rows, by pyarrow and datasets."""

import math
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from rag2.kb.plain import bad_header
from rag2.kb.rows import Row
from rag2.kb.table import Malformed

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows that are decoded at a time


def read_parquet(path: Path, name: str) -> Iterator[Row]:
    """One document per row of a table with a column `text`, as in `read_jsonl`.

    A row without id is called `<name>:<row>`, counted from 1. Rows that cannot be decoded give the
    reason, each.
    """
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check(file.schema_arrow.names)
        rows, size = file.metadata.num_rows, path.stat().st_size
        if rows > size:  # even rows of one byte are smaller only where they repeat each other
            raise Malformed(f"declares {rows:,} rows in {size:,} bytes")
        first = 1
        for group in range(file.metadata.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            try:
                batches = file.iter_batches(BATCH, [group], use_threads=False)
                for batch in batches:
                    yield from _batch_rows(batch, first, name)
                    first += batch.num_rows
            except (OSError, pyarrow.ArrowException) as error:
                lost = Malformed(f"row group {group + 1} cannot be read: {error}")
                yield from ((f"{name}:{row}", lost) for row in range(first, end))
            first = end


def read_dataset(path: Path, name: str) -> Iterator[Row]:
    """As `read_parquet`, of a folder by `save_to_disk` or of a name on the hub, NAME[:SPLIT].

    Without a split all of them, in their order; a row without id is called `<name>[<split>]:<row>`.
    """
    import datasets

    folder, _, split = (name, "", "") if path.is_dir() else name.rpartition(":")
    if not folder:
        folder, split = name, ""
    if Path(folder).is_dir():
        data: Any = datasets.load_from_disk(folder)
    else:
        data = datasets.load_dataset(folder, streaming=True)
    splits = data if isinstance(data, dict) else {str(data.split or "all"): data}
    if split and split not in splits:
        raise Malformed(f"no split {split!r}; there are {', '.join(splits)}")
    for part in [split] if split else splits:
        first = 1
        for table in splits[part].with_format("arrow").iter(BATCH):
            _check(table.column_names)
            yield from _batch_rows(table, first, f"{folder}[{part}]")
            first += table.num_rows


def _check(columns: list[str]) -> None:
    if reason := bad_header(columns):
        raise Malformed(reason)


def _batch_rows(
    batch: "pyarrow.RecordBatch | pyarrow.Table", first: int, name: str
) -> Iterator[Row]:
    """The rows of a batch; a cell that cannot be decoded spoils its own row alone."""
    names = batch.schema.names
    columns = [_cells(batch.column(number)) for number in range(len(names))]
    for number, cells in enumerate(zip(*columns, strict=True), first):
        place = f"{name}:{number}"
        try:
            yield place, {key: _plain(key, cell) for key, cell in zip(names, cells, strict=True)}
        except Malformed as error:
            yield place, error


def _cells(column: Any) -> list[Any]:
    """The cells of a column; Malformed for those that are UTF-8 or dates that Python has not."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_cell(cell) for cell in column]


def _cell(cell: Any) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return Malformed(f"invalid UTF-8 at byte {error.start} of a cell")
    except (ValueError, OverflowError) as error:
        return Malformed(str(error))


def _plain(key: str, value: Any) -> Any:
    """A cell as JSON has it: dates in ISO form, NaN missing; raises Malformed for what is none."""
    match value:
        case Malformed():
            raise value
        case str() | bool() | int() | None:
            return value
        case float() if math.isnan(value):
            return None
        case float() if math.isfinite(value):
            return value
        case dict():
            return {str(name): _plain(key, item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(key, item) for item in value]
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal() | UUID() | timedelta():
            return str(value)
    raise Malformed(f"{key!r} holds {type(value).__name__}, which metadata cannot")

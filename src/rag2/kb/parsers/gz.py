"""Compressed JSONL -> rows."""

import gzip
from collections.abc import Iterator
from pathlib import Path

from rag2.kb.plain import json_rows
from rag2.kb.rows import Row


def read_jsonl_gz(path: Path, name: str) -> Iterator[Row]:
    """As `read_jsonl`, of a file by gzip."""
    return json_rows(gzip.open(path), name)

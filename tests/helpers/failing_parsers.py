"""Parsers that fail in every way there is; the jail runs them by their names."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag2.kb.plain import read_text

Rows = Iterator[tuple[str, Any]]


def endless(path: Path, name: str) -> Rows:
    """Two rows, then nothing for ever."""
    yield f"{name}:1", {"text": "one"}
    yield f"{name}:2", {"text": "two"}
    while True:
        pass


def silent(path: Path, name: str) -> Rows:
    """Nothing for ever."""
    while True:
        pass
    yield name, {}


def greedy(path: Path, name: str) -> Rows:
    """Takes memory until there is none."""
    held = [bytearray(2**24)]
    while True:
        held.append(bytearray(2**24))
    yield name, {"text": str(len(held))}


def broken(path: Path, name: str) -> Rows:
    """Reads where nothing is, as a parser in C may."""
    yield f"{name}:1", {"text": "one"}
    ctypes.string_at(1)


def ending(path: Path, name: str) -> Rows:
    """Ends the process."""
    sys.exit(3)
    yield name, {}


def lying(path: Path, name: str) -> Rows:
    """Speaks with the parent in the child's place."""
    for file in range(3, 10):
        try:
            os.write(file, b"\x00\x00\x00\x04[[[[")
        except OSError:
            continue
    yield name, {"text": "late"}


def endless_frame(path: Path, name: str) -> Rows:
    """A row longer than any row may be."""
    yield name, {"text": "x" * (2**26 + 1)}


def odd(path: Path, name: str) -> Rows:
    """Rows that the parent must not believe, in good frames."""
    for row in ("text", 5, None, [], {"text": 5}, {"text": "\ud800"}, {"text": " "}, {"id": "x"}):
        yield name, row
    yield "a\x1b[31m\nb", {"text": "named by an escape sequence"}


def talkative(path: Path, name: str) -> Rows:
    """Prints what would be a frame."""
    print("\x00\x00\x00\x02{}" * 100, flush=True)  # noqa: T201
    os.write(1, b"\xff" * 1000)
    yield from read_text(path, name)

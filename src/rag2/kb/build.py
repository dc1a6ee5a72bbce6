"""Files and folders -> a new knowledge base, whole or not at all."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rag2.kb.chunk import Chunker
from rag2.kb.read import read
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Document


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that became no document: its place, as in `file.jsonl:17`, and the reason."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the inputs of a build: accepted + rejected = total."""

    accepted: int
    rejected: list[Reject]
    chunks: int

    @property
    def total(self) -> int:
        """Documents, rows and files that were looked at."""
        return self.accepted + len(self.rejected)


def build(
    path: Path | str, sources: Sequence[Path | str], chunker: Chunker, strict: bool = False
) -> Summary:
    """Write the knowledge base of all documents in `sources` to `path`; rejects are reported.

    The file appears complete, by a rename, or not at all: with `strict` not if there are rejects.
    Raises UserError if `path` is taken, a source is missing, or no document was accepted.
    """
    path = Path(path)
    # A write-ahead log left behind by another file of that name would be replayed into the new one.
    for taken in (path, *(path.with_name(path.name + end) for end in ("-wal", "-journal"))):
        if taken.exists() or taken.is_symlink():
            raise UserError(f"{taken} already exists; remove it or choose another path")
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as staging:
            partial = Path(staging) / path.name
            inputs = _Inputs(sources)
            with KnowledgeBase(partial, create=True) as kb:
                chunks = kb.add(inputs, chunker)
                kb.seal()
            if not inputs.seen:
                raise UserError(_nothing(sources, inputs.rejected))
            if not (strict and inputs.rejected):
                _sync(partial)
                os.rename(partial, path)
                _sync(path.parent)
    finally:
        if not path.exists():
            for folder in missing:  # innermost first
                with suppress(OSError):  # somebody else may have put something there
                    folder.rmdir()
    return Summary(len(inputs.seen), inputs.rejected, chunks)


class _Inputs:
    """The documents of all sources with an id not seen before; counts them and keeps the rest."""

    def __init__(self, sources: Sequence[Path | str]) -> None:
        self.sources = [Path(source) for source in sources]
        self.seen: dict[str, str] = {}  # document id -> place
        self.rejected: list[Reject] = []

    def __iter__(self) -> Iterator[Document]:
        for source in self.sources:
            for place, item in read(source):
                if isinstance(item, str):
                    self.rejected.append(Reject(place, item))
                elif item.id in self.seen:
                    first = self.seen[item.id]
                    reason = f"duplicate id {item.id!r}, first used at {first}"
                    self.rejected.append(Reject(place, reason))
                else:
                    self.seen[item.id] = place
                    yield item


def _nothing(sources: Sequence[Path | str], rejected: list[Reject]) -> str:
    """The error for a build without a document, with the first reason."""
    where = ", ".join(str(source) for source in sources) or "no source"
    if not rejected:
        return f"no document in {where}"
    first = rejected[0]
    return (
        f"no document was accepted from {where}: {len(rejected)} rejected,"
        f" the first {first.place}: {first.reason}"
    )


def _sync(path: Path) -> None:
    """fsync a file, or a directory and with it the names of its files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

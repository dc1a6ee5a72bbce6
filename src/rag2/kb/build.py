"""Files and folders -> a new knowledge base, whole or not at all."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rag2 import artifact
from rag2.kb.chunk import Chunker
from rag2.kb.ingest import Inputs, Summary
from rag2.kb.jail import Limits
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError


def build(
    path: Path | str,
    sources: Sequence[Path | str],
    chunker: Chunker,
    strict: bool = False,
    keep_duplicates: bool = False,
    near: float | None = None,
    limits: Limits | None = None,
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
        with artifact.staged(path) as partial:
            inputs = Inputs(sources, keep_duplicates, near, limits)
            with KnowledgeBase(partial, create=True) as kb:
                chunks = kb.add(inputs, chunker)
                kb.seal()
            if not inputs.seen:
                raise inputs.nothing()
            if not (strict and inputs.rejected):
                _sync(partial)
                os.rename(partial, path)
                _sync(path.parent)
    finally:
        if not path.exists():
            for folder in missing:  # innermost first
                with suppress(OSError):  # somebody else may have put something there
                    folder.rmdir()
    return inputs.summary(chunks)


def _sync(path: Path) -> None:
    """fsync a file, or a directory and with it the names of its files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

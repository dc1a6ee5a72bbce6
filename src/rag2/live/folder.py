"""A folder of generations: publish, find the newest sound one, remove what holds erased text."""

import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from rag2 import artifact
from rag2.index import generation as generations
from rag2.index.generation import Generation
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Chunk

POINTER = "current"
logger = logging.getLogger(__name__)


def newest(folder: Path, fingerprint: str) -> Generation | None:
    """The newest generation of an encoder that verifies; the others are warned about."""
    for directory in reversed(_numbered(folder)):
        try:
            return Generation.load(directory, fingerprint)
        except UserError as error:
            logger.warning("%s", error)
    return None


def publish(generation: Generation | None, folder: Path) -> None:
    """Commit a generation and remove those before it; None: remove all."""
    artifact.make_folders(folder.absolute())
    artifact.sweep(folder)
    before = _numbered(folder)
    if generation is None:
        (folder / POINTER).unlink(missing_ok=True)
    else:
        number = int(before[-1].name) + 1 if before else 0
        generation.save(folder / f"{number:06d}", pointer=folder / POINTER)
    for directory in before:
        generations.remove(directory)


def refuse_others(folder: Path, kb: KnowledgeBase) -> None:
    """Raise UserError if a generation is of another knowledge base, whose it is to remove it."""
    for directory in _numbered(folder):
        with suppress(artifact.ArtifactError):  # nobody can tell of what it is
            if not kb.may_have_held(_chunks(directory)):
                what = "is a generation of another knowledge base: nothing is removed"
                raise UserError(f"{directory} {what}")


def purge(folder: Path, alive: Collection[int]) -> list[Path]:
    """Remove every generation that holds another chunk than these, or that cannot be read.

    What a killed writer left behind goes too. Returns what was removed; a pointer to it goes first.
    """
    alive, removed = set(alive), artifact.sweep(folder)
    for directory in _numbered(folder):
        try:
            held = set(_table(directory).column("id").to_pylist())
        except UserError:
            held = None
        if held is None or not held <= alive:
            pointer = folder / POINTER
            if pointer.is_file() and pointer.read_text(encoding="utf-8").strip() == directory.name:
                pointer.unlink()
            generations.remove(directory)
            removed.append(directory)
    return removed


def _table(directory: Path) -> pa.Table:
    """The chunks of a generation; raises ArtifactError for one that does not verify."""
    artifact.verify(directory, kind=generations.KIND, only=generations.FILE)
    return generations.table_in(directory)


def _chunks(directory: Path) -> Iterator[Chunk]:
    """As `_table`."""
    for batch in _table(directory).to_batches():
        yield from (Chunk(**row) for row in batch.to_pylist())


def _numbered(folder: Path) -> list[Path]:
    """The directories of generations, whole or in pieces, oldest first; never anything else."""
    marks = (artifact.MANIFEST, generations.FILE, "index.json")
    return sorted(
        path
        for path in folder.glob("[0-9]" * 6)
        if path.is_dir() and any((path / mark).is_file() for mark in marks)
    )

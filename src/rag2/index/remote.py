"""Vectors that lie in a collection on a server -> an index like any other: search, save, load.

A collection is filled once, under a name of its own, and never changed. Until its index is saved it
goes with the index or the process; from then on it stays until `discard`. The files of a saved
index hold its name, its number of vectors and the SHA-256 of their bytes in row order: what is
loaded is what was saved, or nothing. Scores are computed here from the stored vectors, as for every
index.
"""

import atexit
import hashlib
import json
import re
import secrets
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from rag2.index.base import Backend, Blocks, Index, slices
from rag2.registry import UserError

FILE = "collection.json"
PREFIX = "rag2_"
NAME = re.compile(f"{PREFIX}[0-9a-f]{{32}}")


class Collection(ABC):
    """One collection on a server: rows 0 to N - 1, each with its embedding."""

    where: str
    """The server, as messages name it."""
    outlives: bool
    """Whether the server still answers when this process ends."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def create(self, dimension: int) -> None:
        """Make it, empty."""

    @abstractmethod
    def add(self, first: int, block_MD: np.ndarray) -> None:
        """Append rows, the first of which has this number."""

    @abstractmethod
    def publish(self) -> None:
        """Build what searches need; nothing is added after that."""

    @abstractmethod
    def size(self) -> tuple[int, int] | None:
        """The number of its rows and their dimension; None where there is no such collection."""

    @abstractmethod
    def nearest(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Index.candidates`."""

    @abstractmethod
    def read(self, rows_M: np.ndarray) -> np.ndarray:
        """The embeddings [M, D] of rows that increase."""

    def stored(self) -> int | None:
        """The bytes that it takes on the server's disk, where the server tells."""
        return None

    @abstractmethod
    def drop(self) -> None:
        """Remove it, if it is there."""


class Remote(Backend):
    """A kind of index whose vectors lie on a server."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the server compares a query with every vector."""

    @abstractmethod
    def collection(self, name: str) -> Collection:
        """The collection of this name, there or not; UserError if the server does not answer."""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors, in a new collection; raises as `Blocks` does."""
        collection = self.collection(PREFIX + secrets.token_hex(16))
        try:
            dimension, digest = _filled(collection, blocks)
        except BaseException:
            with suppress(UserError):  # what went wrong first is what is told
                collection.drop()
            raise
        # Not by a local name: clients keep errors that they caught, and with them their callers'.
        return RemoteIndex(
            self, blocks.ids_N, blocks.max_norm, collection, dimension, digest, saved=False
        )

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index whose collection is still the one that was saved, to the byte.

        Reads every vector once. Raises UserError if the collection is gone or differs.
        """
        name, count, digest = _told(directory)
        collection = self.collection(name)
        size = collection.size()
        if size is None:
            raise UserError(
                f"{directory}: collection {name} is not at {collection.where} (dropped?)"
            )
        if size[0] != count:
            raise UserError(
                f"{directory}: collection {name} at {collection.where} holds {size[0]} vectors, "
                f"not the {count} that were saved"
            )
        index = RemoteIndex(self, ids_N, max_norm, collection, size[1], digest, saved=True)
        if index.computed_digest() != digest:
            raise UserError(
                f"{directory}: the vectors of collection {name} at {collection.where} are not "
                "those that were saved"
            )
        return index

    def discard(self, directory: Path) -> None:
        """Drop the collection of a saved index."""
        if (directory / FILE).exists():
            self.collection(_told(directory)[0]).drop()


class RemoteIndex(Index):
    """Searches a collection; its rows are positions in `ids_N`."""

    def __init__(
        self,
        backend: Remote,
        ids_N: np.ndarray,
        max_norm: float,
        collection: Collection,
        dimension: int,
        digest: str,
        saved: bool,
    ) -> None:
        super().__init__(backend, ids_N, max_norm)
        self.exact = backend.exact
        self.collection = collection
        self._dimension = dimension
        self._digest = digest
        self._unsaved = None if saved else weakref.finalize(self, _forget, collection)
        if self._unsaved is not None:
            self._unsaved.atexit = False
            if collection.outlives:  # what is registered last is called first: before the client's
                atexit.register(self._unsaved)

    @property
    def dimension(self) -> int:
        return self._dimension

    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        return self.collection.nearest(queries_BD, m)

    def rounding(self, queries_BD: np.ndarray) -> np.ndarray:
        # How a server sums is its own affair: the bound holds for every order.
        norms_B = np.linalg.norm(queries_BD, axis=1)
        return (self.dimension + 2) * 2.0**-24 * norms_B * self.max_norm

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        unique_U, place_M = np.unique(rows_M, return_inverse=True)
        parts = [self.collection.read(unique_U[part]) for part in self._requests(len(unique_U))]
        return np.concatenate(parts or [np.empty((0, self.dimension), np.float32)])[place_M]

    def write(self, directory: Path) -> None:
        told = {"name": self.collection.name, "count": len(self), "sha256": self._digest}
        (directory / FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if self._unsaved is not None:
            self._unsaved.detach()

    def computed_digest(self) -> str:
        """SHA-256 of the vectors that are on the server now, in row order."""
        digest = hashlib.sha256()
        for part in self._requests(len(self)):
            rows_M = np.arange(part.start, min(part.stop, len(self)))
            digest.update(self.collection.read(rows_M).tobytes())
        return digest.hexdigest()

    def _requests(self, count: int) -> list[slice]:
        """Rows that one request reads: servers bound the bytes of an answer, and JSON is wordy."""
        return slices(count, 16 * self.dimension)


def empty(queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of candidates [B, m], all of them none yet."""
    shape = (len(queries_BD), m)
    return np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)


@contextmanager
def one_line(where: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """A library's `errors` as a UserError that names the server."""
    try:
        yield
    except errors as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: {reason[:300]}") from None


def _filled(collection: Collection, blocks: Blocks) -> tuple[int, str]:
    """Make the collection of the blocks' vectors; their dimension and their digest."""
    digest, dimension, done = hashlib.sha256(), 0, 0
    for block_MD in blocks:
        if not dimension:
            dimension = block_MD.shape[1]
            collection.create(dimension)
        collection.add(done, block_MD)
        digest.update(block_MD.tobytes())
        done += len(block_MD)
    collection.publish()
    return dimension, digest.hexdigest()


def _told(directory: Path) -> tuple[str, int, str]:
    """Name, count and digest of a saved index's collection."""
    try:
        told = json.loads((directory / FILE).read_text(encoding="utf-8"))
        name, count, digest = told["name"], int(told["count"]), str(told["sha256"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory} names no collection ({error})") from None
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{directory}: {str(name)[:60]!r} is no collection of ours")
    return name, count, digest


def _forget(collection: Collection) -> None:
    """Drop what nobody saved; a server that is gone by then is nobody's concern any more."""
    with suppress(Exception):
        collection.drop()

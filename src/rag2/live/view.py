"""One state of a living knowledge base, searched exactly: generation, delta and tombstones.

Immutable: whoever holds a view keeps an answer's vectors, ids, texts and encoder together. Its two
parts are a generation, some of whose rows are dead, and the chunks that are newer than it. What may
not be found (dead rows, other namespaces) is never a candidate: it takes no place from what may.

Shapes: N rows of a part, M of them chosen, B queries, K results, D embedding.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Self

import numpy as np

from rag2.index.base import SPARE, Searcher, checked
from rag2.index.generation import Generation
from rag2.live.rows import Rows
from rag2.modes import matmul
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, Side
from rag2.types import Chunk

logger = logging.getLogger(__name__)
FEW = 4  # below one row of so many, those that may be found are scored one by one
ROWS = 1 << 16  # so many at a time
Hits = tuple[np.ndarray, np.ndarray]  # scores_BK, ids_BK


@dataclass(frozen=True, slots=True)
class Embedder:
    """What makes embeddings [N, D] of texts, and how to tell it from another."""

    fingerprint: str
    dimension: int
    embed: Callable[[Sequence[str], Side], np.ndarray]

    @classmethod
    def of(cls, encoder: DualEncoder) -> Self:
        """The dual encoder with the weights of now; they must not be trained any further."""
        one_at_a_time = Lock()  # precision and mode belong to the process, not to a thread

        def embed(texts: Sequence[str], side: Side) -> np.ndarray:
            with one_at_a_time, matmul("highest"):
                return embed_corpus(encoder, texts, side=side)

        return cls(encoder.fingerprint(), encoder.dimension, embed)


@dataclass(frozen=True, slots=True)
class Part:
    """An index whose rows belong to namespaces; dead rows are not found."""

    index: Searcher
    rows: Mapping[str, np.ndarray]
    """of each namespace, increasing"""
    alive_N: np.ndarray

    @classmethod
    def of(cls, index: Searcher, namespaces: Mapping[int, str]) -> Self:
        """`namespaces` of the live chunks; those of the index that it does not name are dead."""
        names = [namespaces.get(id) for id in index.ids_N.tolist()]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                rows.setdefault(name, []).append(row)
        alive_N = np.array([name is not None for name in names])
        return cls(index, {name: np.array(found) for name, found in rows.items()}, alive_N)

    def without(self, ids: Collection[int]) -> Self:
        """The same, where these chunks are dead too."""
        rows_M, held_M = self.find(np.array(sorted(ids), dtype=np.int64))
        if not held_M.any():
            return self
        alive_N = self.alive_N.copy()
        alive_N[rows_M[held_M]] = False
        return replace(self, alive_N=alive_N)

    def find(self, ids_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The row of each id, and whether it is there at all, dead or alive."""
        rows_M = np.searchsorted(self.index.ids_N, ids_M)
        rows_M[rows_M == len(self.index)] = 0
        return rows_M, self.index.ids_N[rows_M] == ids_M

    def search(self, queries_BD: np.ndarray, k: int, namespaces: Collection[str] | None) -> Hits:
        """The k best live chunks of the namespaces, or all of them where they are fewer."""
        may_N = self.alive_N
        if namespaces is not None:
            may_N = np.zeros(len(self.index), dtype=bool)
            for name in namespaces:
                if name in self.rows:
                    may_N[self.rows[name]] = True
            may_N &= self.alive_N
        count = int(np.count_nonzero(may_N))
        k = min(k, count)
        if k == 0:
            empty = np.empty((len(queries_BD), 0))
            return empty.astype(np.float32), empty.astype(np.int64)
        if count == len(may_N):
            return self.index.search(queries_BD, k)
        if count * FEW < len(may_N):
            return self._each(queries_BD, k, np.flatnonzero(may_N))
        return self._among(queries_BD, k, may_N, count)

    def _each(self, queries_BD: np.ndarray, k: int, rows_M: np.ndarray) -> Hits:
        """The k best of some rows, by looking at no other."""
        found = []
        for start in range(0, len(rows_M), ROWS):
            part = rows_M[start : start + ROWS]
            index = Rows.of(self.index.vectors(part), self.index.ids_N[part])
            found.append(index.search(queries_BD, min(k, len(part))))
        return merged(found, k)

    def _among(self, queries_BD: np.ndarray, k: int, may_N: np.ndarray, count: int) -> Hits:
        """The k best of most rows: of longer and longer lists of all.

        Exact where the index is: if k of a list's chunks may be found, no chunk outside the list
        comes before the last of them. The list of all rows ends it.
        """
        scores_BK = np.empty((len(queries_BD), k), dtype=np.float32)
        ids_BK = np.empty((len(queries_BD), k), dtype=np.int64)
        open_B = np.arange(len(queries_BD))
        m = -(-k * len(may_N) // count) + SPARE
        while open_B.size:
            m = min(m, len(may_N))
            scores_BM, ids_BM = self.index.search(queries_BD[open_B], m)
            may_BM = may_N[np.searchsorted(self.index.ids_N, ids_BM)]
            done_B = may_BM.sum(axis=1) >= k
            order_BK = np.argsort(~may_BM[done_B], axis=1, kind="stable")[:, :k]
            closed_B = open_B[done_B]
            scores_BK[closed_B] = np.take_along_axis(scores_BM[done_B], order_BK, axis=1)
            ids_BK[closed_B] = np.take_along_axis(ids_BM[done_B], order_BK, axis=1)
            open_B = open_B[~done_B]
            m *= 4
        return scores_BK, ids_BK


@dataclass(frozen=True, slots=True)
class View:
    """The knowledge base at a version, as one encoder sees it."""

    embedder: Embedder
    version: int
    generation: Generation | None
    base: Part | None
    """of the generation"""
    delta: Part | None
    """of the chunks that the generation does not hold"""
    chunks: Mapping[int, Chunk]
    """those of the delta, and the blind ones"""

    def search(
        self, queries_BD: np.ndarray, k: int, namespaces: Collection[str] | None = None
    ) -> "Found":
        """The k best chunks of each query; raises UserError for k < 1 or one that is not finite."""
        if k < 1:
            raise UserError(f"k={k}; allowed: 1 or more")
        if isinstance(namespaces, str):
            raise ValueError(f"namespaces={namespaces!r}: a collection of names, not one name")
        queries_BD = checked(queries_BD, "query")
        if queries_BD.shape[1] != self.embedder.dimension:
            size = queries_BD.shape[1]
            raise ValueError(f"queries have {size} dimensions, not {self.embedder.dimension}")
        parts = [part for part in (self.base, self.delta) if part is not None]
        found = [part.search(queries_BD, k, namespaces) for part in parts]
        return Found(*merged(found or [_nothing(len(queries_BD))], k), self)

    @property
    def blind(self) -> set[int]:
        """Live chunks that the encoder has no finite embedding of: vectors do not find them."""
        seen = set() if self.delta is None else set(self.delta.index.ids_N.tolist())
        return self.chunks.keys() - seen

    def chunk(self, id: int) -> Chunk:
        """A chunk that this view has found; raises KeyError for one that it does not hold."""
        if id in self.chunks:
            return self.chunks[id]
        if self.generation is None:
            raise KeyError(f"chunk {id} is not in this view")
        return self.generation.chunk(id)

    def known(self, ids_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [M, D] of chunks and which of them this view has; the others are 0."""
        vectors_MD = np.zeros((len(ids_M), self.embedder.dimension), dtype=np.float32)
        known_M = np.zeros(len(ids_M), dtype=bool)
        for part in (self.base, self.delta):
            if part is not None:
                rows_M, held_M = part.find(ids_M)
                vectors_MD[held_M] = part.index.vectors(rows_M[held_M])
                known_M |= held_M
        return vectors_MD, known_M

    def after(
        self, version: int, added: Iterable[tuple[str, Chunk]], removed: Collection[int]
    ) -> "View":
        """The view of a later version; new chunks, whose ids are higher than all, are encoded."""
        added, gone = list(added), set(removed)
        base = self.base and self.base.without(gone)
        delta = self.delta and self.delta.without(gone)
        chunks = {id: chunk for id, chunk in self.chunks.items() if id not in gone}
        chunks |= {chunk.id: chunk for _, chunk in added}
        if added or delta is not self.delta:
            delta = _grown(delta, self.embedder, added)
        return replace(self, version=version, base=base, delta=delta, chunks=chunks)


@dataclass(frozen=True, slots=True)
class Found:
    """The best chunks of each query, best first, equal scores by smallest id; K as many as can be.

    `score` is the inner product of the embeddings.
    """

    scores_BK: np.ndarray
    ids_BK: np.ndarray
    view: View

    def chunks(self, row: int = 0) -> list[Chunk]:
        """The chunks found for one query."""
        return [self.view.chunk(id) for id in self.ids_BK[row].tolist()]


def merged(found: Sequence[Hits], k: int) -> Hits:
    """The k best of several lists, each of different chunks."""
    scores_BM, ids_BM = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order_BK = np.lexsort((ids_BM, -scores_BM), axis=1)[:, :k]
    best = np.take_along_axis
    return best(scores_BM, order_BK, axis=1), best(ids_BM, order_BK, axis=1)


def embedded(embedder: Embedder, chunks: Sequence[Chunk], old: View | None = None) -> np.ndarray:
    """Embeddings of chunks [M, D]; what a view of the same encoder has is not encoded again."""
    if old is None or old.embedder.fingerprint != embedder.fingerprint:
        return embedder.embed([chunk.passage for chunk in chunks], "chunk")
    vectors_MD, known_M = old.known(np.array([chunk.id for chunk in chunks], dtype=np.int64))
    new = np.flatnonzero(~known_M)
    if new.size:
        vectors_MD[new] = embedder.embed([chunks[row].passage for row in new.tolist()], "chunk")
    return vectors_MD


def delta_of(
    embedder: Embedder, added: Sequence[tuple[str, Chunk]], old: View | None = None
) -> Part | None:
    """Chunks with their namespaces, ids increasing, as a part.

    One whose embedding is not finite is told and left out: what is committed stays, and none of the
    others may be missed for it.
    """
    if not added:
        return None
    vectors_MD = embedded(embedder, [chunk for _, chunk in added], old)
    finite_M = np.isfinite(vectors_MD).all(axis=1)
    for row in np.flatnonzero(~finite_M).tolist():
        logger.error("%s; no search by vectors finds it", not_finite(added[row][1]))
    names = {added[row][1].id: added[row][0] for row in np.flatnonzero(finite_M).tolist()}
    if not names:
        return None
    return Part.of(Rows.of(vectors_MD[finite_M], np.array(list(names))), names)


def not_finite(chunk: Chunk) -> str:
    """What there is to say of such a chunk."""
    return f"chunk {chunk.id} of document {chunk.document!r} has no finite embedding"


def _grown(
    delta: Part | None, embedder: Embedder, added: Sequence[tuple[str, Chunk]]
) -> Part | None:
    """A delta without its dead rows and with new chunks."""
    more = delta_of(embedder, added)
    if delta is None or more is None and delta.alive_N.all():
        return more or delta
    names = {}
    for name, rows in delta.rows.items():
        names |= dict.fromkeys(delta.index.ids_N[rows[delta.alive_N[rows]]].tolist(), name)
    rows_M = np.flatnonzero(delta.alive_N)
    vectors, ids = [delta.index.vectors(rows_M)], [delta.index.ids_N[rows_M]]
    if more is not None:
        names |= {chunk.id: name for name, chunk in added}
        vectors.append(more.index.vectors(np.arange(len(more.index))))
        ids.append(more.index.ids_N)
    if not names:
        return None
    return Part.of(Rows.of(np.concatenate(vectors), np.concatenate(ids)), names)


def _nothing(queries: int) -> Hits:
    """No chunk for any query."""
    return np.empty((queries, 0), dtype=np.float32), np.empty((queries, 0), dtype=np.int64)

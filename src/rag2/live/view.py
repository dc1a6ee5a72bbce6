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

from rag2.index.base import checked
from rag2.index.generation import Generation
from rag2.live.part import Hits, Part, merged
from rag2.live.rows import Rows
from rag2.modes import matmul
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, Side
from rag2.types import Chunk

logger = logging.getLogger(__name__)


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
class View:
    """The knowledge base at a version, as one encoder sees it."""

    embedder: Embedder
    version: int
    generation: Generation | None
    base: Part | None
    """of the generation"""
    delta: Part | None
    """of the chunks that the generation does not hold"""
    chunks: Mapping[int, tuple[str, Chunk]]
    """those of the delta, and the blind ones, with their namespaces"""

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
            return self.chunks[id][1]
        if self.generation is None:
            raise KeyError(f"chunk {id} is not in this view")
        return self.generation.chunk(id)

    def namespace(self, id: int) -> str:
        """Where a chunk that this view has found belongs; raises KeyError as `chunk`."""
        if id in self.chunks:
            return self.chunks[id][0]
        name = None if self.base is None else self.base.namespace(id)
        if name is None:
            raise KeyError(f"chunk {id} is not in this view")
        return name

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
        chunks |= {chunk.id: (name, chunk) for name, chunk in added}
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

"""Backend, chunks and dimension -> bytes of the index and work of building it; nothing is built.

Shapes: N chunks, D embedding. The bytes are those of the files that `Index.save` writes, which are
also what a loaded index holds on the CPU; a flat or torch index on a GPU holds its vectors there
once more. Of an index on a server they are the least that it takes there.
"""

import math
from dataclasses import dataclass

from rag2.index.base import Backend
from rag2.index.hnsw import HNSW
from rag2.index.ivf import IVF
from rag2.index.shards import Shards

FLOAT, ID, LINK = 4, 8, 4  # bytes of a number of an embedding, of a chunk id, of a graph's link
# FAISS: k-means for an IVF index looks at so many vectors a cell, so many times.
SAMPLE, ITERATIONS = 256, 10


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of an index: embeddings, chunk ids, and what the backend keeps besides."""

    vectors: int
    ids: int
    structure: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vectors + self.ids + self.structure


def footprint(backend: Backend, count: int, dimension: int) -> Footprint:
    """The bytes of `count` float32 embeddings behind a backend; HNSW's graph in expectation.

    IVF: a row number in its cell and a cell of its row each, the centres, a size each. HNSW: 2M
    links at the bottom, M on each higher level, which a node reaches with probability M^-level
    (Malkov and Yashunin 2018, section 4.1), and a level and a place each.
    """
    match backend:
        case Shards():
            parts = [footprint(backend.inner, n, dimension) for n in backend.sizes(count)]
            structure = sum(part.structure for part in parts)
        case IVF():
            cells = cells_of(backend, count)
            structure = 2 * ID * count + cells * (FLOAT * dimension + ID)
        case HNSW(links=m):
            structure = round(count * (LINK * (2 * m + m / (m - 1)) + ID + LINK))
        case _:
            structure = 0
    return Footprint(FLOAT * count * dimension, ID * count, structure)


def work(backend: Backend, count: int) -> float:
    """What the time of a build grows with as chunks are added, in the backend's own unit.

    Flat and torch: vectors copied. IVF: distances to centres, in k-means and when vectors are put
    into their cells. HNSW: N log2 N, as each search among those already there takes log N.
    """
    match backend:
        case Shards():
            return sum(work(backend.inner, n) for n in backend.sizes(count))
        case IVF():
            cells = cells_of(backend, count)
            return float(cells * (ITERATIONS * min(count, SAMPLE * cells) + count))
        case HNSW():
            return count * math.log2(max(2, count))
        case _:
            return float(count)


def cells_of(backend: IVF, count: int) -> int:
    """How many cells the index of `count` chunks has."""
    return min(backend.nlist or round(count**0.5), count)

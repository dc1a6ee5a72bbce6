"""Random vectors, what brute force finds among them, and generations of them."""

import numpy as np

from rag2.index.base import Backend
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.types import Chunk


def unit(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Vectors of length 1."""
    vectors = rng.normal(size=(rows, size)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(
    embeddings: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of the k best, equal scores by smallest id."""
    scores = (queries.astype(np.float64) @ embeddings.astype(np.float64).T).astype(np.float32)
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), ids[order]


def generation_of(
    rng: np.random.Generator,
    backend: Backend | None = None,
    count: int = 30,
    fingerprint: str = "aa" * 32,
) -> Generation:
    """A generation of random vectors of 8 numbers."""
    ids = np.sort(rng.choice(1000, count, replace=False))
    chunks = [
        Chunk(int(i), document=f"d{i}", text=f"text {i} é", title="t", start=3, end=9) for i in ids
    ]
    index = (backend or Flat()).build(unit(rng, count, 8), ids)
    return Generation.of(
        index, chunks, encoder_fingerprint=fingerprint, kb_version=4, kb_hash="bb", step=7
    )

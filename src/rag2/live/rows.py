"""A few embeddings in memory -> exact search: what a delta needs, made anew with every change."""

from pathlib import Path
from typing import Literal

import numpy as np

from rag2.config import Config
from rag2.index.base import Backend, Blocks, Index, slices


class Rows(Index):
    """Exact by numpy alone: for few rows that costs less than handing them to a library."""

    exact = True

    def __init__(self, backend: Config, ids_N: np.ndarray, max_norm: float, vectors_ND: np.ndarray):
        super().__init__(backend, ids_N, max_norm)
        self._vectors_ND = vectors_ND

    @property
    def dimension(self) -> int:
        return self._vectors_ND.shape[1]

    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._best_of(queries_BD[p], m) for p in slices(len(queries_BD), len(self))]
        scores_BM, rows_BM = (np.concatenate(found) for found in zip(*parts, strict=True))
        return scores_BM, rows_BM

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        return self._vectors_ND[rows_M]

    def write(self, directory: Path) -> None:
        raise NotImplementedError("a delta lives in memory; its knowledge base is what is durable")

    def _best_of(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BN = queries_BD @ self._vectors_ND.T
        rows_BM = np.argpartition(-scores_BN, m - 1, axis=1)[:, :m]
        scores_BM = np.take_along_axis(scores_BN, rows_BM, axis=1)
        order_BM = np.argsort(-scores_BM, axis=1)
        best = np.take_along_axis
        return best(scores_BM, order_BM, axis=1), best(rows_BM, order_BM, axis=1)


class InMemory(Backend):
    """The settings of `Rows`, of which there are none."""

    name: Literal["in memory"] = "in memory"

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors; raises as `Blocks` does."""
        vectors = list(blocks)
        return Rows(self, blocks.ids_N, blocks.max_norm, np.concatenate(vectors))

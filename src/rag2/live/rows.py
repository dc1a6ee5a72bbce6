"""A few embeddings in memory -> exact search: what a delta needs, made anew with every change."""

from typing import Self

import numpy as np

from rag2.index.base import Blocks, Searcher, slices


class Rows(Searcher):
    """Exact by numpy alone: for few rows that costs less than handing them to a library."""

    exact = True

    def __init__(self, ids_N: np.ndarray, max_norm: float, vectors_ND: np.ndarray) -> None:
        super().__init__(ids_N, max_norm)
        self._vectors_ND = vectors_ND

    @classmethod
    def of(cls, vectors_ND: np.ndarray, ids_N: np.ndarray) -> Self:
        """Over these embeddings; raises as `Blocks` does."""
        blocks = Blocks([vectors_ND], ids_N)
        vectors_ND = np.concatenate([*blocks])
        return cls(blocks.ids_N, blocks.max_norm, vectors_ND)

    @property
    def dimension(self) -> int:
        return self._vectors_ND.shape[1]

    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        parts = [self._best_of(queries_BD[p], m) for p in slices(len(queries_BD), len(self))]
        scores_BM, rows_BM = (np.concatenate(found) for found in zip(*parts, strict=True))
        return scores_BM, rows_BM

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        return self._vectors_ND[rows_M]

    def _best_of(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        scores_BN = queries_BD @ self._vectors_ND.T
        rows_BM = np.argpartition(-scores_BN, m - 1, axis=1)[:, :m]
        scores_BM = np.take_along_axis(scores_BN, rows_BM, axis=1)
        order_BM = np.argsort(-scores_BM, axis=1)
        best = np.take_along_axis
        return best(scores_BM, order_BM, axis=1), best(rows_BM, order_BM, axis=1)

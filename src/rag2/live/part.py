"""Part of a view: an index of chunks of namespaces, searched among those that may be found.

Shapes: N rows, M of them chosen, B queries, K results, D embedding.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from rag2.index.base import SPARE, Searcher
from rag2.live.rows import Rows

FEW = 4  # below one row of so many, those that may be found are scored one by one
ROWS = 1 << 16  # so many at a time
Hits = tuple[np.ndarray, np.ndarray]  # scores_BK, ids_BK


@dataclass(frozen=True, slots=True)
class Part:
    """An index whose rows belong to namespaces; dead rows are not found."""

    index: Searcher
    rows: Mapping[str, np.ndarray]
    """of each namespace, increasing"""
    alive_N: np.ndarray
    names_N: Sequence[str | None]
    """the namespace of each row; None: it was dead from the start"""

    @classmethod
    def of(cls, index: Searcher, namespaces: Mapping[int, str]) -> Self:
        """`namespaces` of the live chunks; those of the index that it does not name are dead."""
        one: dict[str | None, str] = {name: name for name in namespaces.values()}  # not one a row
        names = [one.get(namespaces.get(id)) for id in index.ids_N.tolist()]
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name is not None:
                rows.setdefault(name, []).append(row)
        alive_N = np.array([name is not None for name in names])
        return cls(index, {name: np.array(found) for name, found in rows.items()}, alive_N, names)

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

    def namespace(self, id: int) -> str | None:
        """Where a chunk belongs; None for one that is not in this part."""
        (row,), (held,) = self.find(np.array([id], dtype=np.int64))
        return self.names_N[row] if held else None

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


def merged(found: Sequence[Hits], k: int) -> Hits:
    """The k best of several lists, each of different chunks."""
    scores_BM, ids_BM = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    order_BK = np.lexsort((ids_BM, -scores_BM), axis=1)[:, :k]
    best = np.take_along_axis
    return best(scores_BM, order_BK, axis=1), best(ids_BM, order_BK, axis=1)

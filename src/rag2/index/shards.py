"""An index in parts: each built by itself, all searched, their candidates merged in one order."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, StrictInt

from rag2.index.base import Backend, Blocks, Index
from rag2.index.exact import TorchExact
from rag2.index.flat import Flat
from rag2.index.hnsw import HNSW
from rag2.index.ivf import IVF
from rag2.registry import UserError

FILE = "shards.json"
Local = Annotated[Flat | IVF | HNSW | TorchExact, Field(discriminator="name")]


class Shards(Backend):
    """So many indexes of one kind over consecutive rows; exact if that kind is.

    What a build needs beside the index (a copy of the vectors for IVF) is that of one shard.
    """

    name: Literal["shards"] = "shards"
    count: StrictInt = Field(default=4, ge=1)
    """number of shards; no more than there are chunks"""
    inner: Local = Flat()
    """kind of each shard"""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors, one shard at a time; raises as `Blocks` does."""
        ids_N = blocks.ids_N
        stream, shards = Rows(iter(blocks)), []
        for part in self._parts(len(ids_N)):
            rows = stream.take(part.stop - part.start)
            shards.append(self.inner.fill(Blocks(rows, ids_N[part])))
        stream.finish()
        return _Shards(self, ids_N, blocks.max_norm, shards)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        told = json.loads((directory / FILE).read_text(encoding="utf-8"))
        parts = self._parts(len(ids_N))
        if len(parts) != len(told):
            raise UserError(f"{directory} holds {len(told)} shards, not {len(parts)}")
        shards = [
            self.inner.load(_folder(directory, number), ids_N[part], norm)
            for number, (part, norm) in enumerate(zip(parts, told, strict=True))
        ]
        return _Shards(self, ids_N, max_norm, shards)

    def sizes(self, rows: int) -> list[int]:
        """The number of rows in each shard."""
        return [part.stop - part.start for part in self._parts(rows)]

    def _parts(self, rows: int) -> list[slice]:
        """The rows of each shard: consecutive, in equal parts up to one row."""
        count = min(self.count, rows)
        cuts = [rows * i // count for i in range(count + 1)]
        return [slice(*pair) for pair in zip(cuts, cuts[1:], strict=False)]


class Rows:
    """Blocks [M, D] of a stream, cut anew where one reader wants so many rows and then another."""

    def __init__(self, blocks: Iterator[np.ndarray]) -> None:
        self._blocks = blocks
        self._rest = np.empty((0, 0), dtype=np.float32)

    def take(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` rows, in blocks; fewer where the stream ends."""
        while count:
            if not len(self._rest):
                self._rest = next(self._blocks, self._rest)
            if not len(self._rest):
                return
            block_MD, self._rest = self._rest[:count], self._rest[count:]
            count -= len(block_MD)
            yield block_MD

    def finish(self) -> None:
        """Read to the end, so that the stream tells what is wrong with its length."""
        for _ in self._blocks:
            pass


class _Shards(Index):
    """Row r of the whole is row r - first of the shard that begins at `first`."""

    def __init__(
        self, backend: Shards, ids_N: np.ndarray, max_norm: float, shards: list[Index]
    ) -> None:
        super().__init__(backend, ids_N, max_norm)
        self.exact = all(shard.exact for shard in shards)
        self._shards = shards
        self._firsts = np.cumsum([0, *(len(shard) for shard in shards[:-1])])

    @property
    def dimension(self) -> int:
        return self._shards[0].dimension

    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        # A row that a shard leaves out scores at most that shard's last, and so does the merged
        # list's last score at least: what is exact of every shard is exact of the whole.
        found = [shard.candidates(queries_BD, min(m, len(shard))) for shard in self._shards]
        scores_BM = np.concatenate([scores for scores, _ in found], axis=1)
        rows_BM = np.concatenate(
            [
                np.where(rows >= 0, rows + first, -1)
                for (_, rows), first in zip(found, self._firsts, strict=True)
            ],
            axis=1,
        )
        scores_BM = np.where(rows_BM >= 0, scores_BM, -np.inf)
        order_BM = np.argsort(-scores_BM, axis=1, kind="stable")[:, :m]
        best = np.take_along_axis
        return best(scores_BM, order_BM, axis=1), best(rows_BM, order_BM, axis=1)

    def rounding(self, queries_BD: np.ndarray) -> np.ndarray:
        return np.max([shard.rounding(queries_BD) for shard in self._shards], axis=0)

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        vectors_MD = np.empty((len(rows_M), self.dimension), dtype=np.float32)
        shard_M = np.searchsorted(self._firsts, rows_M, side="right") - 1
        for number in np.unique(shard_M):
            here = shard_M == number
            vectors_MD[here] = self._shards[number].vectors(rows_M[here] - self._firsts[number])
        return vectors_MD

    def write(self, directory: Path) -> None:
        for number, shard in enumerate(self._shards):
            folder = _folder(directory, number)
            folder.mkdir()
            shard.write(folder)
        norms = json.dumps([shard.max_norm for shard in self._shards])
        (directory / FILE).write_text(norms + "\n", encoding="utf-8")


def _folder(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:04d}"

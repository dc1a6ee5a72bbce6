"""Embeddings and chunk ids -> an index; question embeddings -> the k best chunk ids.

What FAISS does at its edges (NaN makes rows vanish, -1 pads short lists, ties fall anywhere) ends
in this module: everything that comes in is checked, and every score that goes out was computed
from the stored vectors in one fixed order, so that all exact backends agree to the last bit.

Shapes: N indexed chunks, B queries, K results, M candidates, D embedding.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from einops import einsum, rearrange
from safetensors.numpy import load_file, save_file

from rag2.config import Config
from rag2.registry import UserError, lookup

FORMAT = "rag2.index/1"
SPARE = 16  # candidates fetched beyond k, among which ties are settled
BLOCK = 1 << 22  # numbers of float64 (32 MiB) that a block of exact scores may take


class Searcher(ABC):
    """Immutable: vectors and their chunk ids. Searching from several threads is safe."""

    exact: bool
    """Whether `candidates` misses no row that scores higher than those it returns."""

    def __init__(self, ids_N: np.ndarray, max_norm: float) -> None:
        self.ids_N = ids_N
        self.max_norm = max_norm

    @property
    @abstractmethod
    def dimension(self) -> int:
        """D, the length of an embedding."""

    @abstractmethod
    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Inner products and rows [B, m], best first, both approximate; row -1 stands for none."""

    @abstractmethod
    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        """The stored float32 embeddings [M, D] of rows."""

    def __len__(self) -> int:
        return len(self.ids_N)

    def search(self, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest inner products of each query and their chunk ids, [B, k] each.

        Best first, equal scores by smallest id; float32 and int64. Raises UserError unless
        1 <= k <= len(self), ValueError for a query of the wrong size or one that is not finite.
        """
        if not 1 <= k <= len(self):
            raise UserError(f"k={k} is not between 1 and the {len(self)} chunks of the index")
        queries_BD = checked(queries_BD, "query")
        if queries_BD.shape[1] != self.dimension:
            size = queries_BD.shape[1]
            raise ValueError(f"queries have {size} dimensions, the index {self.dimension}")
        scores_BK = np.empty((len(queries_BD), k), dtype=np.float32)
        rows_BK = np.empty((len(queries_BD), k), dtype=np.int64)
        open_B = np.arange(len(queries_BD))
        for wanted in (k + SPARE, 8 * (k + SPARE)):
            if not open_B.size:
                break
            m = min(wanted, len(self))
            approximate_BM, found_BM = self.candidates(queries_BD[open_B], m)
            scores_BK[open_B], rows_BK[open_B], short_B = self._best(
                queries_BD[open_B], found_BM, k
            )
            left_B = short_B
            if self.exact and m < len(self):
                # A row outside scores at most the last candidate's, up to fp32 rounding.
                limit_B = approximate_BM[:, -1] + self.rounding(queries_BD[open_B])
                left_B = short_B | (limit_B >= scores_BK[open_B, -1])
            open_B = open_B[left_B]
        for part in slices(len(open_B), len(self)):
            left_B = open_B[part]
            scores_BK[left_B], rows_BK[left_B] = self._scan(queries_BD[left_B], k)
        assert np.isfinite(scores_BK).all() and (rows_BK >= 0).all()
        return scores_BK, self.ids_N[rows_BK]

    def _best(
        self, queries_BD: np.ndarray, rows_BM: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and rows of the k best candidates, and which queries have fewer than k of them."""
        short_B = (rows_BM >= 0).sum(axis=1) < k
        scores_BM = np.concatenate(
            [
                self._scores(queries_BD[part], rows_BM[part])
                for part in slices(len(queries_BD), rows_BM.shape[1] * self.dimension)
            ]
        )
        order_BK = np.lexsort((self.ids_N[rows_BM], -scores_BM), axis=1)[:, :k]
        best = np.take_along_axis
        return best(scores_BM, order_BK, axis=1), best(rows_BM, order_BK, axis=1), short_B

    def _scores(self, queries_BD: np.ndarray, rows_BM: np.ndarray) -> np.ndarray:
        """Inner products summed in float64 in one fixed order, as float32; -inf for row -1."""
        vectors = self.vectors(rearrange(np.maximum(rows_BM, 0), "b m -> (b m)"))
        vectors_BMD = rearrange(vectors.astype(np.float64), "(b m) d -> b m d", m=rows_BM.shape[1])
        scores_BM = einsum(queries_BD.astype(np.float64), vectors_BMD, "b d, b m d -> b m")
        return np.where(rows_BM >= 0, scores_BM, -np.inf).astype(np.float32)

    def _scan(self, queries_BD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best of all rows: for long runs of near-ties, and for what a graph cannot reach."""
        rows_N = np.arange(len(self))
        parts = [rows_N[part] for part in slices(len(self), self.dimension)]
        wide_BD = queries_BD.astype(np.float64)
        products = [wide_BD @ self.vectors(rows).astype(np.float64).T for rows in parts]
        rough_BN = np.concatenate(products, axis=1)
        least_B = np.partition(rough_BN, len(self) - k, axis=1)[:, len(self) - k]
        # What rounds to the same float32 as the k-th best is a tie, for the ids to settle.
        least_B -= 2.0**-22 * np.linalg.norm(queries_BD, axis=1) * self.max_norm
        found = []
        for query_D, rough_N, least in zip(queries_BD, rough_BN, least_B, strict=True):
            rows_M = rows_N[rough_N >= least]
            blocks = [rows_M[part] for part in slices(len(rows_M), self.dimension)]
            scores_M = np.concatenate([self._scores(query_D[None], b[None])[0] for b in blocks])
            order_K = np.lexsort((self.ids_N[rows_M], -scores_M))[:k]
            found.append((scores_M[order_K], rows_M[order_K]))
        scores_BK, rows_BK = zip(*found, strict=True)
        return np.stack(scores_BK), np.stack(rows_BK)

    def rounding(self, queries_BD: np.ndarray) -> np.ndarray:
        """A bound on the error of the scores that `candidates` returns, per query."""
        norms_B = np.linalg.norm(queries_BD, axis=1)
        return 4 * np.sqrt(self.dimension) * 2.0**-24 * norms_B * self.max_norm


class Index(Searcher):
    """What a backend has built, and can write."""

    def __init__(self, backend: Config, ids_N: np.ndarray, max_norm: float) -> None:
        super().__init__(ids_N, max_norm)
        self.backend = backend

    @abstractmethod
    def write(self, directory: Path) -> None:
        """Write the vectors and what the backend built on them."""

    def save(self, directory: str | Path) -> None:
        """Write the index into an existing directory, to be read by `load`."""
        root = Path(directory)
        self.write(root)
        save_file({"ids": self.ids_N}, root / "ids.safetensors")
        record = {
            "format": FORMAT,
            "backend": self.backend.model_dump(mode="json"),
            "count": len(self),
            "dimension": self.dimension,
            "max_norm": self.max_norm,
        }
        (root / "index.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load(directory: str | Path) -> Index:
    """The index that `save` wrote. Verify the artifact around it first: FAISS parses its file.

    Raises UserError for an unknown format or backend and for files that do not fit together.
    """
    root = Path(directory)
    try:
        record = json.loads((root / "index.json").read_text(encoding="utf-8"))
        form, count, dimension = record["format"], record["count"], record["dimension"]
        settings, max_norm = record["backend"], float(record["max_norm"])
        backend: Any = lookup("index", settings["name"]).model_validate(settings)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root} holds no index ({str(error).splitlines()[0]})") from None
    if form != FORMAT:
        raise UserError(f"{root} holds an index of format {form!r}; this version reads {FORMAT}")
    ids_N = checked_ids(load_file(root / "ids.safetensors")["ids"])
    index: Index = backend.load(root, ids_N, max_norm)
    if not len(ids_N) == count or not index.dimension == dimension:
        raise UserError(f"{root}: ids, vectors and index.json do not belong together")
    return index


def discard(directory: str | Path) -> None:
    """Remove what a saved index has outside its directory; nothing where none was saved.

    Raises UserError when it lies on a server that does not answer.
    """
    try:
        record = json.loads((Path(directory) / "index.json").read_text(encoding="utf-8"))
        settings = record["backend"]
        backend: Any = lookup("index", settings["name"]).model_validate(settings)
    except (OSError, KeyError, TypeError, ValueError):
        return
    backend.discard(Path(directory))


def checked(vectors_MD: np.ndarray, kind: str, first: int = 0) -> np.ndarray:
    """The vectors as contiguous float32; UserError names the first that is not finite.

    The vectors are counted from `first`.
    """
    vectors_MD = np.ascontiguousarray(vectors_MD, dtype=np.float32)
    if vectors_MD.ndim != 2:
        raise ValueError(f"{kind} vectors must have the shape [rows, D], not {vectors_MD.shape}")
    wrong = np.flatnonzero(~np.isfinite(vectors_MD).all(axis=1))
    if wrong.size:
        raise UserError(f"{kind} {first + wrong[0]} is not finite")
    return vectors_MD


def checked_ids(ids_N: np.ndarray) -> np.ndarray:
    """The chunk ids as int64; raises ValueError for a negative or repeated one."""
    if ids_N.ndim != 1 or not np.issubdtype(ids_N.dtype, np.integer):
        raise ValueError(f"chunk ids must be a list of integers, not {ids_N.dtype} {ids_N.shape}")
    ids_N = ids_N.astype(np.int64)
    ids_N.setflags(write=False)
    if (ids_N < 0).any():
        raise ValueError(f"chunk id {ids_N[ids_N < 0][0]} is negative")
    unique, counts = np.unique(ids_N, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"chunk id {unique[counts > 1][0]} occurs more than once")
    return ids_N


class Blocks:
    """Embeddings that come in blocks of rows [M, D], each checked; together as many as the ids."""

    def __init__(self, blocks: Iterable[np.ndarray], ids_N: np.ndarray) -> None:
        """Raises UserError when there is nothing to index, ValueError as `checked_ids` does."""
        self.ids_N = checked_ids(np.asarray(ids_N))
        if not len(self.ids_N):
            raise UserError("there are no chunks to index")
        self.max_norm = 0.0
        self._blocks = blocks

    def __iter__(self) -> Iterator[np.ndarray]:
        """The blocks, once. Raises ValueError as `checked` does, and for another number of rows."""
        count = 0
        for block_MD in self._blocks:
            block_MD = checked(block_MD, "embedding", count)
            count += len(block_MD)
            if len(block_MD):
                norms_M = np.linalg.norm(block_MD, axis=1)
                self.max_norm = max(self.max_norm, float(norms_M.max()))
                yield block_MD
        if count != len(self.ids_N):
            raise ValueError(f"{count} embeddings, but {len(self.ids_N)} chunk ids")


class Backend(Config):
    """A kind of index and its settings."""

    @abstractmethod
    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors; raises as `Blocks` does."""

    def build(self, embeddings_ND: np.ndarray, ids_N: np.ndarray) -> Index:
        """The index over embeddings that are all there; raises as `Blocks` does."""
        return self.fill(Blocks([embeddings_ND], ids_N))

    def discard(self, directory: Path) -> None:
        """Remove what a saved index of this kind has outside its directory: nothing, as a rule."""


def slices(count: int, numbers_each: int) -> list[slice]:
    """Consecutive slices over `count` rows whose numbers stay within BLOCK."""
    step = max(1, BLOCK // max(1, numbers_each))
    return [slice(start, start + step) for start in range(0, count, step)]

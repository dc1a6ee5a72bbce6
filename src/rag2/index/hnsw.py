"""Approximate search along a graph of near neighbours (FAISS IndexHNSWFlat)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictInt

from rag2.index.base import Backend, Blocks, Index
from rag2.index.flat import FaissIndex, filled, import_faiss, read


class HNSW(Backend):
    """Hierarchical navigable small worlds (Malkov and Yashunin 2018), by inner product.

    A query that reaches fewer than k chunks is searched exactly. FAISS inserts from several threads
    at once: only a build with one thread (OMP_NUM_THREADS=1) gives the same graph every time.
    """

    name: Literal["hnsw"] = "hnsw"
    links: StrictInt = Field(default=32, ge=2)
    """M: neighbours of a node, per level."""
    ef_construction: StrictInt = Field(default=200, ge=1)
    """Candidates kept while a node's neighbours are chosen."""
    ef_search: StrictInt = Field(default=64, ge=1)
    """Candidates kept while searching: recall against speed."""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors; raises as `Blocks` does."""
        faiss = import_faiss()

        def empty(dimension: int) -> Any:
            index = faiss.IndexHNSWFlat(dimension, self.links, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = self.ef_construction
            return index

        index = filled(blocks, empty, lambda index: faiss.downcast_index(index.storage))
        return _Graph(self, blocks.ids_N, blocks.max_norm, index, exact=False)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        return _Graph(self, ids_N, max_norm, read(directory), exact=False)


class _Graph(FaissIndex):
    """Searches with at least as many candidates as results are wanted."""

    backend: HNSW

    def parameters(self, m: int) -> Any:
        """Per call, because changing the index itself would race with other searches."""
        return import_faiss().SearchParametersHNSW(efSearch=max(self.backend.ef_search, m))

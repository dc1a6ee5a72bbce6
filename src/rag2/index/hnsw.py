"""Approximate search along a graph of near neighbours (FAISS IndexHNSWFlat)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictInt

from rag2.config import Config
from rag2.index.base import Index, prepared
from rag2.index.flat import FaissIndex, import_faiss, read


class HNSW(Config):
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

    def build(self, embeddings_ND: np.ndarray, ids_N: np.ndarray) -> Index:
        """The index over embeddings; raises as `base.prepared` does."""
        faiss = import_faiss()
        embeddings_ND, ids_N, max_norm = prepared(embeddings_ND, ids_N)
        metric = faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexHNSWFlat(embeddings_ND.shape[1], self.links, metric)
        index.hnsw.efConstruction = self.ef_construction
        index.add(embeddings_ND)
        return _Graph(self, ids_N, max_norm, index, exact=False)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        return _Graph(self, ids_N, max_norm, read(directory), exact=False)


class _Graph(FaissIndex):
    """Searches with at least as many candidates as results are wanted."""

    backend: HNSW

    def parameters(self, m: int) -> Any:
        """Per call, because changing the index itself would race with other searches."""
        return import_faiss().SearchParametersHNSW(efSearch=max(self.backend.ef_search, m))

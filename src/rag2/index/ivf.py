"""Approximate search in the cells nearest to the query (FAISS IndexIVFFlat)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, StrictInt

from rag2.index.base import Backend, Blocks, Index
from rag2.index.flat import FaissIndex, import_faiss, read


class IVF(Backend):
    """k-means cells (Jegou et al. 2011), of which `nprobe` are searched: recall against speed.

    Searching every cell is exact. A query whose cells hold fewer than k chunks is searched exactly.
    """

    name: Literal["ivf"] = "ivf"
    nlist: StrictInt | None = Field(default=None, ge=1)
    """Number of cells; null: the square root of the number of chunks."""
    nprobe: StrictInt = Field(default=16, ge=1)
    device: Literal["auto", "cpu"] = "auto"
    """auto: the first GPU, where FAISS is built for GPUs and sees one."""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors, held beside it at first; raises as `Blocks` does.

        Cells come from all of the corpus: the first blocks may be about one thing.
        """
        faiss = import_faiss()
        embeddings_ND = np.concatenate(list(blocks))
        count = len(embeddings_ND)
        nlist = min(self.nlist or round(count**0.5), count)
        dimension = embeddings_ND.shape[1]
        quantizer = faiss.IndexFlatIP(dimension)
        index = faiss.IndexIVFFlat(quantizer, dimension, nlist, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # else FAISS warns about small corpora on stderr
        index.nprobe = min(self.nprobe, nlist)
        index.train(embeddings_ND)
        index.add(embeddings_ND)
        return self._wrap(index, blocks.ids_N, blocks.max_norm)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        return self._wrap(read(directory), ids_N, max_norm)

    def _wrap(self, index: Any, ids_N: np.ndarray, max_norm: float) -> Index:
        """The FAISS index with a map from row to cell, through which vectors are read back."""
        index.make_direct_map()
        return FaissIndex(self, ids_N, max_norm, index, exact=index.nprobe == index.nlist)

"""The FAISS backends' common ground, and exact search by brute force (IndexFlatIP)."""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from rag2.config import Config
from rag2.index.base import Backend, Blocks, Index
from rag2.registry import UserError

FILE = "index.faiss"
GPU_LARGEST_M = 2048  # FAISS on a GPU returns no longer lists


class FaissIndex(Index):
    """A FAISS index whose rows are positions in `ids_N`; it lives on the CPU, a copy on a GPU."""

    def __init__(
        self, backend: Config, ids_N: np.ndarray, max_norm: float, faiss_index: Any, exact: bool
    ) -> None:
        super().__init__(backend, ids_N, max_norm)
        if faiss_index.ntotal != len(ids_N):
            raise UserError(f"{len(ids_N)} chunk ids, but {faiss_index.ntotal} indexed vectors")
        self.exact = exact
        self._index = faiss_index
        self._gpu = on_gpu(faiss_index) if getattr(backend, "device", "cpu") == "auto" else None
        self._lock = Lock()  # FAISS on a GPU is not thread-safe even for reading

    @property
    def dimension(self) -> int:
        return self._index.d

    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        if self._gpu is not None and m <= GPU_LARGEST_M:
            with self._lock:
                return self._gpu.search(queries_BD, m)
        return self._index.search(queries_BD, m, params=self.parameters(m))

    def parameters(self, m: int) -> Any:
        """FAISS search parameters for lists of m, or None for those of the index."""
        return None

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        return self._index.reconstruct_batch(rows_M)

    def write(self, directory: Path) -> None:
        import_faiss().write_index(self._index, str(directory / FILE))


class Flat(Backend):
    """Exact search over all vectors; below about a million chunks the best choice for training."""

    name: Literal["flat"] = "flat"
    device: Literal["auto", "cpu"] = "auto"
    """auto: the first GPU, where FAISS is built for GPUs and sees one."""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors; raises as `Blocks` does."""
        index = filled(blocks, import_faiss().IndexFlatIP, lambda index: index)
        return FaissIndex(self, blocks.ids_N, blocks.max_norm, index, exact=True)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        return FaissIndex(self, ids_N, max_norm, read(directory), exact=True)


def import_faiss() -> Any:
    """The faiss module; raises UserError when it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "this index needs FAISS: pip install 'rag2[cpu]', or set index.name=torch"
        ) from None
    return faiss


def filled(blocks: Blocks, make: Callable[[int], Any], flat: Callable[[Any], Any]) -> Any:
    """The FAISS index that `make(D)` returns, with the blocks added; `flat(index)` stores vectors.

    Their memory is taken at once: growing by doubling, it would be copied, and need thrice as much.
    """
    index = None
    for block_MD in blocks:
        if index is None:
            index = make(block_MD.shape[1])
            flat(index).codes.resize(4 * len(blocks.ids_N) * block_MD.shape[1])
        index.add(block_MD)
    return index


def read(directory: Path) -> Any:
    """The FAISS index in a directory whose bytes have been verified."""
    return import_faiss().read_index(str(directory / FILE))


def on_gpu(index: Any) -> Any:
    """A copy of `index` on the first GPU, or None where FAISS has or sees none."""
    faiss = import_faiss()
    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        return None
    resources = faiss.StandardGpuResources()
    return _GpuCopy(faiss.index_cpu_to_gpu(resources, 0, index), resources)


class _GpuCopy:
    """A GPU index and the resources that must outlive it (SWIG objects take no attributes)."""

    def __init__(self, index: Any, resources: Any) -> None:
        self._index, self._resources = index, resources

    def search(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        """As FAISS's own."""
        return self._index.search(queries_BD, m)

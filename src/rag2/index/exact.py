"""Exact search in torch, on any device and without FAISS."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from rag2.index.base import Backend, Blocks, Index
from rag2_kernels import mips_topk

FILE = "vectors.safetensors"


class TorchExact(Backend):
    """Exact search over all vectors, without the scores of all of them at once."""

    name: Literal["torch"] = "torch"
    device: str = "auto"
    """A torch device; auto: cuda where there is one, else cpu."""

    def fill(self, blocks: Blocks) -> Index:
        """The index of the blocks' vectors; raises as `Blocks` does."""
        vectors_ND, done = np.empty((0, 0), dtype=np.float32), 0
        for block_MD in blocks:
            if not done:
                vectors_ND = np.empty((len(blocks.ids_N), block_MD.shape[1]), dtype=np.float32)
            stop = done + len(block_MD)
            vectors_ND[done:stop] = block_MD[
                : len(vectors_ND) - done
            ]  # more are refused at the end
            done = stop
        return _TorchIndex(self, blocks.ids_N, blocks.max_norm, vectors_ND)

    def load(self, directory: Path, ids_N: np.ndarray, max_norm: float) -> Index:
        """The index in a directory whose bytes have been verified."""
        vectors_ND = load_file(directory / FILE)["vectors"]
        return _TorchIndex(self, ids_N, max_norm, vectors_ND)


class _TorchIndex(Index):
    """Vectors on the device for searching, and on the CPU for the exact scores."""

    backend: TorchExact
    exact = True

    def __init__(
        self, backend: TorchExact, ids_N: np.ndarray, max_norm: float, vectors_ND: np.ndarray
    ) -> None:
        super().__init__(backend, ids_N, max_norm)
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(found if backend.device == "auto" else backend.device)
        self._vectors_ND = vectors_ND
        self._search_ND = torch.from_numpy(self._vectors_ND).to(self._device)

    @property
    def dimension(self) -> int:
        return self._vectors_ND.shape[1]

    @torch.no_grad()
    def candidates(self, queries_BD: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
        queries = torch.from_numpy(queries_BD).to(self._device)
        scores_BM, rows_BM = mips_topk(queries, self._search_ND, m)
        return scores_BM.cpu().numpy(), rows_BM.cpu().numpy()

    def rounding(self, queries_BD: np.ndarray) -> np.ndarray:
        # torch.set_float32_matmul_precision, popular in training, lets products round their inputs.
        inputs = {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-7}
        allowed = inputs[torch.get_float32_matmul_precision()]
        norms_B = np.linalg.norm(queries_BD, axis=1)
        # A row outside errs, the last one inside errs, and once more where it is scored again.
        return 3 * (super().rounding(queries_BD) + allowed * norms_B * self.max_norm)

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        return self._vectors_ND[rows_M]

    def write(self, directory: Path) -> None:
        save_file({"vectors": self._vectors_ND}, directory / FILE)

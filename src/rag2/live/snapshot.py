"""The chunks at a version -> a generation, while changes go on."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rag2.index.base import Backend, Blocks
from rag2.index.generation import SCHEMA, Generation
from rag2.live.view import Embedder, View, not_finite
from rag2.registry import UserError
from rag2.reindex.build import Passages
from rag2.retriever.embed import WINDOW
from rag2.types import Chunk


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The chunks at a version, to build a generation of, in any thread."""

    version: int
    kb_hash: str
    chunks: pa.Table
    embedder: Embedder
    view: View | None
    """what is encoded already"""

    def build(self, backend: Backend) -> Generation | None:
        """The generation of all the chunks; None if there are none.

        Raises UserError for a chunk whose embedding is not finite.
        """
        if not len(self.chunks):
            return None
        index = backend.fill(Blocks(self._blocks(), self.chunks.column("id").to_numpy()))
        made_by, count = self.embedder.fingerprint, len(self.chunks)
        return Generation(index, self.chunks, made_by, self.version, self.kb_hash, 0, count)

    def _blocks(self) -> Iterator[np.ndarray]:
        """Embeddings [M, D] of WINDOW chunks at a time; known ones are taken as they are."""
        ids_N, passages = self.chunks.column("id").to_numpy(), Passages(self.chunks)
        for start in range(0, len(ids_N), WINDOW):
            ids_M = ids_N[start : start + WINDOW]
            if self.view is None:
                vectors_MD = self.embedder.embed(passages[start : start + WINDOW], "chunk")
                yield self._finite(vectors_MD, start)
                continue
            vectors_MD, known_M = self.view.known(ids_M)
            new = np.flatnonzero(~known_M)
            if new.size:
                texts = [passages[start + row] for row in new.tolist()]
                vectors_MD[new] = self.embedder.embed(texts, "chunk")
            yield self._finite(vectors_MD, start)

    def _finite(self, vectors_MD: np.ndarray, start: int) -> np.ndarray:
        """Embeddings from a row on, all finite; raises UserError that names the first other one."""
        wrong = np.flatnonzero(~np.isfinite(vectors_MD).all(axis=1))
        if wrong.size:
            row = start + int(wrong[0])
            chunk = Chunk(**{name: self.chunks.column(name)[row].as_py() for name in SCHEMA.names})
            raise UserError(f"{not_finite(chunk)}; no generation was made")
        return vectors_MD

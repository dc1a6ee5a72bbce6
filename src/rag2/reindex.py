"""The index that training searches while the weights move: search, refresh, poll."""

import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from rag2 import artifact
from rag2.config import Config
from rag2.index.base import Index
from rag2.index.generation import Generation
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk


class Policy(Protocol):
    """When to re-encode the corpus."""

    def due(self, step: int) -> bool:
        """Whether a refresh starts after `step`."""
        ...


class NoRefresh(Config):
    """Keep the first index: its candidates are those of the encoder that training began with."""

    name: Literal["none"] = "none"

    def due(self, step: int) -> bool:
        """Never."""
        return False


class SyncRefresh(Config):
    """Stop and re-encode the corpus every `every` steps (as Atlas does, Izacard et al. 2022)."""

    name: Literal["sync"] = "sync"
    every: int = Field(default=100, ge=1)

    def due(self, step: int) -> bool:
        """True after every `every`-th step."""
        return (step + 1) % self.every == 0


class Backend(Protocol):
    """An index configuration that can build itself."""

    def build(self, embeddings_ND: np.ndarray, ids_N: np.ndarray) -> Index:
        """The index of these vectors and chunk ids."""
        ...


class Reindexer:
    """Chunks and today's encoder -> committed generations 000000, 000001, ... of a directory."""

    def __init__(
        self,
        directory: Path,
        chunks: Sequence[Chunk],
        encoder: DualEncoder,
        backend: Backend,
        kb_version: int,
        kb_hash: str,
        keep: bool = True,
    ) -> None:
        """`keep=False` commits nothing: of several processes that train together one does."""
        self.directory, self.chunks, self.encoder, self.backend = (
            directory,
            chunks,
            encoder,
            backend,
        )
        self.kb = {"kb_version": kb_version, "kb_hash": kb_hash}
        self.keep, self.number = keep, -1

    def build(self, step: int) -> Generation:
        """Encode every chunk with the weights of `step`; commit the result, if it is kept."""
        embeddings_ND = embed_corpus(self.encoder, [chunk.passage for chunk in self.chunks])
        index = self.backend.build(embeddings_ND, np.array([chunk.id for chunk in self.chunks]))
        generation = Generation.of(
            index,
            self.chunks,
            encoder_fingerprint=self.encoder.fingerprint(),
            step=step,
            **self.kb,
        )
        self.number += 1
        if not self.keep:
            return generation
        # A run that continues from a checkpoint builds again what it had built after it.
        self.prune(range(self.number))
        generation.save(self._path(self.number), pointer=self.directory / "current")
        return generation

    def load(self, number: int) -> Generation:
        """A committed generation, its bytes verified, as the one to count on from."""
        self.number = number
        return Generation.load(self._path(number))

    def prune(self, keep: Collection[int]) -> None:
        """Remove every generation that is not in `keep`, and what a killed build left behind."""
        if not self.keep:
            return
        artifact.sweep(self.directory)
        for path in self.directory.glob("[0-9]" * 6):
            if int(path.name) not in keep:
                shutil.rmtree(path)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}"


class LiveIndex:
    """One published generation to search, at most one pending; the swap happens in `poll`."""

    def __init__(
        self, generation: Generation, build: Callable[[int], Generation], policy: Policy
    ) -> None:
        self.generation, self._build, self._policy = generation, build, policy
        self._pending: Generation | None = None
        self._published = time.monotonic()

    def search(self, queries_BD: np.ndarray, k: int) -> np.ndarray:
        """Chunk ids_BK, best first, by the weights of `generation.step`; none for k = 0."""
        if k == 0:
            return np.zeros((len(queries_BD), 0), dtype=np.int64)
        return self.generation.index.search(queries_BD, k)[1]

    def refresh(self, step: int) -> None:
        """Build the next generation if the policy says that one is due after `step`."""
        if self._policy.due(step):
            self._pending = self._build(step + 1)

    def poll(self) -> bool:
        """Swap in the pending generation, if there is one; True when the index changed."""
        if self._pending is None:
            return False
        self.generation, self._pending = self._pending, None
        self._published = time.monotonic()
        return True

    def age(self, step: int) -> tuple[int, float]:
        """Optimizer steps since the generation's weights were taken, and seconds since its swap."""
        return step - self.generation.step, time.monotonic() - self._published

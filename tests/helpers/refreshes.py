"""Weights that move, generations that are compared, and a worker without a process."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from rag2.index.flat import Flat
from rag2.index.generation import Generation, table_of
from rag2.reindex import build, worker
from rag2.reindex.worker import Spec
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from small_world import roughen


def moved(encoder: DualEncoder) -> None:
    """What training does to the encoder."""
    roughen(encoder.towers, 0.05)


def rebuilt(snapshot: Path, chunks: list[Chunk], step: int) -> Generation:
    """A generation from scratch, of an encoder as it was saved."""
    encoder = DualEncoder.load(snapshot / "encoder")
    return build.generation(encoder, table_of(chunks), Flat(device="cpu"), step, 1, "h")


def same(a: Generation, b: Generation) -> bool:
    """Equal to the bit: vectors, ids, texts and what is told of them."""
    rows = np.arange(len(a))
    vectors = np.array_equal(a.index.vectors(rows), b.index.vectors(rows))
    told = (a.encoder_fingerprint, a.step, a.kb_hash) == (b.encoder_fingerprint, b.step, b.kb_hash)
    return vectors and told and a.chunks.equals(b.chunks)


class Inline:
    """In place of the process: the same work here and now, told as done after `slow` looks."""

    slow = 0
    spoil: Callable[[Path, int], None] = staticmethod(lambda directory, number: None)
    launched: ClassVar[list[Path]] = []

    def __init__(self, command: Sequence[str], log: Path, threads: int, patience: float) -> None:
        spec = Spec.model_validate_json(Path(command[-1]).read_text())
        self.pid, self.looks = os.getpid(), self.slow
        worker.work(spec, lambda done, total: None)
        self.launched.append(Path(spec.directory))
        self.spoil(Path(spec.directory), len(self.launched))

    def finished(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self, seconds: float = math.inf) -> bool:
        """As soon as it is asked to wait without end; else one look."""
        return seconds == math.inf or self.finished()

    def kill(self) -> None: ...

"""An encoder and the chunks of a corpus -> a generation that training can search."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from rag2.index.base import Backend, Blocks
from rag2.index.generation import Generation
from rag2.modes import matmul
from rag2.retriever.embed import WINDOW, embed_blocks, embed_corpus
from rag2.retriever.encoder import DualEncoder


class Passages(Sequence[str]):
    """What the encoder reads of each chunk of an Arrow table, made when asked for."""

    def __init__(self, chunks: pa.Table) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, int):
            return self[place : place + 1][0]
        start, stop, _ = place.indices(len(self))
        part = self.chunks.slice(start, stop - start)
        titles, texts = (part.column(name).to_pylist() for name in ("title", "text"))
        return [f"{a}\n{b}" if a else b for a, b in zip(titles, texts, strict=True)]


@dataclass(frozen=True, slots=True)
class Part:
    """The rows [M] of a generation that are encoded anew; the others keep its embeddings."""

    old: Generation
    rows_M: np.ndarray


def generation(
    encoder: DualEncoder,
    chunks: pa.Table,
    backend: Backend,
    step: int,
    kb_version: int,
    kb_hash: str,
    progress: Callable[[int, int], None] | None = None,
    part: Part | None = None,
) -> Generation:
    """The chunks, or a part of them, encoded as the encoder is now, behind a new index.

    Batches have the same shapes and products the same precision wherever it runs, so that a
    worker's generation is that of training itself to the bit, on as many threads.
    """
    with matmul("highest"):
        blocks = (
            embed_blocks(encoder, Passages(chunks), progress=progress)
            if part is None
            else _renewed(encoder, part, progress)
        )
        index = backend.fill(Blocks(blocks, chunks.column("id").to_numpy()))
    encoded = len(chunks) if part is None else len(part.rows_M)
    return Generation(index, chunks, encoder.fingerprint(), kb_version, kb_hash, step, encoded)


def _renewed(
    encoder: DualEncoder, part: Part, progress: Callable[[int, int], None] | None
) -> Iterator[np.ndarray]:
    """The old embeddings [W, D] of WINDOW rows at a time, those of the part encoded anew."""
    old, rows_M, done = part.old, part.rows_M, 0
    for start in range(0, len(old), WINDOW):
        rows_W = np.arange(start, min(start + WINDOW, len(old)))
        block_WD = old.index.vectors(rows_W).copy()
        new = rows_M[(rows_M >= start) & (rows_M <= rows_W[-1])]
        texts = Passages(old.chunks.take(new))

        def told(more: int, _: int, before: int = done) -> None:
            if progress is not None:
                progress(before + more, len(rows_M))

        block_WD[new - start] = embed_corpus(encoder, texts, progress=told)
        done += len(new)
        yield block_WD

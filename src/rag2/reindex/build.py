"""An encoder and the chunks of a corpus -> a generation that training can search."""

from collections.abc import Callable, Sequence
from typing import overload

import pyarrow as pa

from rag2.index.base import Backend, Blocks
from rag2.index.generation import Generation
from rag2.modes import matmul
from rag2.retriever.embed import embed_blocks
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


def generation(
    encoder: DualEncoder,
    chunks: pa.Table,
    backend: Backend,
    step: int,
    kb_version: int,
    kb_hash: str,
    progress: Callable[[int, int], None] | None = None,
) -> Generation:
    """The chunks, encoded as the encoder is now, behind a new index.

    Batches have the same shapes and products the same precision wherever it runs, so that a
    worker's generation is that of training itself to the bit, on as many threads.
    """
    with matmul("highest"):
        blocks = embed_blocks(encoder, Passages(chunks), progress=progress)
        index = backend.fill(Blocks(blocks, chunks.column("id").to_numpy()))
    return Generation(index, chunks, encoder.fingerprint(), kb_version, kb_hash, step)

"""An encoder and a corpus, in pieces on any number of machines -> one generation of all of it.

A piece is what `build.generation` encodes at a time, committed by itself: the generation made of
pieces is the one that a single process makes, to the bit (on equal hardware and threads), and what
a killed process loses is one piece.

Shapes: M chunks of a piece, D embedding.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import load_file, save_file

from rag2 import artifact
from rag2.index.base import Backend, Blocks
from rag2.index.generation import Generation, table_of
from rag2.kb.store import KnowledgeBase
from rag2.modes import matmul
from rag2.registry import UserError
from rag2.reindex.build import Passages
from rag2.retriever.embed import WINDOW, embed_corpus
from rag2.retriever.encoder import DualEncoder

KIND = "embeddings"
FILE = "embeddings.safetensors"


@dataclass(frozen=True)
class Pieces:
    """The chunks of a corpus, `size` to a piece; `directory` holds those that are encoded."""

    encoder: DualEncoder
    chunks: pa.Table
    kb_version: int
    kb_hash: str
    directory: Path
    size: int = WINDOW

    @classmethod
    def of(
        cls, kb: str | Path, encoder: DualEncoder, directory: str | Path, size: int = WINDOW
    ) -> "Pieces":
        """Those of a knowledge base as it is now; raises UserError for an empty one."""
        with KnowledgeBase(Path(kb)) as base, base.reading():
            chunks, version, kb_hash = base.chunks(), base.version, base.content_hash()
        if not chunks:
            raise UserError(f"{kb}: the knowledge base is empty")
        return cls(encoder, table_of(chunks), version, kb_hash, Path(directory), size)

    @cached_property
    def fingerprint(self) -> str:
        """The encoder's; of a large one it takes seconds."""
        return self.encoder.fingerprint()

    def __len__(self) -> int:
        return -(-len(self.chunks) // self.size)

    def share(self, shard: int, shards: int) -> range:
        """The numbers of the pieces that belong to one of so many shards: consecutive."""
        return range(len(self) * shard // shards, len(self) * (shard + 1) // shards)

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of `numbers` that are not encoded yet; UserError for one of something else."""
        numbers = list(numbers)
        here = [number for number in numbers if artifact.is_complete(self._path(number))]
        for number in here:
            self._verify(number, only="")  # hashing the embeddings is for those who read them
        return [number for number in numbers if number not in {*here}]

    def encode(self, number: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Encode one piece and commit it; `progress` as of `embed_blocks`."""
        with matmul("highest"):
            embeddings_MD = embed_corpus(
                self.encoder, Passages(self._rows(number)), progress=progress
            )
        meta = self._meta(number)
        with artifact.committing(self._path(number), kind=KIND, meta=meta) as staging:
            save_file({"embeddings": embeddings_MD}, staging / FILE)

    def generation(self, backend: Backend) -> Generation:
        """All pieces behind one index, read one after another.

        Raises UserError for a piece that is missing, damaged, or of another encoder or corpus.
        """
        index = backend.fill(Blocks(self._embeddings(), self.chunks.column("id").to_numpy()))
        told = (self.fingerprint, self.kb_version, self.kb_hash, 0, len(self.chunks))
        return Generation(index, self.chunks, *told)

    def _embeddings(self) -> Iterator[np.ndarray]:
        for number in range(len(self)):
            if not artifact.is_complete(self._path(number)):
                raise UserError(f"{self._path(number)} is missing: piece {number} is not encoded")
            self._verify(number)
            yield load_file(self._path(number) / FILE)["embeddings"]

    def _verify(self, number: int, only: str | None = None) -> None:
        """Raise UserError unless the piece is whole and of this encoder and these chunks."""
        path = self._path(number)
        found, expected = artifact.verify(path, kind=KIND, only=only)["meta"], self._meta(number)
        for key, what in (("encoder_fingerprint", "another encoder"), ("chunks", "other chunks")):
            if found.get(key) != expected[key]:
                raise UserError(f"{path} was made from {what}: delete it, or choose another out=")

    def _meta(self, number: int) -> dict[str, str]:
        """What an embedding depends on: the encoder, and ids and passages of the chunks."""
        digest, rows = hashlib.sha256(), self._rows(number)
        for id, passage in zip(rows.column("id").to_pylist(), Passages(rows)[:], strict=True):
            text = passage.encode()
            digest.update(b"%d %d " % (id, len(text)) + text)
        return {"encoder_fingerprint": self.fingerprint, "chunks": digest.hexdigest()}

    def _rows(self, number: int) -> pa.Table:
        return self.chunks.slice(number * self.size, self.size)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:06d}"

"""One version of the searchable corpus: vectors, chunk ids, chunk texts and the encoder's identity.

They live and die together in one immutable object, so that no answer can mix two versions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from rag2 import artifact
from rag2.index import base
from rag2.registry import UserError
from rag2.types import Chunk

KIND = "generation"
FILE = "chunks.arrow"
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("document", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
    ]
)
BATCH = 16_384  # rows per Arrow record batch


@dataclass(frozen=True)
class Generation:
    """Immutable; readers take one reference and keep it for the whole of their request.

    Row n of `chunks` (an Arrow table, memory-mapped when loaded) is the chunk `ids_N[n]`, and ids
    increase from row to row. `step` is the optimizer step whose weights made the embeddings, of
    `encoded` chunks: after a partial refresh the other embeddings are of earlier steps.
    """

    index: base.Index
    chunks: pa.Table
    encoder_fingerprint: str
    kb_version: int
    kb_hash: str
    step: int
    encoded: int

    def __post_init__(self) -> None:
        ids_N = self.chunks.column("id").to_numpy()
        if not np.array_equal(ids_N, self.index.ids_N) or (np.diff(ids_N) <= 0).any():
            raise UserError("the chunks of a generation are not those of its index, in id order")

    @classmethod
    def of(
        cls,
        index: base.Index,
        chunks: Sequence[Chunk],
        *,
        encoder_fingerprint: str,
        kb_version: int = 0,
        kb_hash: str = "",
        step: int = 0,
    ) -> Self:
        """A generation in memory; `chunks` are those of the index, ordered by id.

        Raises UserError when chunks and index differ.
        """
        table = table_of(chunks)
        return cls(index, table, encoder_fingerprint, kb_version, kb_hash, step, len(table))

    @classmethod
    def load(cls, directory: str | Path, encoder_fingerprint: str | None = None) -> Self:
        """The generation that `save` committed, every byte verified before it is parsed.

        Raises ArtifactError for a damaged directory, UserError when `encoder_fingerprint` is given
        and the embeddings are another encoder's.
        """
        root = Path(directory)
        meta = artifact.verify(root, kind=KIND)["meta"]
        made_by = meta["encoder_fingerprint"]
        if encoder_fingerprint is not None and encoder_fingerprint != made_by:
            raise UserError(
                f"{root} was embedded by encoder {made_by[:12]}, not {encoder_fingerprint[:12]}: "
                "build the index again, or use the encoder that built it"
            )
        table = table_in(root)
        told = (meta["kb_version"], meta["kb_hash"], meta["step"], meta.get("encoded", len(table)))
        return cls(base.load(root), table, made_by, *told)

    def save(self, directory: str | Path, pointer: str | Path | None = None) -> None:
        """Commit the generation as `directory` and let the file `pointer` name it.

        Raises ArtifactError if the directory exists.
        """
        meta = {
            "encoder_fingerprint": self.encoder_fingerprint,
            "kb_version": self.kb_version,
            "kb_hash": self.kb_hash,
            "step": self.step,
            "chunks": len(self),
            "encoded": self.encoded,
        }
        with artifact.committing(directory, kind=KIND, meta=meta, pointer=pointer) as staging:
            self.index.save(staging)
            with pa.ipc.new_file(str(staging / FILE), SCHEMA) as writer:
                writer.write_table(self.chunks, max_chunksize=BATCH)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def ids_N(self) -> np.ndarray:
        """The chunk ids, increasing."""
        return self.index.ids_N

    def chunk(self, chunk_id: int) -> Chunk:
        """The chunk with this id; raises KeyError when it is not in this generation."""
        row = int(np.searchsorted(self.ids_N, chunk_id))
        if row == len(self) or self.ids_N[row] != chunk_id:
            raise KeyError(f"chunk {chunk_id} is not in this generation")
        return Chunk(**{name: self.chunks.column(name)[row].as_py() for name in SCHEMA.names})


def remove(directory: str | Path) -> None:
    """Remove a generation, or what is left of one, with what its index has elsewhere."""
    base.discard(directory)
    artifact.remove(directory)


def table_in(directory: Path) -> pa.Table:
    """The chunks of a generation whose bytes have been verified, memory-mapped."""
    with pa.memory_map(str(directory / FILE)) as source:
        return pa.ipc.open_file(source).read_all()


def table_of(chunks: Sequence[Chunk]) -> pa.Table:
    """The chunks as an Arrow table, in the order given."""
    return pa.Table.from_batches(list(_record_batches(chunks)), schema=SCHEMA)


def _record_batches(chunks: Sequence[Chunk]) -> Iterator[pa.RecordBatch]:
    """The chunks as Arrow batches: 32-bit text offsets, so each batch stays small."""
    for start in range(0, len(chunks), BATCH):
        part = chunks[start : start + BATCH]
        columns = [
            pa.array([getattr(chunk, field.name) for chunk in part], field.type) for field in SCHEMA
        ]
        yield pa.record_batch(columns, schema=SCHEMA)

"""An export directory -> the parts of the system in it, none of which can run code.

Nothing is parsed before every byte was compared with the manifest and every file looked at
(`contents.check`). What that promises, and what it does not, is in docs/export.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import torch
from pydantic import Field, ValidationError

from rag2 import artifact
from rag2.answering import contents, reading
from rag2.answering.settings import Settings
from rag2.config import Config
from rag2.generator.load import Generator
from rag2.index import generation as generations
from rag2.index.generation import Generation
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder

KIND = "export"
Digest = Field(pattern="^[0-9a-f]{64}$")


class Meta(Config):
    """What the manifest of an export says of its making."""

    format: Literal["rag2.export/1"] = "rag2.export/1"
    encoder: str = Digest
    """fingerprint of the retriever"""
    generator: str = Digest
    """fingerprint of the generator, adapters and all"""
    kb_hash: str = Digest
    """of the live content of the knowledge base"""
    kb_version: int = Field(ge=0)
    parents: dict[str, str] = {}
    """what it was made from -> the seal of its manifest"""
    versions: dict[str, str] = {}
    """rag2, torch and transformers that made it"""


@dataclass(frozen=True)
class Exported:
    """A verified export; nothing in it is ever written to."""

    directory: Path
    id: str
    """the seal of the manifest, which stands for every byte: what a state directory is bound to"""
    meta: dict[str, Any]
    settings: Settings

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        """Verify a directory and read its settings; raises ArtifactError, one line, otherwise."""
        directory = Path(directory)
        manifest = artifact.verify(directory, kind=KIND)
        try:
            meta = Meta.model_validate(manifest["meta"]).model_dump(mode="json")
        except ValidationError as error:
            line = error.errors()[0]
            place = ".".join(map(str, line["loc"]))
            raise artifact.ArtifactError(
                f"{directory / artifact.MANIFEST}: meta.{place}: {line['msg']}"
            ) from None
        contents.check(directory)
        settings = Settings.model_validate(reading.read_json(directory / "prompt.json"))
        return cls(directory, artifact.seal(manifest), meta, settings)

    @property
    def kb(self) -> Path:
        """The knowledge base; it is copied before it is changed."""
        return self.directory / "kb.sqlite"

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that cut the chunks, to lie beside a copy of the knowledge base."""
        folder = self.directory / "tokenizer"
        return folder if folder.is_dir() else None

    def generator(self, dtype: str = "float32", device: str | torch.device = "cpu") -> Generator:
        """The generator in evaluation mode; UserError when it cannot be loaded."""
        with self.reading("generator"):
            return Generator.load(self.directory / "generator", dtype, device)

    def retriever(self) -> DualEncoder:
        """The retriever on the CPU, in evaluation mode.

        Raises UserError when it cannot be loaded, or is not the one that made the index.
        """
        with self.reading("retriever"):
            encoder = DualEncoder.load(self.directory / "retriever").eval()
            index = reading.read_json(self.directory / "index" / artifact.MANIFEST)["meta"]
            found = encoder.fingerprint()
            for what, expected in (
                ("manifest.json names", self.meta["encoder"]),
                ("made the index", index["encoder_fingerprint"]),
            ):
                if found != expected:
                    raise UserError(
                        f"{self.directory}: retriever/ is encoder {found[:12]}, but the one that "
                        f"{what} is {str(expected)[:12]}"
                    )
            return encoder

    def generation(self) -> Generation:
        """The index with its chunks.

        Raises UserError when it cannot be loaded, is of another encoder, or has other chunks than
        those that are live in kb.sqlite.
        """
        with self.reading("index"):
            folder = self.directory / "index"
            with pa.memory_map(str(folder / generations.FILE)) as source:
                schema = pa.ipc.open_file(source).schema  # no type of its own, nor metadata
            if not schema.equals(generations.SCHEMA, check_metadata=True):
                raise UserError(f"{folder / generations.FILE} has other columns than chunks have")
            generations.table_in(folder).validate(full=True)  # offsets of text that lead outside
            generation = Generation.load(folder, self.meta["encoder"])
            with KnowledgeBase(self.kb) as kb, kb.reading():
                held = (kb.version, kb.content_hash())
                chunks = generations.table_of(kb.chunks())
            told = (self.meta["kb_version"], self.meta["kb_hash"])
            if not held == told == (generation.kb_version, generation.kb_hash):
                raise UserError(f"{self.directory}: kb.sqlite and index/ are of different versions")
            if not generation.chunks.equals(chunks):
                raise UserError(f"{self.directory}: index/ has other chunks than kb.sqlite")
            return generation

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Whatever a library says of a file that is not what it should be, in one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"{self.directory}: {part}/ cannot be loaded: {reason}") from error

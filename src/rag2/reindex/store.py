"""The generations of a run on disk, and the snapshots of the encoder that they are made from.

generations/000003/   an index with its chunks, committed; generations/current names the latest
snapshots/000003/     the encoder that generation 3 is made from, while it is being made, and
                      which rows of generation 2 it encodes, where they are not all
"""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rag2 import artifact
from rag2.index.base import Backend
from rag2.index.generation import Generation, remove, table_of
from rag2.reindex import build, worker
from rag2.reindex.policy import Background
from rag2.reindex.process import Worker
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk


class Store:
    """Numbers, makes, loads and prunes; of several processes that train together one keeps."""

    def __init__(
        self,
        out: Path,
        chunks: Sequence[Chunk],
        encoder: DualEncoder,
        backend: Backend,
        kb_version: int,
        kb_hash: str,
        keep: bool = True,
    ) -> None:
        """`keep=False` writes nothing and starts no worker."""
        self.generations, self.snapshots = out / "generations", out / "snapshots"
        self.chunks, self.encoder, self.backend = table_of(chunks), encoder, backend
        self.kb_version, self.kb_hash, self.keep = kb_version, kb_hash, keep

    def build(self, number: int, step: int, part: build.Part | None = None) -> Generation:
        """Encode all chunks or a part here and now, with the weights of `step`; commit, if kept."""
        version, kb_hash = self.kb_version, self.kb_hash
        made = build.generation(
            self.encoder, self.chunks, self.backend, step, version, kb_hash, part=part
        )
        if self.keep:
            self.drop(number)  # a run that continues from a checkpoint builds again
            made.save(self._path(number))
        return made

    def snapshot(self, number: int, step: int, rows_M: np.ndarray | None = None) -> str:
        """Commit the encoder as it is now, and the rows to encode if not all; its fingerprint."""
        fingerprint = self.encoder.fingerprint()
        if self.keep:
            directory = self.snapshots / f"{number:06d}"
            artifact.sweep(self.snapshots)
            artifact.remove(directory)
            meta = {
                "step": step,
                "encoder_fingerprint": fingerprint,
                "kb_version": self.kb_version,
                "kb_hash": self.kb_hash,
            }
            with artifact.committing(directory, kind=worker.KIND, meta=meta) as staging:
                self.encoder.save(staging / "encoder")
                if rows_M is not None:
                    save_file({"rows": rows_M}, staging / worker.ROWS)
        return fingerprint

    def launch(self, number: int, current: int, step: int, settings: Background) -> Worker:
        """Start the worker that makes generation `number` of its snapshot and the same chunks."""
        spec = worker.Spec(
            snapshot=str(self.snapshots / f"{number:06d}"),
            chunks=str(self._path(current)),
            directory=str(self._path(number)),
            index=self.backend.model_dump(mode="json"),
            step=step,
            kb_version=self.kb_version,
            kb_hash=self.kb_hash,
            **settings.model_dump(include={"device", "threads", "cpus", "nice", "duty"}),
        )
        self.drop(number)
        path = self.snapshots / f"{number:06d}.json"
        path.write_text(json.dumps(spec.model_dump(mode="json"), indent=2), encoding="utf-8")
        # -P: what lies in the folder where training was started must not shadow a module.
        command = [sys.executable, "-P", "-m", "rag2.reindex", str(path)]
        log = path.with_suffix(".log")
        return Worker(command, log, settings.threads, settings.patience)

    def load(self, number: int, fingerprint: str | None = None) -> Generation:
        """A committed generation, its bytes verified; raises UserError as Generation.load does."""
        return Generation.load(self._path(number), fingerprint)

    def complete(self, number: int) -> bool:
        """Whether the generation was committed."""
        return artifact.is_complete(self._path(number))

    def publish(self, number: int) -> None:
        """Let `current` name a generation that is about to be searched."""
        if self.keep:
            artifact.replace(self.generations / "current", f"{number:06d}\n")

    def drop(self, number: int) -> None:
        """Remove a generation, whole or in pieces, and what a killed build left behind."""
        artifact.sweep(self.generations)
        remove(self._path(number))

    def prune(self, generations: Collection[int], snapshots: Collection[int] = ()) -> None:
        """Remove all generations and snapshots but these."""
        if not self.keep:
            return
        for folder, kept in ((self.generations, generations), (self.snapshots, snapshots)):
            artifact.sweep(folder)
            for path in folder.glob("[0-9]" * 6 + "*"):
                if int(path.name[:6]) not in kept:
                    remove(path) if path.is_dir() else path.unlink()

    def _path(self, number: int) -> Path:
        return self.generations / f"{number:06d}"

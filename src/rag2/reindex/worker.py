"""The process that re-encodes a corpus: a snapshot of the encoder in, a committed generation out.

    python -m rag2.reindex SPEC.json

It says on stdout how far it is, one JSON object a line, which is also its sign of life; it ends
when its stdin closes, so that whatever becomes of the trainer, no worker is left behind.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.numpy import load_file

from rag2 import artifact
from rag2.config import Config
from rag2.index import generation as generations
from rag2.registry import lookup
from rag2.reindex import build
from rag2.retriever.encoder import DualEncoder

KIND = "snapshot"  # the artifact that holds an encoder as it was at a step
ROWS = "rows.safetensors"  # in it: the rows that are to be encoded, where they are not all
EVERY = 0.5  # seconds between two signs of life


class Spec(Config):
    """What a worker is to do."""

    snapshot: str
    """artifact with the encoder"""
    chunks: str
    """generation whose chunks are encoded; of a part, whose other embeddings are kept"""
    directory: str
    """where the new generation is committed"""
    index: dict[str, Any]
    """settings of the index"""
    step: int
    kb_version: int
    kb_hash: str
    device: str
    threads: int
    cpus: list[int] | None
    nice: int
    duty: float


def main(argv: list[str]) -> None:
    """Do what the file says; every failure ends the process with a status that is not 0."""
    spec = Spec.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    # What stops a whole group of processes is for the trainer, with which this one ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.nice(spec.nice)
    if spec.cpus is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cpus)
    torch.set_num_threads(spec.threads)
    work(spec, _pulse(spec.duty))


def work(spec: Spec, progress: Callable[[int, int], None]) -> None:
    """Encode, build, commit; an earlier try's leftovers do not matter, its result would be this."""
    artifact.verify(spec.snapshot, kind=KIND)
    encoder = DualEncoder.load(Path(spec.snapshot) / "encoder").to(spec.device)
    chunks, part = _corpus(Path(spec.chunks), Path(spec.snapshot) / ROWS)
    backend = lookup("index", spec.index["name"]).model_validate(spec.index)
    made = build.generation(
        encoder, chunks, backend, spec.step, spec.kb_version, spec.kb_hash, progress, part
    )
    made.save(spec.directory)


def _corpus(generation: Path, rows: Path) -> tuple[pa.Table, build.Part | None]:
    """The chunks of a generation, memory-mapped; its embeddings only where a part is encoded."""
    if rows.exists():
        old = generations.Generation.load(generation)
        return old.chunks, build.Part(old, load_file(rows)["rows"])
    artifact.verify(generation, kind=generations.KIND, only=generations.FILE)
    return generations.table_in(generation), None


def _pulse(duty: float) -> Callable[[int, int], None]:
    """Tells how many chunks are done, and sleeps so as to compute for `duty` of the time.

    Before the first and after the last chunk a thread gives the signs of life: hashing a snapshot,
    clustering for IVF and committing may each take longer than training has patience for.
    """
    told, encoding = {"done": 0, "total": 0}, threading.Event()
    began = last = time.monotonic()

    def tell() -> None:
        os.write(1, (json.dumps(told) + "\n").encode())  # one call: two threads tell

    def between() -> None:
        while True:
            time.sleep(EVERY)
            if not encoding.is_set():
                tell()

    def pulse(done: int, total: int) -> None:
        nonlocal began, last
        told.update(done=done, total=total)
        now = time.monotonic()
        if now - last > EVERY or done == total:
            tell()
            last = now
        (encoding.clear if done == total else encoding.set)()
        time.sleep((now - began) * (1 / duty - 1))
        began = time.monotonic()

    threading.Thread(target=between, daemon=True).start()
    return pulse


def _end_with_stdin() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would make a normal end of the process fatal
        pass
    os._exit(3)

"""The worker needs the memory of the index and a fixed amount besides, however large the corpus."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rag2 import artifact
from rag2.generator.bpe import train_bpe
from rag2.index import generation
from rag2.index.flat import Flat
from rag2.reindex import worker
from rag2.retriever.encoder import DualEncoder, EncoderConfig

DIMENSION = 256
MIB = 1 << 20


def corpus(path: Path, count: int) -> None:
    """The artifact that a worker takes the chunks from, its texts a few words each."""
    with artifact.committing(path, kind=generation.KIND) as staging:
        with pa.ipc.new_file(str(staging / generation.FILE), generation.SCHEMA) as writer:
            for start in range(0, count, generation.BATCH):
                ids = range(start, min(start + generation.BATCH, count))
                texts = [f"town {i % 1000} by the sea" for i in ids]
                names = [str(i) for i in ids]
                empty, zeros = [""] * len(texts), [0] * len(texts)
                columns = [list(ids), names, empty, texts, zeros, zeros]
                arrays = [
                    pa.array(c, f.type) for c, f in zip(columns, generation.SCHEMA, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema=generation.SCHEMA))


def snapshot(path: Path) -> None:
    """An encoder with long embeddings that takes little to compute."""
    torch.manual_seed(0)
    shape = EncoderConfig(hidden=DIMENSION, layers=1, heads=1, intermediate=32)
    encoder = DualEncoder.build(shape, train_bpe(["a town by the sea"], 300))
    with artifact.committing(path, kind=worker.KIND) as staging:
        encoder.save(staging / "encoder")


def peaks_mib(folder: Path, count: int) -> tuple[float, float]:
    """The most memory that a worker held at once while it indexed `count` chunks.

    Of its own (anonymous), looked at again and again; and with the pages of files, which it shares
    with the trainer, as the libraries', or which the system may drop, as the texts'.
    """
    corpus(folder / "chunks", count)
    spec = worker.Spec(
        snapshot=str(folder / "snapshot"),
        chunks=str(folder / "chunks"),
        directory=str(folder / "made"),
        index=Flat().model_dump(mode="json"),
        step=1,
        kb_version=1,
        kb_hash="h",
        device="cpu",
        threads=1,
        cpus=None,
        nice=0,
        duty=1.0,
    )
    path = folder / "spec.json"
    path.write_text(json.dumps(spec.model_dump(mode="json")), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "rag2.reindex", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        own = 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            own = max(own, anonymous_mib(process.pid))
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0 and artifact.is_complete(folder / "made")
    return own, usage.ru_maxrss * 1024 / MIB


def anonymous_mib(pid: int) -> float:
    """What the process holds now that is in no file."""
    told = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(told[1]) * 1024 / MIB if told else 0.0  # none in a process that has just ended


@pytest.mark.slow
@pytest.mark.parametrize("count", [800_000, 1_600_000, 3_200_000])
def test_a_worker_needs_a_fifth_more_than_the_index_and_300_mib(tmp_path: Path, count: int):
    snapshot(tmp_path / "snapshot")
    (own, resident), index = peaks_mib(tmp_path, count), count * DIMENSION * 4 / MIB
    told = f"index {index:.0f} MiB, worker {own:.0f} MiB, with pages of files {resident:.0f} MiB"
    print(f"{count} chunks: {told}")  # noqa: T201
    assert index < own <= 1.2 * index + 300


@pytest.mark.slow
def test_a_larger_corpus_costs_the_worker_its_index_and_little_more(tmp_path: Path):
    peaks = []
    for count in (30_000, 90_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        snapshot(folder / "snapshot")
        peaks.append(peaks_mib(folder, count)[1])
    grown = 60_000 * DIMENSION * 4 / MIB
    assert peaks[1] - peaks[0] < 1.5 * grown, (peaks, grown)

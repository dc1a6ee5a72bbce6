"""What this machine reaches: chunks encoded, vectors indexed, bytes committed and read a second.

Texts are made up and vectors random: lengths and sizes are real, and nothing else matters to most
of these times. Random vectors are the hardest case for HNSW, whose build depends on the data.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rag2.evaluation.workload import Writer
from rag2.index.base import Backend, Blocks
from rag2.index.generation import Generation
from rag2.modes import matmul
from rag2.retriever.embed import WINDOW, embed_blocks
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk

LONG = 10.0  # seconds; what takes longer is not repeated


def texts(tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, seed: int) -> list[str]:
    """Made-up texts of at most `tokens` tokens each, and of at least that many less a word."""
    writer, made = Writer(seed), []
    for _ in range(count):
        text = writer.words(tokens, tokens)  # a word is one token at least
        starts = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        made.append(text[: starts[tokens][0]].rpartition(" ")[0])
    return made


def encode_rate(encoder: DualEncoder, passages: Sequence[str], rounds: int) -> dict[str, Any]:
    """Chunks and tokens a second, tokenisation included, as a worker encodes them.

    Medians of `rounds` after a first pass over a few; `cpu_chunks` counts this process's CPU
    seconds instead of the clock's, which other programs on the machine lengthen less.
    """
    lengths = [len(row) for row in encoder.tokenize(passages, "chunk")]

    def encode() -> None:
        for _ in embed_blocks(encoder, passages):
            pass

    with matmul("highest"):
        for _ in embed_blocks(encoder, passages[:8]):
            pass
        wall, cpu = zip(*(timed(encode) for _ in range(rounds)), strict=True)
    count = len(passages)
    return {
        "chunks": count,
        "tokens_per_chunk": round(statistics.mean(lengths), 1),
        "chunks_per_second": count / statistics.median(wall),
        "range": [count / max(wall), count / min(wall)],
        "tokens_per_second": sum(lengths) / statistics.median(wall),
        "cpu_chunks_per_second": count / statistics.median(cpu),
    }


def build_seconds(backend: Backend, vectors_ND: np.ndarray, rounds: int) -> tuple[float, float]:
    """Wall and CPU seconds of building the index from blocks: medians, or one that takes LONG."""
    ids_N = np.arange(len(vectors_ND))
    took: list[tuple[float, float]] = []
    while len(took) < rounds and (not took or took[0][0] < LONG):
        took.append(timed(lambda: backend.fill(Blocks(_blocks(vectors_ND), ids_N))))
    wall, cpu = zip(*took, strict=True)
    return statistics.median(wall), statistics.median(cpu)


def disk(
    backend: Backend, vectors_ND: np.ndarray, text_bytes: int, where: Path
) -> dict[str, float]:
    """Bytes a second of committing a generation in `where`, and of verifying and reading it."""
    ids = range(len(vectors_ND))
    chunks = [Chunk(i, "made-up", "", "x" * text_bytes, 0, text_bytes) for i in ids]
    made = Generation.of(
        backend.build(vectors_ND, np.arange(len(ids))), chunks, encoder_fingerprint=""
    )
    with tempfile.TemporaryDirectory(dir=where) as folder:
        target = Path(folder) / "generation"
        commit, _ = timed(lambda: made.save(target))
        read, _ = timed(lambda: Generation.load(target))
        size = sum(path.stat().st_size for path in target.iterdir())
    return {"bytes": size, "commit_per_second": size / commit, "read_per_second": size / read}


def directions(count: int, dimension: int, seed: int) -> np.ndarray:
    """Random unit vectors [count, dimension], float32."""
    vectors_ND = np.random.default_rng(seed).standard_normal((count, dimension), dtype=np.float32)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _blocks(vectors_ND: np.ndarray) -> Iterator[np.ndarray]:
    """As many rows at a time as a worker hands over."""
    for start in range(0, len(vectors_ND), WINDOW):
        yield vectors_ND[start : start + WINDOW]

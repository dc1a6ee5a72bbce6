"""One kind of index at one size, in a process of its own -> seconds, memory, recall.

    python -m rag2.evaluation.index_cell SPEC.json

`build` makes the index from a file of vectors and saves it; `search` loads it, as a server would,
and asks one question at a time; `drop` removes what lies on a server. What is measured goes to
stdout as JSON.
"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rag2.config import Config
from rag2.index import base
from rag2.index.base import Backend, Blocks
from rag2.index.remote import RemoteIndex
from rag2.registry import UserError, lookup

BLOCK = 16_384
LONGEST = 60.0  # seconds of asking; what is slower asks fewer questions


class Spec(Config):
    """What a process is to do."""

    do: Literal["build", "search", "drop"]
    index: dict[str, Any]
    vectors: str
    """file of float32, row after row"""
    queries: str
    """the same"""
    nearest: str
    """file of int64: the ids of the true k nearest of each query"""
    dimension: int
    k: int
    directory: str
    """where the index lies"""


def build(spec: Spec) -> dict[str, Any]:
    """Build the index from blocks and save it; `stored` is what a server's disk takes, if told."""
    vectors_ND = read(spec.vectors, spec.dimension)
    backend = warm(spec)
    began = time.perf_counter()
    index = backend.fill(Blocks(blocks(vectors_ND), np.arange(len(vectors_ND))))
    built = time.perf_counter() - began
    Path(spec.directory).mkdir(parents=True)
    index.save(spec.directory)
    files = [path for path in Path(spec.directory).rglob("*") if path.is_file()]
    told: dict[str, Any] = {"build_seconds": built, "files": sum(p.stat().st_size for p in files)}
    if isinstance(index, RemoteIndex):
        told["stored"] = index.collection.stored()
    return told


def search(spec: Spec) -> dict[str, Any]:
    """Load the index; memory is what this process gained by it, of its own and not of files."""
    queries_QD = read(spec.queries, spec.dimension)
    truth_QK = np.fromfile(spec.nearest, dtype=np.int64).reshape(len(queries_QD), spec.k)
    warm(spec)
    before, began = anonymous(), time.perf_counter()
    index = base.load(spec.directory)
    loaded = time.perf_counter() - began
    index.search(queries_QD[:1], spec.k)
    memory, took, found = anonymous() - before, [], []
    while len(took) < len(queries_QD) and sum(took) < LONGEST:
        query_D = queries_QD[len(took)]
        began = time.perf_counter()
        found.append(index.search(query_D[None], spec.k)[1][0])
        took.append(time.perf_counter() - began)
    hits = [np.isin(a, b).mean() for a, b in zip(found, truth_QK, strict=False)]
    return {
        "exact": index.exact,
        "load_seconds": loaded,
        "memory": memory,
        "asked": len(took),
        "p50_ms": 1e3 * float(np.percentile(took, 50)),
        "p95_ms": 1e3 * float(np.percentile(took, 95)),
        "recall": float(np.mean(hits)),
    }


def warm(spec: Spec) -> Backend:
    """The backend, of which everything is imported and reached: another index was built with it."""
    backend: Backend = lookup("index", spec.index["name"]).model_validate(spec.index)
    backend.build(np.eye(16, spec.dimension), np.arange(16)).search(np.eye(1, spec.dimension), 1)
    return backend


def drop(spec: Spec) -> dict[str, Any]:
    """Remove what the index has outside its directory; a file of Milvus is one process's."""
    base.discard(spec.directory)
    return {}


def read(path: str, dimension: int) -> np.ndarray:
    """The vectors in a file, mapped."""
    return np.memmap(path, dtype=np.float32, mode="r").reshape(-1, dimension)


def blocks(vectors_ND: np.ndarray) -> Iterator[np.ndarray]:
    """As many rows at a time as a worker hands over, in memory."""
    for start in range(0, len(vectors_ND), BLOCK):
        yield np.array(vectors_ND[start : start + BLOCK])


def anonymous() -> int:
    """Bytes of this process that no file holds; 0 where the system does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(li.split()[1]) for li in lines if li.startswith("RssAnon:")), 0)


def main(argv: list[str]) -> int:
    """Do what the file says; 2 and one line on stderr for what a user can mend."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was begun is cleared away
    spec = Spec.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        told = {"build": build, "search": search, "drop": drop}[spec.do](spec)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

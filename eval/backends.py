"""What each kind of index costs as the corpus grows: build, search, memory, recall.

rag2 eval backends out=runs/backends
rag2 eval backends -c configs/demo/backends.yaml sizes=[10000,100000] out=runs/servers

Vectors are random, of length 1, in clusters; questions lie near them. Every index is built and
searched in processes of its own, one question at a time. A server must be running; one that does
not answer, or a step that takes longer than `limit_seconds`, becomes a row that says so.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from rich.console import Console

from rag2 import artifact, config
from rag2.evaluation import place
from rag2.evaluation.environment import environment
from rag2.evaluation.index_cell import BLOCK, Spec, blocks, read
from rag2.index import base
from rag2.index.base import Blocks
from rag2.index.exact import TorchExact
from rag2.index.flat import Flat
from rag2.index.hnsw import HNSW
from rag2.index.ivf import IVF
from rag2.index.shards import Shards
from rag2.training.choices import Index

COLUMNS = ("vectors", "index", "build s", "load s", "p50 ms", "p95 ms", "recall", "memory MB")


class BackendsConfig(config.Config):
    """The same vectors and questions for every index."""

    out: str = "runs/backends"
    seed: int = Field(default=0, ge=0)
    sizes: list[Annotated[int, Field(ge=100)]] = Field(default=[10_000, 100_000], min_length=1)
    dimension: int = Field(default=128, ge=2)
    cluster: PositiveInt = 100
    """vectors in a cluster, on average"""
    spread: PositiveFloat = 0.7
    """length of what is random in a vector, beside a centre of length 1"""
    queries: PositiveInt = 500
    k: PositiveInt = 10
    threads: PositiveInt = 1
    """of torch and FAISS; servers have their own"""
    limit_seconds: PositiveFloat = 600.0
    """of building an index, and of loading and searching it"""
    indexes: list[Index] = Field(
        default=[Flat(device="cpu"), IVF(device="cpu"), HNSW(), Shards(), TorchExact(device="cpu")],
        min_length=1,
    )

    @model_validator(mode="after")
    def _possible(self) -> "BackendsConfig":
        if self.k > min(self.sizes):
            raise ValueError(f"k={self.k} is more than the smallest of sizes={self.sizes}")
        return self


def main(cfg: BackendsConfig) -> dict[str, Any]:
    """Measure every index at every size; writes backends.json and backends.md."""
    place.check(cfg)
    results: dict[str, Any] = {"environment": environment() | {"threads": cfg.threads}, "rows": []}
    with place.claimed(cfg) as out:
        for size in sorted({*cfg.sizes}):
            files = made(cfg, size, out)
            for index in cfg.indexes:
                row = {"vectors": size, "index": label(index)} | measured(cfg, index, out, files)
                results["rows"].append(row)
                Console(stderr=True).print(" ".join(shown(row)))
                write(out, results)
            for path in files.values():
                Path(path).unlink()
    Console().print(table(results["rows"]), markup=False, soft_wrap=True)
    return results


def made(cfg: BackendsConfig, size: int, out: Path) -> dict[str, str]:
    """Files of vectors, of questions and of the true nearest of each."""
    rng = np.random.default_rng([cfg.seed, size])
    centres_CD = rng.standard_normal((max(1, size // cfg.cluster), cfg.dimension), np.float32)
    centres_CD /= np.linalg.norm(centres_CD, axis=1, keepdims=True)

    def near(count: int) -> np.ndarray:
        noise_MD = rng.standard_normal((count, cfg.dimension), np.float32)
        noise_MD *= cfg.spread / np.sqrt(cfg.dimension)
        vectors_MD = centres_CD[rng.integers(len(centres_CD), size=count)] + noise_MD
        return vectors_MD / np.linalg.norm(vectors_MD, axis=1, keepdims=True)

    files = {name: str(out / f"{name}.bin") for name in ("vectors", "queries", "nearest")}
    with Path(files["vectors"]).open("wb") as file:
        for start in range(0, size, BLOCK):
            near(min(BLOCK, size - start)).tofile(file)
    queries_QD = near(cfg.queries)
    queries_QD.tofile(files["queries"])
    rows = Blocks(blocks(read(files["vectors"], cfg.dimension)), np.arange(size))
    Flat(device="cpu").fill(rows).search(queries_QD, cfg.k)[1].tofile(files["nearest"])
    return files


def measured(
    cfg: BackendsConfig, index: base.Backend, out: Path, files: dict[str, str]
) -> dict[str, Any]:
    """What building and then searching one index took, or why it was not done."""
    directory = out / "index"
    told: dict[str, Any] = {}
    try:
        for do in ("build", "search", "drop"):
            spec = Spec.model_validate(
                {
                    "do": do,
                    "index": index.model_dump(mode="json"),
                    **files,
                    "dimension": cfg.dimension,
                    "k": cfg.k,
                    "directory": str(directory),
                }
            )
            told |= cell(spec, out, cfg.threads, cfg.limit_seconds)
            if do == "build" and "skipped" in told:
                break
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return told


def cell(spec: Spec, out: Path, threads: int, limit: float) -> dict[str, Any]:
    """One process and what it said; `skipped` tells why it said nothing."""
    path = out / "cell.json"
    path.write_text(spec.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-P", "-m", "rag2.evaluation.index_cell", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        try:
            said, complaint = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # it drops on a server what it had begun there
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            return {"skipped": f"{spec.do}: more than {limit:g} s"}
    path.unlink()
    if process.returncode:
        lines = complaint.strip().splitlines() or [f"ended with status {process.returncode}"]
        return {"skipped": f"{spec.do}: {lines[-1]}"}
    return json.loads(said.splitlines()[-1])


def write(out: Path, results: dict[str, Any]) -> None:
    """What is measured so far: the rest may take hours."""
    artifact.replace(out / "backends.json", json.dumps(results, indent=2) + "\n")
    artifact.replace(out / "backends.md", table(results["rows"]))


def label(index: base.Backend) -> str:
    """The index's name, its kind where there are several, and what else is not the default."""
    settings = index.model_dump(mode="json")
    words = [settings["name"], settings.get("kind", "")]
    if isinstance(index, Shards):
        words = [f"{index.count} shards", index.inner.name]
    changed = index.model_dump(mode="json", exclude_defaults=True)
    hidden = {"name", "kind", "device", "uri", "dsn", "count", "inner"}
    words += [f"{key}={value}" for key, value in changed.items() if key not in hidden]
    return " ".join(word for word in words if word)


def shown(row: dict[str, Any]) -> list[str]:
    """The cells of a row; memory on a server is that of its disk."""
    begin = [f"{row['vectors']:,}", row["index"]]
    if "skipped" in row:
        return [*begin, row["skipped"], *[""] * (len(COLUMNS) - 3)]
    memory = f"{row['memory'] / 1e6:,.0f}"
    if row.get("stored"):
        memory += f" + {row['stored'] / 1e6:,.0f} on the server's disk"
    return [
        *begin,
        f"{row['build_seconds']:,.1f}",
        f"{row['load_seconds']:,.1f}",
        f"{row['p50_ms']:.2f}",
        f"{row['p95_ms']:.2f}",
        "exact" if row["exact"] and row["recall"] == 1 else f"{row['recall']:.3f}",
        memory,
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(shown, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    config.run(main, BackendsConfig)

"""What re-indexing costs training: joint training without, with a sync and an async re-index.

    rag2 eval refresh -c configs/demo/refresh.yaml out=runs/refresh

The trainer has one thread on the first of two cores in every run. The async worker has the second;
sync re-encodes on both, with two threads, while training waits. The world's own chunks lie among
those of other worlds, so that there are `chunks` of them.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator
from rich.console import Console
from rich.table import Table

from rag2 import config, pipeline, plan
from rag2.evaluation import place
from rag2.evaluation.environment import environment
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.registry import UserError
from rag2.worlds.almanac import Almanac

OTHERS = {"train": 1000, "validation": 1000, "test": 1000}  # entities of each other world


class RefreshConfig(pipeline.Inputs):
    """The three ways, in turn."""

    out: str = "runs/refresh"
    seed: int = 0
    questions: str | None = None
    generator: str | None = None
    retriever: str | None = None
    chunks: PositiveInt = 50_000
    """of the corpus"""
    steps: int = Field(default=160, ge=2)
    every: int = Field(default=60, ge=2)
    """steps between two refreshes"""
    lag: PositiveInt = 30
    """steps that the async worker has"""
    rounds: PositiveInt = 1
    """how often each way is run"""
    cores: tuple[int, int] = (0, 1)

    @model_validator(mode="after")
    def _one_at_a_time(self) -> "RefreshConfig":
        if self.lag >= self.every:
            raise ValueError(f"lag={self.lag} must be below every={self.every}: one at a time")
        return self


def main(cfg: RefreshConfig) -> dict[str, Any]:
    """Train, time, compare; writes refresh.json."""
    world = cfg.world
    if not isinstance(world, Almanac):
        raise UserError("world: the corpus is made of several almanacs; give world=almanac")
    if not hasattr(os, "sched_setaffinity") or not {*cfg.cores} <= os.sched_getaffinity(0):
        raise UserError(f"cores={list(cfg.cores)}: two cores that this process may be bound to")
    cfg = pipeline.resolve(cfg)
    place.check(cfg)
    with place.claimed(cfg) as out:
        kb = out / "kb.sqlite"
        if not kb.exists():
            _corpus(cfg, world, kb)
        rows = [
            {"way": way, "round": number, **_train(cfg, kb, out / f"{way}-{number}", way)}
            for number in range(cfg.rounds)
            for way in ways(cfg)
        ]
        results = {
            **cfg.model_dump(mode="json", include={"seed", "chunks", "steps", "every", "lag"}),
            "environment": environment(),
            "runs": rows,
            "lost": lost(rows),
        }
        (out / "refresh.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    Console().print(table(rows))
    return results


def ways(cfg: RefreshConfig) -> dict[str, str]:
    """The `refresh` of joint training for each way."""
    both, worker = list(cfg.cores), [cfg.cores[1]]
    return {
        "none": "{name: none}",
        "sync": f"{{name: sync, every: {cfg.every}, threads: 2, cpus: {both}}}",
        "async": f"{{name: async, every: {cfg.every}, lag: {cfg.lag}, cpus: {worker}, nice: 0}}",
    }


def lost(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the steps per second that each way loses against none, over all rounds."""
    seconds: dict[str, float] = {}
    for row in rows:
        seconds[row["way"]] = seconds.get(row["way"], 0.0) + row["seconds"]
    return {way: 1 - seconds["none"] / took for way, took in seconds.items()}


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each run."""
    shown = Table(title="joint training under each way of re-indexing")
    for name in ("refresh", "s a step", "lost", "stall", "CPU s", "swaps"):
        shown.add_column(name, justify="left" if name == "refresh" else "right")
    for row in rows:
        none = next(r["seconds"] for r in rows if r["way"] == "none" and r["round"] == row["round"])
        shown.add_row(
            row["way"],
            f"{row['seconds'] / row['steps']:.3f}",
            f"{1 - none / row['seconds']:.1%}",
            f"{row['stall_seconds'] / row['seconds']:.2%}",
            f"{row['cpu_seconds']:.0f}",
            str(row["swaps"]),
        )
    return shown


def _train(cfg: RefreshConfig, kb: Path, out: Path, way: str) -> dict[str, Any]:
    """One run of joint training, bound to the first core; what its steps took."""
    given = {"kb": kb, "questions": cfg.questions, "generator": cfg.generator}
    given |= {"retriever": cfg.retriever, "out": out, "seed": cfg.seed, "steps": cfg.steps}
    settings = [f"{key}={value}" for key, value in given.items()]
    recipe = [sys.executable, "-m", "rag2", "train", "joint", "-c", f"{cfg.recipes}/joint.yaml"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [*recipe, *settings, f"refresh={ways(cfg)[way]}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, {cfg.cores[0]}),
    )
    if done.returncode:
        raise UserError(f"joint training with refresh={way} failed; what it said is above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (out / "log.jsonl").open(encoding="utf-8")][1:]
    return {
        "steps": len(lines),  # the first step bears the start's costs
        "seconds": sum(line["seconds"] for line in lines),
        "stall_seconds": sum(line["index_stall_seconds"] for line in lines),
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_seconds": time.perf_counter() - began,
        "swaps": lines[-1]["generation"],
    }


def _corpus(cfg: RefreshConfig, world: Almanac, path: Path) -> None:
    """A knowledge base of `chunks` documents, one chunk each: the world's, then other worlds'."""
    data = plan.PATHS["kb"][0]
    rows = path.with_suffix(".jsonl")
    with rows.open("w", encoding="utf-8") as file:
        for row in islice(_documents(world), cfg.chunks):
            file.write(json.dumps(row) + "\n")
    tokenizer = str(Path(cfg.home) / data / "tokenizer")
    overlap = min(16, cfg.chunk_tokens // 4)
    chunker = TokenChunker(tokens=cfg.chunk_tokens, overlap=overlap, tokenizer=tokenizer)
    build(path, [rows], chunker, keep_duplicates=True)
    rows.unlink()


def _documents(world: Almanac) -> Iterator[dict[str, Any]]:
    yield from world.documents()
    seed = world.seed
    while True:
        seed += 1_000_003  # far from the seeds that anybody chooses
        for row in world.model_copy(update={"seed": seed, **OTHERS}).documents():
            yield {**row, "id": f"{seed}-{row['id']}"}


if __name__ == "__main__":
    config.run(main, RefreshConfig)

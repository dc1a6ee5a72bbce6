"""What refreshing an index costs at scale: rates measured here, the rest computed and simulated.

rag2 eval scaling out=runs/scaling
rag2 eval scaling device=cuda shapes='[{hidden: 768, layers: 12, heads: 12, chunks: 4096}]'
rag2 eval scaling encode_rate=500 step_seconds=2 ages=[1000] out=runs/what-if
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from rich.console import Console

from rag2 import config
from rag2.evaluation import place, rates
from rag2.evaluation.environment import environment
from rag2.evaluation.scaling_tables import tables
from rag2.evaluation.workload import Writer
from rag2.generator.bpe import train_bpe
from rag2.index.base import Backend
from rag2.index.cost import footprint, work
from rag2.index.flat import import_faiss
from rag2.index.remote import Remote
from rag2.index.shards import Shards
from rag2.registry import TABLES, lookup
from rag2.reindex import budget
from rag2.reindex.policy import AsyncRefresh, EagerRefresh, SyncRefresh
from rag2.reindex.simulate import simulate, step_times
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import distributed

VOCABULARY = 8192
ROW = 3 * 8 + 3 * 4  # bytes of numbers and text offsets in a row of a generation's chunk table


class Shape(config.Config):
    """An encoder with random weights, four times as wide between as outside, as BERT is."""

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    chunks: PositiveInt
    """chunks that its rate is measured on"""


class ScalingConfig(config.Config):
    """Measured with made-up texts and random vectors; the last shape's figures go into the rest."""

    out: str = "runs/scaling"
    seed: int = Field(default=0, ge=0)
    device: str = "cpu"
    """of the encoders"""
    threads: PositiveInt = 1
    """of torch and FAISS"""
    rounds: PositiveInt = 3
    """repetitions of each measurement; medians count"""
    clock: Literal["wall", "cpu"] = "wall"
    """what the plan goes by; cpu: seconds of CPU time, where other programs share the machine"""
    shapes: list[Shape] = Field(
        default=[
            Shape(hidden=128, layers=2, heads=2, chunks=2048),
            Shape(hidden=256, layers=4, heads=4, chunks=512),
            Shape(hidden=768, layers=12, heads=12, chunks=32),
        ],
        min_length=1,
    )
    chunk_tokens: int = Field(default=128, ge=8, le=512)
    vectors: list[Annotated[int, Field(ge=100)]] = Field(
        default=[10_000, 20_000, 40_000], min_length=2
    )
    """sizes at which indexes are built, of the last shape's dimension"""
    text_bytes: PositiveInt = 700
    """of a chunk's text, title and document name"""
    corpora: list[PositiveInt] = [1_000_000, 21_000_000, 400_000_000]
    encode_rate: PositiveFloat | None = None
    """chunks a second of one device; null: of the last shape, as measured here"""
    step_seconds: PositiveFloat = 1.0
    """of a training step"""
    ages: list[Annotated[int, Field(ge=2)]] = [500, 1000, 5000]
    """bounds on the index's age, in steps"""
    every: int = Field(default=100, ge=2)
    """simulated: steps between two refreshes"""
    lag: PositiveInt = 50
    """simulated: steps from a snapshot to the swap"""
    spread: float = Field(default=0.2, ge=0)
    """simulated: standard deviation of a step's seconds over their mean"""
    steps: PositiveInt = 20_000
    """simulated steps"""
    workers: list[PositiveFloat] = [0.5, 0.9, 1.0, 1.2, 2.0, 4.0]
    """simulated: what a refresh takes, over lag * step_seconds"""

    @model_validator(mode="after")
    def _possible(self) -> "ScalingConfig":
        if self.lag >= self.every:
            raise ValueError(f"lag={self.lag} must be below every={self.every}")
        if len({*self.vectors}) < 2:
            raise ValueError("vectors needs two different sizes: one shows no growth")
        if self.clock == "cpu" and (self.threads > 1 or self.device != "cpu"):
            raise ValueError("clock=cpu needs threads=1 and device=cpu: others work at once")
        return self


def main(cfg: ScalingConfig) -> dict:
    """Measure, compute, simulate; writes scaling.json."""
    place.check(cfg)
    torch.set_num_threads(cfg.threads)
    import_faiss().omp_set_num_threads(cfg.threads)
    with place.claimed(cfg) as out:
        results: dict[str, Any] = {
            "settings": cfg.model_dump(mode="json", exclude={"out"}),
            "environment": environment(),
            "encode": encoders(cfg),
        }
        results["index"] = indexes(cfg)
        results["disk"] = disk(cfg, out)
        results["corpora"] = projected(cfg, results)
        results["simulated"] = simulated(cfg)
        (out / "scaling.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for table in tables(results):
        Console().print(table)
    return results


def encoders(cfg: ScalingConfig) -> list[dict]:
    """The rate of every shape, and the bytes of its weights."""
    words = Writer(cfg.seed)
    tokenizer = train_bpe([words.words(500, 500) for _ in range(200)], VOCABULARY)
    rows = []
    for shape in cfg.shapes:
        torch.manual_seed(cfg.seed)
        settings = EncoderConfig(
            hidden=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            intermediate=4 * shape.hidden,
            max_chunk_tokens=cfg.chunk_tokens,
        )
        encoder = DualEncoder.build(settings, tokenizer).to(distributed.device(cfg.device))
        passages = rates.texts(tokenizer, shape.chunks, cfg.chunk_tokens, cfg.seed)
        parameters = sum(p.numel() for p in encoder.parameters())
        row = {
            "shape": f"{shape.hidden}x{shape.layers}",
            "parameters": parameters,
            "snapshot_bytes": 4 * parameters,
        }
        rows.append(row | rates.encode_rate(encoder, passages, cfg.rounds))
        Console(stderr=True).print(f"{row['shape']}: {rows[-1]['chunks_per_second']:.1f} chunks/s")
    return rows


def backends() -> dict[str, Backend]:
    """Every kind of index in one piece and in this process, on the CPU where there is a choice."""
    kinds = {name: lookup("index", name) for name in TABLES["index"]}
    kinds = {n: kind for n, kind in kinds.items() if not issubclass(kind, (Remote, Shards))}
    on = {"device": "cpu"}
    return {n: kind(**(on if "device" in kind.model_fields else {})) for n, kind in kinds.items()}


def indexes(cfg: ScalingConfig) -> list[dict]:
    """Seconds of a build at every size, the line through them, and how it predicts the largest."""
    sizes, dimension = sorted({*cfg.vectors}), cfg.shapes[-1].hidden
    vectors_ND = rates.directions(sizes[-1], dimension, cfg.seed)
    rows = []
    for name, backend in backends().items():
        measured = [rates.build_seconds(backend, vectors_ND[:n], cfg.rounds) for n in sizes]
        wall, cpu = zip(*measured, strict=True)
        took = cpu if cfg.clock == "cpu" else wall
        units = [work(backend, n) for n in sizes]
        line = budget.fit(units, took)
        row = {
            "index": name,
            "wall_seconds": dict(zip(map(str, sizes), wall, strict=True)),
            "cpu_seconds": dict(zip(map(str, sizes), cpu, strict=True)),
            "fixed_seconds": line.fixed,
            "seconds_per_unit": line.each,
            # of the line through the smaller sizes: how far the shape of the growth can be trusted
            "largest_predicted_over_measured": (
                budget.fit(units[:-1], took[:-1]).seconds(units[-1]) / took[-1]
            ),
            "bytes_per_vector": footprint(backend, sizes[-1], dimension).total / sizes[-1],
        }
        rows.append(row)
        Console(stderr=True).print(f"{name}: {took[-1]:.2f} s for {sizes[-1]} vectors")
    return rows


def disk(cfg: ScalingConfig, out: Path) -> dict[str, float]:
    """Rates of committing and reading a generation of the most vectors, flat."""
    vectors_ND = rates.directions(max(cfg.vectors), cfg.shapes[-1].hidden, cfg.seed)
    return rates.disk(backends()["flat"], vectors_ND, cfg.text_bytes, out)


def projected(cfg: ScalingConfig, results: dict) -> list[dict]:
    """Each corpus behind each index: bytes, seconds of a refresh, devices for each age."""
    measured = "cpu_chunks_per_second" if cfg.clock == "cpu" else "chunks_per_second"
    rate = cfg.encode_rate or results["encode"][-1][measured]
    lines = {r["index"]: (r["fixed_seconds"], r["seconds_per_unit"]) for r in results["index"]}
    rows = []
    for count in cfg.corpora:
        for name, backend in backends().items():
            size = footprint(backend, count, cfg.shapes[-1].hidden)
            texts = count * (ROW + cfg.text_bytes)
            generation = size.total + texts
            refresh = budget.Refresh(
                encode=count / rate,
                read=texts / results["disk"]["read_per_second"],
                build=budget.Line(*lines[name]).seconds(work(backend, count)),
                commit=generation / results["disk"]["commit_per_second"],
                swap=generation / results["disk"]["read_per_second"],
            )
            row = {
                "corpus": count,
                "index": name,
                "bytes": asdict(size) | {"generation": generation},
                "seconds": asdict(refresh),
                "least_age_one_device": budget.least_age(refresh.worker(), cfg.step_seconds),
                "bounds": [bound(cfg, refresh, age) for age in cfg.ages],
            }
            rows.append(row)
    return rows


def bound(cfg: ScalingConfig, refresh: budget.Refresh, age: int) -> dict:
    """Devices for a bound on the age, and what training loses with as many, either way."""
    every, lag = budget.schedule(age)
    n = budget.devices_for(refresh, age, cfg.step_seconds)
    told: dict[str, Any] = {"age": age, "every": every, "lag": lag, "devices": n}
    if n is not None:
        told["lost_async"] = budget.lost_behind(refresh, every, lag, cfg.step_seconds, n)
        # An index that training waits for is `every - 1` steps old when it was last searched.
        told["lost_sync"] = budget.lost_waiting(refresh, age + 1, cfg.step_seconds, n)
    return told


def simulated(cfg: ScalingConfig) -> list[dict]:
    """Age and time lost of the three policies with workers of different speed."""
    seconds = step_times(cfg.step_seconds, cfg.spread, cfg.steps, cfg.seed)
    policies = {
        "sync": SyncRefresh(every=cfg.every),
        "async": AsyncRefresh(every=cfg.every, lag=cfg.lag),
        "eager": EagerRefresh(every=cfg.every),
    }
    rows = []
    for factor in cfg.workers:
        worker = factor * cfg.lag * cfg.step_seconds
        for name, policy in policies.items():
            ran = simulate(policy, seconds, worker)
            mean = float(np.mean(ran.settled))
            ages = {"mean_age": mean, "oldest": max(ran.settled)}
            row = {"worker_over_lag": factor, "policy": name, **ages, "lost": ran.lost}
            rows.append(row)
    return rows


if __name__ == "__main__":
    config.run(main, ScalingConfig)

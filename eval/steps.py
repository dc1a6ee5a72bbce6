"""What one joint step costs in one pass and in two: seconds and peak memory by number of chunks.

    rag2 eval steps -c configs/demo/steps.yaml out=runs/steps

Every case is a process of its own, one thread, the same questions. f is the share of prompts that
the second pass of a two-pass step goes through, and, in one pass, the share of answers' rows that
have a gradient at the output head; which f a `skip_below` gives depends on the models. The error is
that of the generator's gradient against an exact pass: |difference| / |gradient|, 2-norms.
"""

import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table

from rag2 import config, pipeline
from rag2.evaluation import place
from rag2.evaluation.environment import environment
from rag2.evaluation.questions import load_questions, split
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.losses.marginal import Marginal
from rag2.modes import Precision, matmul
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training.candidates import Candidates, Proposals
from rag2.training.log import Clock, peak_memory
from rag2.training.step import OnePass, TwoPass


class StepsConfig(pipeline.Inputs):
    """One pass, and two with several bounds below which a prompt is skipped."""

    out: str = "runs/steps"
    seed: int = Field(default=0, ge=0)
    kb: str | None = None
    questions: str | None = None
    generator: str | None = None
    retriever: str | None = None
    ks: list[PositiveInt] = Field(default=[4, 8, 16], min_length=1)
    """chunks a question, by BM25"""
    skip_below: list[Annotated[float, Field(ge=0, lt=1)]] = [0.0, 2**-12, 0.02, 0.1]
    """of both kinds of steps"""
    batch_size: PositiveInt = 12
    micro_batch: PositiveInt = 16
    repeats: PositiveInt = 5
    """steps timed after one that is not; the median counts"""
    matmul: Precision = "highest"


def main(cfg: StepsConfig) -> list[dict[str, Any]]:
    """Time every case; writes steps.json."""
    cfg = pipeline.resolve(cfg)
    place.check(cfg)
    with place.claimed(cfg) as out:
        rows = []
        for k in cfg.ks:
            for step in steps(cfg):
                case = {"k": k, "step": step.name, "skip_below": step.skip_below}
                rows.append({**case, **apart(cfg, k, step)})
        results = {
            **cfg.model_dump(mode="json", include={"seed", "batch_size", "micro_batch", "matmul"}),
            "environment": environment(),
            "cases": rows,
        }
        (out / "steps.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    Console().print(table(rows))
    return rows


def steps(cfg: StepsConfig) -> list[OnePass | TwoPass]:
    """An exact pass first, with which the others are compared."""
    return [
        OnePass(),
        *(OnePass(skip_below=skip) for skip in cfg.skip_below if skip),
        *(TwoPass(skip_below=skip, micro_batch=cfg.micro_batch) for skip in cfg.skip_below),
    ]


def apart(cfg: StepsConfig, k: int, step: OnePass | TwoPass) -> dict[str, float]:
    """`measure` in a process of its own: the most memory of a process never falls again."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, cfg, k, step).result()


def measure(cfg: StepsConfig, k: int, step: OnePass | TwoPass) -> dict[str, float]:
    """Median seconds of a step, peak memory beyond the loaded models, f, and the error."""
    assert cfg.kb and cfg.questions and cfg.generator and cfg.retriever
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    with KnowledgeBase(Path(cfg.kb)) as kb:
        chunks = kb.chunks()
    questions = split(load_questions(cfg.questions), "train")[: cfg.batch_size]
    if len(questions) < cfg.batch_size:
        raise UserError(f"batch_size={cfg.batch_size}, but {len(questions)} training questions")
    propose = Proposals(Candidates(dense=0, bm25=k, random=0), chunks, questions, cfg.seed)
    rows = list(range(cfg.batch_size))
    chunks_BK = propose(torch.tensor(rows).numpy(), torch.zeros(len(rows), 0).long().numpy(), 0)
    rag = RagModel(DualEncoder.load(cfg.retriever), Generator.load(cfg.generator), Prompt())
    rag.train()
    asked, answers = [q.question for q in questions], [q.gold for q in questions]
    loaded, seconds, kept = peak_memory(), [], 1.0
    with matmul(cfg.matmul):
        for _ in range(1 + cfg.repeats):
            rag.zero_grad(set_to_none=True)
            clock = Clock()
            kept = step(rag, Marginal(), asked, answers, chunks_BK).kept
            seconds.append(clock.lap())
        spent = peak_memory() - loaded
        found = [p.grad for p in rag.generator.parameters() if p.grad is not None]
        rag.zero_grad(set_to_none=True)
        OnePass()(rag, Marginal(), asked, answers, chunks_BK)
    exact = [p.grad for p in rag.generator.parameters() if p.grad is not None]
    wrong = [a - b for a, b in zip(found, exact, strict=True)]
    return {
        "seconds": statistics.median(seconds[1:]),
        "bytes": spent,
        "kept": kept,
        "error": float(torch.nn.utils.get_total_norm(wrong) / torch.nn.utils.get_total_norm(exact)),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each case; its ratios are to the exact pass of the same K."""
    shown = Table(title="one joint step")
    for name in ("K", "passes", "skip below", "f", "error", "s", "of one", "MiB", "of one"):
        shown.add_column(name, justify="right")
    for row in rows:
        one = next(r for r in rows if r["k"] == row["k"])
        shown.add_row(
            str(row["k"]),
            "1" if row["step"] == "one_pass" else "2",
            f"{row['skip_below']:.2g}",
            f"{row['kept']:.2f}",
            f"{row['error']:.0e}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / one['seconds']:.2f}",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['bytes'] / one['bytes']:.2f}",
        )
    return shown


if __name__ == "__main__":
    config.run(main, StepsConfig)

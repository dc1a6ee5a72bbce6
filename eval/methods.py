"""Every fine-tuning method, closed book and with retrieval: accuracy, forgetting and cost.

    rag2 eval methods -c configs/demo/methods.yaml out=runs/methods
    rag2 eval methods -c configs/demo/methods.yaml seeds=[0] lrs=[1e-3] \\
        methods='{full: {tuning: full}, lora: {tuning: lora}}' out=runs/small
    rag2 eval methods kb=KB questions=FILE generator=PATH retriever=PATH out=runs/own

No method gets a better deal than another: on the first seed each is trained once at every rate of
`lrs`, and validation questions choose its rate, closed book and with retrieval apart, as they
choose K. The other seeds are trained at the rates so chosen, and the test questions of all seeds
are pooled. A run that is on disk is not trained again.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from rich.console import Console

from rag2 import artifact, config
from rag2.evaluation import methods, place, report
from rag2.evaluation.environment import environment
from rag2.evaluation.outcome import pool
from rag2.evaluation.results import summarize
from rag2.trials import Trials, TrialsConfig


class MethodsConfig(TrialsConfig):
    """Fine-tuning methods against each other, alone and in front of the same retriever."""

    out: str = "runs/methods"
    seeds: list[int] = Field(default=[0], min_length=1)
    """of the runs, and of the world where there is one; the first chooses the rates"""
    lrs: list[float] = Field(default=[1e-4, 1e-3, 1e-2], min_length=1)
    """peak learning rates that every method tries"""

    @field_validator("seeds", "lrs")
    @classmethod
    def _no_twins(cls, given: list) -> list:
        if len(set(given)) < len(given):
            raise ValueError(f"{given} holds a value twice")
        return given


def main(cfg: MethodsConfig) -> dict[str, Any]:
    """Train what is missing, evaluate, write the table; returns results.json."""
    place.check(cfg)
    torch.set_num_threads(1)
    first, *others = [Trials(cfg, seed, Path(cfg.out)) for seed in cfg.seeds]
    with place.claimed(cfg) as out:
        first.make()
        runs = first.train({name: cfg.lrs for name in cfg.methods})
        grids = first.grade(runs)
        results = [first.test(runs, grids)]
        for other in others:
            other.make()
            runs = other.train({name: grid.chosen for name, grid in grids.items()})
            results.append(other.test(runs, grids))
        arms = {name: pool([part[name] for part in results]) for name in results[0]}
        by_seed = {s: [*part.values()] for s, part in zip(cfg.seeds, results, strict=True)}
        about = {"seed": cfg.seeds[0], "environment": environment()}
        summary = summarize(cfg.task, [*arms.values()], **about, by_seed=by_seed)
        summary["left_out"] = dict.fromkeys(cfg.methods.keys() - grids.keys(), "no rate trained it")
        summary["methods"] = methods.summary(arms, grids, cfg.seeds[0])
        report.write(out, summary, [*arms.values()])
        artifact.replace(out / "methods.md", methods.markdown(summary))
        (out / "methods.png").write_bytes(methods.picture(summary))
    Console().print(report.terminal_table(summary))
    return summary


if __name__ == "__main__":
    config.run(main, MethodsConfig)

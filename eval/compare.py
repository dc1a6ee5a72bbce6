"""All arms on the same questions -> one table with intervals, paired tests and what each cost.

    rag2 eval compare -c configs/demo/compare.yaml out=runs/compare
    rag2 eval compare -c configs/demo/compare.yaml arms=[base,frozen_rag,joint] out=runs/small
    rag2 eval compare kb=KB questions=FILE generators='{base: PATH, ft: PATH}' \\
        retrievers='{warm: PATH}' out=runs/own

Every arm is a generator and a retriever, or a hybrid of two arms; prompt, scoring and the choice
of reading, K and temperature on validation questions are the same for all.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field
from rich.console import Console

from rag2 import config, lineup, pipeline
from rag2.evaluation import (
    arms,
    combined,
    files,
    latency,
    place,
    report,
    score,
    trial,
)
from rag2.evaluation.environment import environment
from rag2.evaluation.hybrids import HYBRIDS
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.questions import load_questions, split, with_choices
from rag2.evaluation.results import summarize
from rag2.evaluation.trial import QuestionSets, Rules, Trial
from rag2.lineup import LineupConfig
from rag2.registry import UserError
from rag2.retrieval import Fused
from rag2.systems import Systems
from rag2.training import distributed
from rag2.training.log import Advance, progress
from rag2.types import Question


class CompareConfig(LineupConfig):
    """Comparison of base, fine-tuned, frozen-RAG, FT+RAG and jointly trained systems.

    `arms` may name `majority` too, which is there by default.
    """

    out: str = "runs/compare"
    """directory of the report; the systems are found or made in `home`"""
    two_hop: str | None = None
    """JSONL of questions that need two documents, reported apart"""
    latency: int = Field(default=0, ge=0)
    """test questions that each arm answers one at a time, to time it; 0: none"""
    metrics: list[trial.Metric] = []
    """mutual_info, debiased: measured besides, at the cost of further prompts"""
    limit: int | None = Field(default=None, ge=1)
    """the first so many test questions; null: all"""


def main(cfg: CompareConfig) -> dict:
    """Make what is missing, evaluate every arm, write the report; returns results.json."""
    _check(cfg)
    place.check(cfg)
    if not (cfg.kb and cfg.questions):
        pipeline.ensure(cfg, {"data"})
    sets = read_questions(cfg)
    headers = cfg.shots.headers(sets.all(), sets.train, cfg.prompt)
    by_id = {q.id: header for q, header in zip(sets.all(), headers, strict=True)}
    where = distributed.device(cfg.device)
    systems = Systems(lineup.parts(cfg), cfg.seed, cfg.prompt, sets.all(), by_id, cfg.dtype, where)
    lineup.check_depth(cfg, systems)
    asked = None if cfg.arms is None else [name for name in cfg.arms if name != "majority"]
    chosen, left_out = lineup.choose(cfg, asked, arms.NAMES, systems, bool(sets.validation))
    if needed := lineup.stages(cfg, chosen):
        pipeline.ensure(cfg, needed)

    with place.claimed(cfg):
        results = evaluate(cfg, chosen, sets, systems)
    if "majority" in (cfg.arms or ["majority"]):
        position = score.majority_position(sets.train or sets.validation or sets.test)
        constant = score.constant(sets.test, position)
        results.append(ArmResult.of("majority", sets.test, constant, generator="majority"))
    made_here = cfg.world is not None and not (cfg.generators or cfg.retrievers or cfg.encoder)
    summary = summarize(
        task(cfg), results, seed=cfg.seed, environment=environment(), equal=made_here
    )
    summary["left_out"] = left_out
    passages = {chunk.id: chunk.passage for chunk in systems.chunks}
    logs = files.read_logs(Path(cfg.home)) if cfg.world else {}
    report.write(Path(cfg.out), summary, results, passages=passages, logs=logs)
    Console().print(report.terminal_table(summary))
    return summary


def evaluate(
    cfg: CompareConfig, chosen: Sequence[str], sets: QuestionSets, systems: Systems
) -> list[ArmResult]:
    """Every arm; those with one generator share what it has read, others run side by side.

    A hybrid's members are tried too, shown or not, and it reads nothing besides.
    """
    single = arms.members(*chosen)
    rules = Rules(cfg.ks, cfg.readings, cfg.metrics)
    found = {
        name: trial.search(arm, systems.retriever(arm.retriever), sets, rules)
        for name, arm in single.items()
        # The weight of a fused one goes by what the generator makes of its chunks.
        if not isinstance(systems.retriever(arm.retriever), Fused)
    }
    torch.set_num_threads(1)

    def run(generator: str, advance: Advance) -> dict[str, Trial]:
        done = {}
        with systems.reader(generator) as reader:
            for name, arm in single.items():
                if arm.generator == generator:
                    if isinstance(fused := systems.retriever(arm.retriever), Fused):
                        fused = trial.weighed(fused, sets.validation, reader, cfg.ks, cfg.readings)
                        systems.settle(arm.retriever, fused)
                        found[name] = trial.search(arm, fused, sets, rules)
                    done[name] = trial.run(
                        name,
                        arm,
                        sets,
                        found[name],
                        reader,
                        rules,
                        systems.gold,
                        advance,
                        parameters=fused.parameters if isinstance(fused, Fused) else {},
                    )
        return done

    counts = Counter(arm.generator for arm in single.values())
    generators = [name for name, _ in counts.most_common()]
    with (
        progress("evaluate", total=len(single) * len(sets.all())) as advance,
        ThreadPoolExecutor(cfg.jobs) as pool,
    ):
        parts = pool.map(lambda name: run(name, advance), generators)
        done = {name: tried for part in parts for name, tried in part.items()}

    def result(name: str) -> ArmResult:
        if name not in HYBRIDS:
            return done[name].result
        hybrid = HYBRIDS[name]
        return combined.run(name, hybrid, sets, *(done[part] for part in hybrid.members))

    results = {}
    for name in chosen:
        parts, bare = list(arms.members(name).values()), result(name)
        results[name] = replace(bare, **systems.cost(*parts), **systems.serving(parts, bare))
    if cfg.latency:
        results |= timed(results, sets.test[: cfg.latency], systems)
    return [results[name] for name in chosen]


def timed(
    results: dict[str, ArmResult], questions: Sequence[Question], systems: Systems
) -> dict[str, ArmResult]:
    """The results with the latency of each arm but the hybrids, while nothing else runs."""
    single = {name: arms.arm(name) for name in results if name not in HYBRIDS}
    found = {}
    with progress("latency", total=len(single)) as advance:
        for generator in {arm.generator for arm in single.values()}:
            with systems.reader(generator) as reader:
                for name in (name for name, arm in single.items() if arm.generator == generator):
                    retriever = systems.retriever(single[name].retriever)
                    took = latency.milliseconds(questions, retriever, reader, results[name].choice)
                    found[name] = replace(results[name], latency_ms=took)
                    advance()
    return found


def read_questions(cfg: CompareConfig) -> QuestionSets:
    """The question sets that are given, or those of `home`; only test must be there."""
    data = Path(cfg.home) / "data"
    path = cfg.questions or data / "questions.jsonl"
    questions = with_choices(load_questions(path), path)
    parts = {name: [q for q in questions if q.split == name] for name in ("train", "validation")}
    return QuestionSets(
        **parts,
        test=split(questions, "test")[: cfg.limit],
        control=_beside(cfg, cfg.control, data / "control.jsonl"),
        two_hop=_beside(cfg, cfg.two_hop, data / "two_hop.jsonl"),
    )


def task(cfg: CompareConfig) -> str:
    """What results.json calls the questions."""
    if cfg.questions is None:
        return cfg.world.name if cfg.world else Path(cfg.home).name
    shots = f"{cfg.shots.count} shots"
    return f"{Path(cfg.questions).stem} ({cfg.prompt.format}, {shots})"


def _beside(cfg: CompareConfig, given: str | None, own: Path) -> Sequence[Question]:
    """Questions that are reported apart: the given file, else the world's if its data is used."""
    path = given or (own if cfg.questions is None and own.exists() else None)
    return with_choices(load_questions(path), path) if path else []


def _check(cfg: CompareConfig) -> None:
    """Raise UserError for names and numbers that cannot be, before anything is made."""
    for name in cfg.arms or ():
        if name != "majority":
            arms.members(name)
    if "debiased" in cfg.metrics and cfg.prompt.format == "cloze":
        raise UserError("metrics=[debiased] needs prompt.format=letters: cloze lists no choices")
    lineup.check(cfg)


if __name__ == "__main__":
    config.run(main, CompareConfig)

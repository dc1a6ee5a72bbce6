"""All arms on the same questions -> one table with intervals, paired tests and what each cost.

    rag2 eval compare -c configs/demo/compare.yaml out=runs/compare
    rag2 eval compare -c configs/demo/compare.yaml arms=[base,frozen_rag,joint] out=runs/small

Every arm is a generator and a retriever; prompt, scoring and the choice of K and temperature on
validation questions are the same for all.
"""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from rich.console import Console

from rag2 import config, pipeline
from rag2.evaluation import arms, report, score, select
from rag2.evaluation.environment import environment
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.questions import load_questions, split
from rag2.evaluation.results import CONTROLS, summarize
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.systems import Systems
from rag2.training.log import Advance, progress
from rag2.types import Question


class CompareConfig(pipeline.Inputs):
    """Comparison of base, fine-tuned, frozen-RAG, FT+RAG and jointly trained systems."""

    out: str = "runs/compare"
    """directory of the report; the systems are found or made in `home`"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    arms: list[str] = Field(default=[*arms.ARMS, "majority"], min_length=1)
    ks: list[int] = Field(default=list(select.KS), min_length=1)
    """numbers of chunks to choose from on validation; 0 is the closed book"""
    prompt: Prompt = Prompt()
    limit: int | None = Field(default=None, ge=1)
    """the first so many test questions; null: all"""


PARTS = ("validation", "test", "control", "two_hop")


@dataclass(frozen=True, slots=True)
class QuestionSets:
    """What is asked: validation chooses, test counts, control and two_hop are reported beside."""

    train: Sequence[Question]
    validation: Sequence[Question]
    test: Sequence[Question]
    control: Sequence[Question]
    two_hop: Sequence[Question]

    def all(self) -> list[Question]:
        """Every question that is scored."""
        return [question for part in PARTS for question in getattr(self, part)]


def main(cfg: CompareConfig) -> dict:
    """Make what is missing, evaluate every arm, write the report; returns results.json."""
    chosen = {name: arms.arm(name) for name in cfg.arms if name != "majority"}
    if any(k < 0 for k in cfg.ks):
        raise UserError(f"ks={cfg.ks}: a number of chunks is 0 or more")
    report.check(cfg.out)
    pipeline.ensure(cfg, {"data"})
    sets = read_questions(cfg)
    systems = Systems(Path(cfg.home), cfg.seed, cfg.prompt, sets.all())
    if max(cfg.ks) > len(systems.chunks):
        raise UserError(f"ks={cfg.ks}: K is larger than the corpus of {len(systems.chunks)} chunks")
    pipeline.ensure(cfg, {stage for arm in chosen.values() for stage in arms.stages(arm)})
    found = {name: search(arm, systems, sets, max(cfg.ks)) for name, arm in chosen.items()}
    torch.set_num_threads(1)
    with progress("evaluate", total=len(chosen) * len(sets.all())) as advance:

        def run(generator: str) -> dict[str, ArmResult]:
            mine = [name for name, arm in chosen.items() if arm.generator == generator]
            return {n: evaluate(n, chosen[n], found[n], systems, sets, cfg, advance) for n in mine}

        # Arms with one generator share what it has read; different generators run side by side.
        counts = Counter(arm.generator for arm in chosen.values())
        generators = [name for name, _ in counts.most_common()]
        for name in generators:
            systems.reader(name)
        with ThreadPoolExecutor(cfg.jobs) as pool:
            done = {k: v for part in pool.map(run, generators) for k, v in part.items()}
    results = [done[name] for name in chosen]
    if "majority" in cfg.arms:
        position = score.majority_position(sets.train)
        constant = score.constant(sets.test, position)
        results.append(ArmResult.of("majority", sets.test, constant, generator="majority"))
    summary = summarize(
        cfg.world.name if cfg.world else Path(cfg.home).name,
        results,
        seed=cfg.seed,
        environment=environment(),
    )
    report.write(Path(cfg.out), summary, results)
    Console().print(report.terminal_table(summary))
    return summary


def read_questions(cfg: CompareConfig) -> QuestionSets:
    """The question sets of `home`; control and two_hop may be absent."""
    data = Path(cfg.home) / "data"
    questions = load_questions(data / "questions.jsonl")
    others = [
        load_questions(path) if path.exists() else []
        for path in (data / "control.jsonl", data / "two_hop.jsonl")
    ]
    parts = [split(questions, name) for name in ("train", "validation", "test")]
    return QuestionSets(parts[0], parts[1], parts[2][: cfg.limit], *others)


def search(arm: arms.Arm, systems: Systems, sets: QuestionSets, k: int) -> dict[str, arms.Found]:
    """What the arm's retriever finds for each question set that is not empty."""
    retriever = systems.retriever(arm.retriever)
    found = {}
    for part in PARTS:
        asked = getattr(sets, part)
        # A control question has no evidence: the gold control answers it by heart.
        blind = part == "control" and arm.retriever == "gold"
        if asked:
            found[part] = arms.retrieve(asked, None if blind else retriever, k)
    return found


def evaluate(
    name: str,
    arm: arms.Arm,
    found: dict[str, arms.Found],
    systems: Systems,
    sets: QuestionSets,
    cfg: CompareConfig,
    advance: Advance,
) -> ArmResult:
    """One arm: score all sets, choose K and temperature on validation, answer the test."""
    began = time.perf_counter()
    reader = systems.reader(arm.generator)
    scored = {
        part: arms.evaluate(getattr(sets, part), rows, reader, advance)
        for part, rows in found.items()
    }
    choice = oracle = None
    if arm.retriever is not None:
        # The gold chunk is read alone by definition; every other arm may also choose to read none.
        ks = [1] if arm.retriever == "gold" else cfg.ks
        choice = select.choose(scored["validation"], score.answers(sets.validation), ks)
        oracle = select.oracle_on_test(scored["test"], score.answers(sets.test), ks)

    def accuracy(part: str) -> float | None:
        if part not in scored:
            return None
        kept = min(choice.k if choice else 0, scored[part].retrieved)
        logp_QC = score.marginal(scored[part], kept, choice.temperature if choice else 1.0)
        return float(np.mean(score.predict(logp_QC) == score.answers(getattr(sets, part))))

    gold = [frozenset(systems.gold[question.id]) for question in sets.test]
    ids_QK = scored["test"].ids_QK
    read = ids_QK[:, : choice.k if choice else 0].tolist()
    pairs = {(q.id, chunk) for q, row in zip(sets.test, read, strict=True) for chunk in row}
    train_seconds, trained = systems.cost(arm)
    return ArmResult.of(
        name,
        sets.test,
        scored["test"],
        choice,
        generator=arm.generator,
        retriever=arm.retriever,
        reading="marginal" if arm.retriever else "closed",
        oracle=oracle if name not in CONTROLS else None,
        recall_at_1=score.recall_at(ids_QK, gold, 1) if arm.retriever else None,
        recall_at_k=score.recall_at(ids_QK, gold, choice.k) if choice else None,
        control_accuracy=accuracy("control"),
        two_hop_accuracy=accuracy("two_hop"),
        train_seconds=train_seconds,
        eval_seconds=time.perf_counter() - began,
        trained_parameters=trained,
        dropped_chunks=len(pairs & reader.dropped),
    )


if __name__ == "__main__":
    config.run(main, CompareConfig)

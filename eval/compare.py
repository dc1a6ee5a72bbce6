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

from rag2 import config, pipeline
from rag2.evaluation import (
    arms,
    combined,
    files,
    latency,
    place,
    report,
    score,
    select,
    trial,
)
from rag2.evaluation.environment import environment
from rag2.evaluation.hybrids import HYBRIDS
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.questions import load_questions, split, with_choices
from rag2.evaluation.results import summarize
from rag2.evaluation.score import Reading
from rag2.evaluation.shots import Shots
from rag2.evaluation.trial import QuestionSets, Rules, Trial
from rag2.generator.prompt import Prompt
from rag2.registry import UserError, nearest
from rag2.retriever.encoder import EncoderConfig
from rag2.systems import TRAINED_BY, Parts, Systems, trained_retriever
from rag2.training import distributed
from rag2.training.log import Advance, progress
from rag2.types import Question


class CompareConfig(pipeline.Inputs):
    """Comparison of base, fine-tuned, frozen-RAG, FT+RAG and jointly trained systems."""

    out: str = "runs/compare"
    """directory of the report; the systems are found or made in `home`"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    arms: list[str] | None = Field(default=None, min_length=1)
    """null: every arm whose parts are given or made by the world, and majority; `staged`, which
    first answers a log of questions, if it is named here or its generator is given"""
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions; `control` and `two_hop` are asked beside and reported apart"""
    control: str | None = None
    two_hop: str | None = None
    generators: dict[str, str] = {}
    """base, ft, ... -> folder or hub id; those not named here are made by the world"""
    retrievers: dict[str, str] = {}
    """warm, joint -> encoder folder"""
    encoder: EncoderConfig | None = None
    """pretrained encoder that is the warm retriever where none is given"""
    ks: list[int] = Field(default=list(select.KS), min_length=1)
    """numbers of chunks to choose from on validation; 0 is the closed book"""
    readings: list[Reading] = Field(default=["marginal"], min_length=1)
    """marginal: each chunk alone, mixed by p(k|q); concat: the best k in one prompt. Of several,
    validation chooses, and all are reported"""
    latency: int = Field(default=0, ge=0)
    """test questions that each arm answers one at a time, to time it; 0: none"""
    metrics: list[trial.Metric] = []
    """mutual_info, debiased: measured besides, at the cost of further prompts"""
    shots: Shots = Shots()
    """worked examples before each question, from the training questions"""
    prompt: Prompt = Prompt()
    limit: int | None = Field(default=None, ge=1)
    """the first so many test questions; null: all"""
    dtype: str = "float32"
    """of the generators"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""


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
    systems = Systems(parts(cfg), cfg.seed, cfg.prompt, sets.all(), by_id, cfg.dtype, where)
    if max(cfg.ks) > len(systems.chunks):
        raise UserError(
            f"ks={cfg.ks}: K is larger than the corpus of {len(systems.chunks)} chunks; "
            f"allowed: 0 to {len(systems.chunks)}"
        )
    chosen, left_out = choose_arms(cfg, sets, systems)
    needed = stages(cfg, chosen)
    if needed:
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
    }
    torch.set_num_threads(1)

    def run(generator: str, advance: Advance) -> dict[str, Trial]:
        done = {}
        with systems.reader(generator) as reader:
            for name, arm in single.items():
                if arm.generator == generator:
                    done[name] = trial.attempt(
                        name, arm, sets, found[name], reader, rules, systems.gold, advance
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


def parts(cfg: CompareConfig) -> Parts:
    """Where every part is, or will be made."""
    made = Parts.of_home(Path(cfg.home)) if cfg.world else Parts(Path(), {}, {})
    return Parts(
        Path(cfg.kb) if cfg.kb else Path(cfg.home) / "data" / "kb.sqlite",
        {**made.generators, **cfg.generators},
        {**made.retrievers, **cfg.retrievers},
        None if "warm" in cfg.retrievers else cfg.encoder,
    )


def choose_arms(
    cfg: CompareConfig, sets: QuestionSets, systems: Systems
) -> tuple[list[str], dict[str, str]]:
    """The arms to run, by name, and what the others lack, where none was asked for by name.

    Raises UserError for an arm that was, and lacks a part, or validation questions.
    """
    usual = [n for n in arms.NAMES if n not in arms.ON_REQUEST or n in cfg.generators]
    asked = [name for name in cfg.arms or usual if name != "majority"]
    chosen, left_out = [], {}
    for name in asked:
        members = arms.members(name).values()
        lacking = next(filter(None, map(systems.lacks, members)), None)
        if any(a.retriever not in (None, "gold") for a in members) and not sets.validation:
            lacking = "validation questions: K is chosen on those of split validation"
        if lacking and cfg.arms:
            raise UserError(f"arm {name} lacks {lacking}")
        if lacking:
            left_out[name] = lacking
        else:
            chosen.append(name)
    if not chosen:
        raise UserError("there is no arm to run: give generators={base: PATH}, or a world")
    return chosen, left_out


def stages(cfg: CompareConfig, chosen: Sequence[str]) -> set[str]:
    """The stages of the world that make what the arms need and nobody gave."""
    if cfg.world is None:
        return set()
    single = arms.members(*chosen).values()
    trained = {trained_retriever(arm) for arm in single} - {None, *cfg.retrievers}
    if cfg.encoder:
        trained -= {"warm"}
    made = {arm.generator for arm in single} - cfg.generators.keys()
    return made | {TRAINED_BY[str(name)] for name in trained}


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
    if any(k < 0 for k in cfg.ks):
        raise UserError(f"ks={cfg.ks}: a number of chunks is 0 or more")
    for key, given, known in (
        ("generators", cfg.generators, arms.GENERATORS),
        ("retrievers", cfg.retrievers, tuple(TRAINED_BY)),
    ):
        for name in given:
            if name not in known:
                allowed = ", ".join(known)
                raise UserError(
                    f"{key}: unknown name {name!r}; allowed: {allowed}.{nearest(name, known)}"
                )
    if cfg.world is None and not (cfg.kb and cfg.questions and cfg.generators):
        raise UserError(
            "world is not given: set world=NAME, or kb=, questions= and generators= of your own"
        )


if __name__ == "__main__":
    config.run(main, CompareConfig)

"""What fine-tuning costs beside accuracy: forgetting, hallucination, style, faithfulness.

    rag2 eval robustness -c configs/demo/robustness.yaml out=runs/robustness
    rag2 eval robustness -c configs/demo/robustness.yaml arms=[base,ft,joint] limit=100 out=runs/few
    rag2 eval robustness kb=KB questions=FILE generators='{base: PATH, ft: PATH}' \\
        retrievers='{warm: PATH}' absent=FILE unrelated=FILE out=runs/own

The arms are those of `rag2 eval compare`; K, temperature and reading are chosen as there, or read
from its results. docs/robustness.md defines every number.
"""

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from rich.console import Console

from rag2 import config, lineup, pipeline
from rag2.evaluation import arms, counterfactual, files, perplexity, place, robustness
from rag2.evaluation import robustness_inputs as inputs
from rag2.evaluation import robustness_numbers as numbers
from rag2.evaluation import robustness_report as report
from rag2.evaluation.arms import Arm
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.environment import environment
from rag2.evaluation.perplexity import Perplexity
from rag2.evaluation.questions import split
from rag2.evaluation.robustness import Asked, Measured, Rules
from rag2.evaluation.select import Choice
from rag2.lineup import LineupConfig
from rag2.registry import UserError
from rag2.systems import Systems
from rag2.training import distributed
from rag2.training.log import Advance, progress
from rag2.types import Question
from rag2.worlds.almanac import Almanac


class RobustnessConfig(LineupConfig):
    """Forgetting, abstention, style, consistency and faithfulness of the arms of a comparison."""

    out: str = "runs/robustness"
    absent: str | None = None
    """JSONL of questions that no document of the corpus answers"""
    rewordings: str | None = None
    """JSONL of questions; those with one `metadata.fact` ask the same and share their choices"""
    unrelated: str | None = None
    """file or folder of texts that have nothing to do with the corpus: txt, md, jsonl, csv"""
    held_out: str | None = None
    """texts in the corpus's style that no arm was trained on"""
    paraphrases: str | None = None
    """texts that say in other words what the corpus says"""
    results: str | None = None
    """directory of `rag2 eval compare`, for K, temperature and reading; null: chosen here"""
    target_precision: float = Field(default=0.9, gt=0, le=1)
    """share of right answers that the abstention threshold is to reach on validation"""
    max_new_tokens: PositiveInt = 32
    """longest written answer, in tokens"""
    texts: PositiveInt = 300
    """of each kind of text at most so many, evenly spread over a file"""
    limit: int | None = Field(default=None, ge=1)
    """so many questions of each set, and facts of the rewordings, evenly spread; null: all"""


def main(cfg: RobustnessConfig) -> dict[str, Any]:
    """Measure every arm; writes robustness.json and robustness.md, returns the former."""
    _check(cfg)
    place.check(cfg)
    if not (cfg.kb and cfg.questions):
        pipeline.ensure(cfg, {"data"})
    asked, train = read_questions(cfg)
    texts, lacking = read_texts(cfg)
    headers = cfg.shots.headers(asked.all(), train, cfg.prompt)
    by_id = {q.id: header for q, header in zip(asked.all(), headers, strict=True)}
    where = distributed.device(cfg.device)
    systems = Systems(lineup.parts(cfg), cfg.seed, cfg.prompt, asked.all(), by_id, cfg.dtype, where)
    lineup.check_depth(cfg, systems)
    known = [name for name in arms.ARMS if name not in CONTROLS]
    names, left_out = lineup.choose(cfg, cfg.arms, known, systems, bool(asked.validation))
    chosen = arms.members(*names)
    given = read_choices(cfg, chosen)
    if needed := lineup.stages(cfg, names):
        pipeline.ensure(cfg, needed)
    with place.claimed(cfg) as out, tempfile.TemporaryDirectory(dir=out) as folder:
        edits, uneditable = counterfactual.edit(
            systems.parts.kb, Path(folder), asked.test, systems.gold
        )
        asked = Asked(**{key: getattr(asked, key) for key in SETS}, edits=edits)
        rules = Rules(cfg.ks, cfg.readings, cfg.target_precision, cfg.max_new_tokens, given)
        measured, surprise = evaluate(cfg, chosen, asked, texts, systems, rules)
        task = Path(cfg.questions).stem if cfg.questions else cfg.world and cfg.world.name
        summary = numbers.summarize(str(task), measured, surprise, cfg.seed)
        summary |= {
            "n": {key: len(getattr(asked, key)) for key in SETS},
            "texts": {name: len(rows) for name, rows in texts.items()},
            "edited": len(edits),
            "no_edit": uneditable,
            "left_out": left_out | lacking | _lacking(asked),
            "environment": environment(),
        }
        report.write(out, summary)
    Console().print(report.terminal_table(summary))
    return summary


SETS = ("validation", "test", "control", "absent", "rewordings")


def evaluate(
    cfg: RobustnessConfig,
    chosen: Mapping[str, Arm],
    asked: Asked,
    texts: Mapping[str, Sequence[str]],
    systems: Systems,
    rules: Rules,
) -> tuple[list[Measured], dict[str, dict[str, Perplexity]]]:
    """Every arm in the order asked for, and by generator how surprising each kind of text is."""
    for arm in chosen.values():
        systems.retriever(arm.retriever)  # made here, not by two threads
    torch.set_num_threads(1)
    edited = {chunk.id: chunk for edit in asked.edits for chunk in edit.chunks.values()}

    def run(generator: str, advance: Advance) -> tuple[dict[str, Measured], dict[str, Perplexity]]:
        with systems.reader(generator) as reader:
            reader.by_id = systems.by_id | edited
            surprise = {
                name: perplexity.perplexity(reader.generator, rows) for name, rows in texts.items()
            }
            done = {
                name: robustness.measure(
                    name, arm, systems.retriever(arm.retriever), reader, asked, rules, advance
                )
                for name, arm in chosen.items()
                if arm.generator == generator
            }
        return done, surprise

    counts = Counter(arm.generator for arm in chosen.values())
    generators = [name for name, _ in counts.most_common()]
    with (
        progress("robustness", total=len(chosen) * len(asked.all())) as advance,
        ThreadPoolExecutor(cfg.jobs) as pool,
    ):
        found = list(pool.map(lambda name: run(name, advance), generators))
    done = {name: measured for part, _ in found for name, measured in part.items()}
    surprise = {name: row for name, (_, row) in zip(generators, found, strict=True)}
    return [done[name] for name in chosen], surprise


def read_questions(cfg: RobustnessConfig) -> tuple[Asked, list[Question]]:
    """What is asked, given or of the world, and the training questions."""
    data = Path(cfg.home) / "data"
    path = cfg.questions or data / "questions.jsonl"
    questions = inputs.questions(path, [], None)
    world = cfg.world if cfg.questions is None and isinstance(cfg.world, Almanac) else None
    control = cfg.control or (data / "control.jsonl" if cfg.questions is None else None)
    absent = list(world.absent()) if world else []  # a home of before has no such file
    reworded = list(world.rewordings()) if world else []
    asked = Asked(
        validation=inputs.some(split(questions, "validation"), cfg.limit),
        test=inputs.some(split(questions, "test"), cfg.limit),
        control=inputs.questions(control, [], cfg.limit),
        absent=inputs.questions(cfg.absent, absent, cfg.limit),
        rewordings=inputs.rewordings(cfg.rewordings, reworded, cfg.limit),
    )
    inputs.check_ids(asked)
    return asked, [question for question in questions if question.split == "train"]


def read_texts(cfg: RobustnessConfig) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The texts of each kind, given or of the world, and what the missing kinds lack."""
    world = cfg.world if cfg.kb is None and isinstance(cfg.world, Almanac) else None
    own = Path(cfg.home) / "data" / "paraphrases.jsonl"
    paraphrases = cfg.paraphrases or (own if cfg.kb is None and own.is_file() else None)
    given = {"unrelated": cfg.unrelated, "held_out": cfg.held_out, "paraphrases": paraphrases}
    made = {"unrelated": world.unrelated, "held_out": world.held_out} if world else {}
    texts, lacking = {}, {}
    for kind, path in given.items():
        if path:
            texts[kind] = inputs.texts(kind, Path(path), cfg.texts)
        elif kind in made:
            texts[kind] = [f"{r['title']}\n{r['text']}".strip() for r in made[kind](cfg.texts)]
        else:
            lacking[f"perplexity on {kind} text"] = f"set {kind}=FILE"
    return texts, lacking


def read_choices(cfg: RobustnessConfig, chosen: Mapping[str, Arm]) -> dict[str, Choice]:
    """What an earlier comparison read each arm with; UserError for an arm it does not have."""
    if cfg.results is None:
        return {}
    rows = files.read_results(Path(cfg.results))["arms"]
    choices = {}
    for name, arm in chosen.items():
        row = rows.get(name)
        if row is None or row["k"] is None or row["temperature"] is None:
            raise UserError(f"results={cfg.results}: has no K and temperature of arm {name!r}")
        if row["k"] > max(cfg.ks):
            raise UserError(f"results={cfg.results}: arm {name!r} has K={row['k']}; raise ks")
        reading = row["reading"] if arm.retriever else "marginal"
        told = tuple((row.get("parameters") or {}).items())
        if arm.retriever == "hybrid" and not told:
            raise UserError(f"results={cfg.results}: has no dense_weight of arm {name!r}")
        choices[name] = Choice(row["k"], row["temperature"], float("nan"), reading, told)
    return choices


def _lacking(asked: Asked) -> dict[str, str]:
    """What is not measured for want of questions, and the key that gives them."""
    needs = {
        "control accuracy": "control",
        "abstention on absent questions": "absent",
        "consistency": "rewordings",
    }
    return {what: f"set {key}=FILE" for what, key in needs.items() if not getattr(asked, key)} | (
        {} if asked.edits else {"faithfulness": "no test question has evidence that can be edited"}
    )


def _check(cfg: RobustnessConfig) -> None:
    """Raise UserError for names and numbers that cannot be, before anything is made."""
    for name in cfg.arms or ():
        if name not in arms.members(name):
            raise UserError(
                f"arms: {name} has two members, {' and '.join(arms.members(name))}: ask for these"
            )
    lineup.check(cfg)


if __name__ == "__main__":
    config.run(main, RobustnessConfig)

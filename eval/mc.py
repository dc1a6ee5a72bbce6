"""One generator, closed book, on multiple-choice questions by log-likelihood.

rag2 eval mc generator=PATH questions=FILE.jsonl format=letters shots=0 out=runs/mc
rag2 eval mc -c configs/demo/mc.yaml format=cloze
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from rich.console import Console

from rag2 import config, pipeline
from rag2.evaluation import arms, place, report, trial
from rag2.evaluation.environment import environment
from rag2.evaluation.questions import load_questions, with_choices
from rag2.evaluation.results import summarize
from rag2.evaluation.shots import Shots
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.training import distributed
from rag2.training.log import progress


class McConfig(pipeline.Inputs):
    """Multiple-choice accuracy of a generator, with lm-evaluation-harness's scoring."""

    out: str = "runs/mc"
    questions: str | None = None
    """JSONL of questions"""
    generator: str | None = None
    split: Literal["train", "validation", "test"] | None = "test"
    """null: every question of the file, those that a system was trained on too"""
    format: Literal["letters", "cloze"] = "cloze"
    """letters: the choices are listed and the answer is a letter; cloze: the answer's text"""
    shots: int = Field(default=0, ge=0)
    """worked examples before each question, from the file's training questions"""
    sampler: Literal["first_n", "seeded"] = "first_n"
    """the same first examples for every question, or others for each"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    description: str = ""
    """what every prompt begins with; {subject} stands for the question's subject"""
    metrics: list[trial.Metric] = []
    """mutual_info, debiased: measured besides, at the cost of further prompts"""
    budget: PositiveInt = 1024
    """tokens of the context"""
    exact: bool = False
    """a whole forward for every choice, equal to the bit to lm-evaluation-harness; slow"""
    dtype: str = "float32"
    device: str = "cpu"


def main(cfg: McConfig) -> dict:
    """Score the questions; writes results.json, samples_base.jsonl and report.md."""
    cfg = pipeline.resolve(cfg)
    assert cfg.generator and cfg.questions
    place.check(cfg)
    questions = with_choices(load_questions(cfg.questions), cfg.questions)
    asked = [q for q in questions if cfg.split in (None, q.split)]
    if not asked:
        raise UserError(f"{cfg.questions}: no question of split {cfg.split!r}")
    if "debiased" in cfg.metrics and cfg.format == "cloze":
        raise UserError("metrics=[debiased] needs format=letters: cloze does not list the choices")
    generator = Generator.load(cfg.generator, cfg.dtype, distributed.device(cfg.device))
    prompt = Prompt(format=cfg.format, budget=cfg.budget, description=cfg.description)
    shots = Shots(count=cfg.shots, sampler=cfg.sampler, seed=cfg.seed)
    headers = shots.headers(asked, [q for q in questions if q.split == "train"], prompt)
    by_id = {q.id: header for q, header in zip(asked, headers, strict=True)}
    reader = arms.Reader(generator, prompt, {}, exact=cfg.exact, headers=by_id)
    sets = trial.QuestionSets([], [], asked, [], [])
    found = {"test": arms.retrieve(asked, None, 0)}
    rules = trial.Rules([0], metrics=cfg.metrics)
    with place.claimed(cfg), progress("mc", total=len(asked)) as advance:
        result = trial.run("base", arms.Arm("base"), sets, found, reader, rules, {}, advance).result
    task = f"{Path(cfg.questions).stem} ({cfg.format}, {cfg.shots} shots)"
    summary = summarize(task, [result], seed=cfg.seed, environment=environment())
    report.write(Path(cfg.out), summary, [result])
    Console().print(report.terminal_table(summary))
    return summary


if __name__ == "__main__":
    config.run(main, McConfig)

"""One generator, closed book, on multiple-choice questions by log-likelihood.

rag2 eval mc generator=PATH questions=FILE.jsonl format=letters shots=0 out=runs/mc
rag2 eval mc -c configs/demo/mc.yaml format=cloze
"""

import time
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt
from rich.console import Console

from rag2 import config, pipeline
from rag2.evaluation import arms, report
from rag2.evaluation.environment import environment
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.questions import load_questions
from rag2.evaluation.results import summarize
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
    split: str | None = None
    """train, validation or test; null: every question of the file"""
    format: Literal["letters", "cloze"] = "cloze"
    """letters: the choices are listed and the answer is a letter; cloze: the answer's text"""
    shots: Literal[0] = 0
    """worked examples before the question"""
    budget: PositiveInt = 1024
    """tokens of the context"""
    dtype: str = "float32"
    device: str = "cpu"


def main(cfg: McConfig) -> dict:
    """Score every question; writes results.json, samples_base.jsonl and report.md."""
    cfg = pipeline.resolve(cfg)
    assert cfg.generator and cfg.questions
    report.check(cfg.out)
    questions = load_questions(cfg.questions)
    if cfg.split:
        questions = [question for question in questions if question.split == cfg.split]
    if not questions:
        raise UserError(f"{cfg.questions}: no question of split {cfg.split!r}")
    began = time.perf_counter()
    generator = Generator.load(cfg.generator, cfg.dtype, distributed.device(cfg.device))
    prompt = Prompt(format=cfg.format, budget=cfg.budget)
    reader = arms.Reader(generator, prompt, {})
    with progress("mc", total=len(questions)) as advance:
        scores = arms.evaluate(questions, arms.retrieve(questions, None, 0), reader, advance)
    facts = {"generator": "base", "eval_seconds": time.perf_counter() - began}
    result = ArmResult.of("base", questions, scores, **facts)
    task = f"{Path(cfg.questions).stem} ({cfg.format}, {cfg.shots} shots)"
    summary = summarize(task, [result], seed=0, environment=environment())
    contexts = [
        prompt.context(q.question, [], generator.tokenizer, q.choices).text for q in questions
    ]
    continuations = [prompt.continuations(q.choices) for q in questions]
    report.write(Path(cfg.out), summary, [result], contexts, continuations)
    Console().print(report.terminal_table(summary))
    return summary


if __name__ == "__main__":
    config.run(main, McConfig)

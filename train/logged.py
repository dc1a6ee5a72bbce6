"""A log of answered questions: frozen RAG + training questions -> what it answered, if it was sure.

    rag2 train logged -c configs/demo/logged.yaml out=runs/logged
    rag2 train logged kb=KB questions=FILE generator=PATH retriever=PATH confidence=0.8 out=runs/log
    rag2 train finetune -c configs/demo/finetune.yaml objective.name=supervised \\
        questions=runs/logged/final/questions.jsonl out=runs/staged

The system reads, mixes and chooses K as the arm frozen_rag does. The right answers of the training
questions are never looked at, and nothing in the log tells them: `answer` is the system's own.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from scipy.special import softmax

from rag2 import artifact, config, pipeline
from rag2.evaluation import arms, place, score, select
from rag2.evaluation.arms import Found, Reader
from rag2.evaluation.questions import load_questions, split, subset, to_row, with_choices
from rag2.evaluation.score import Floats
from rag2.evaluation.select import Choice
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Retriever
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import distributed
from rag2.training.log import Clock, RunLog, progress
from rag2.types import Question


class LoggedConfig(pipeline.Inputs):
    """A log of questions with the answers of a retrieving system."""

    out: str = "runs/logged"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions: those of split train are answered, those of validation choose K"""
    question_share: float = Field(default=1.0, gt=0, le=1)
    """share of the training questions to answer; a smaller one lies inside a larger one"""
    generator: str | None = None
    retriever: str | None = None
    encoder: EncoderConfig | None = None
    """pretrained encoder where no `retriever` is given"""
    ks: list[int] = Field(default=list(select.KS), min_length=1)
    """numbers of chunks to choose from on validation"""
    confidence: float = Field(default=0.5, ge=0, le=1)
    """an answer is logged if its p, of all choices of its question, is at least this"""
    prompt: Prompt = Prompt()
    dtype: str = "float32"
    """of the generator"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    resume: bool = False
    """a log that is complete stays as it is"""


def main(cfg: LoggedConfig) -> dict[str, Any]:
    """Write final/questions.jsonl; returns how many questions were asked and are in it."""
    cfg = pipeline.resolve(cfg)
    final, keep = Path(cfg.out) / "final", cfg.resume
    cfg = cfg.model_copy(update={"resume": False})
    assert cfg.questions
    place.check(cfg)
    if keep and artifact.is_complete(final):
        return artifact.verify(final, kind="log")["meta"]
    everything = with_choices(load_questions(cfg.questions), cfg.questions)
    questions = subset(split(everything, "train"), cfg.question_share, cfg.seed)
    validation = split(everything, "validation") if len(cfg.ks) > 1 else []
    retriever, reader = load(cfg)
    with place.claimed(cfg):
        clock = Clock()
        choice = chosen(cfg, validation, retriever, reader)
        logp_QC = answer(questions, retriever, reader, choice)
        kept = sure(questions, logp_QC, cfg.confidence)
        counts = {"questions": len(questions), "kept": len(kept)}
        said = {"k": choice.k, "temperature": choice.temperature, "confidence": cfg.confidence}
        with artifact.committing(final, kind="log", meta=counts | said, replacing=True) as staging:
            lines = (json.dumps(to_row(q), ensure_ascii=False) + "\n" for q in kept)
            (staging / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        log = RunLog(Path(cfg.out))
        log.write(step=0, **counts, **said, seconds=clock.lap())
        log.close()
    return counts | said


def load(cfg: LoggedConfig) -> tuple[Retriever, Reader]:
    """Both halves over the knowledge base."""
    assert cfg.kb and cfg.generator
    with KnowledgeBase(Path(cfg.kb)) as kb:
        chunks = kb.chunks()
    if not 0 <= min(cfg.ks) <= max(cfg.ks) <= len(chunks):
        raise UserError(f"ks={cfg.ks}: each K must be between 0 and the {len(chunks)} chunks")
    where = distributed.device(cfg.device)
    if cfg.retriever:
        encoder = DualEncoder.load(cfg.retriever)
    else:
        assert cfg.encoder
        encoder = DualEncoder.build(cfg.encoder)
    generator = Generator.load(cfg.generator, cfg.dtype, where)
    by_id = {chunk.id: chunk for chunk in chunks}
    return Dense.over(encoder.to(where).eval(), chunks), Reader(generator, cfg.prompt, by_id)


def chosen(
    cfg: LoggedConfig, validation: Sequence[Question], retriever: Retriever, reader: Reader
) -> Choice:
    """K and temperature by the validation questions; of a single K there is nothing to choose."""
    if not validation:
        return Choice(cfg.ks[0], 1.0, 0.0)
    found = arms.retrieve(validation, retriever, max(cfg.ks))
    scores = arms.evaluate(validation, found, reader)
    return select.choose(scores, score.answers(validation), cfg.ks)


def answer(
    questions: Sequence[Question], retriever: Retriever, reader: Reader, choice: Choice
) -> Floats:
    """log p(choice | question) in nats [Q, C]."""
    nothing = arms.retrieve(questions, None, 0)
    found: Found = arms.retrieve(questions, retriever, choice.k) if choice.k else nothing
    with progress("logged", total=len(questions)) as advance:
        scores = arms.evaluate(questions, found, reader, advance)
    return score.marginal(scores, choice.k, choice.temperature)


def sure(questions: Sequence[Question], logp_QC: Floats, confidence: float) -> list[Question]:
    """The questions whose best choice has this much p, with it as their answer and no label.

    Raises UserError if there is none.
    """
    p_QC = np.asarray(softmax(logp_QC, axis=1))
    picks_Q, p_Q = score.predict(logp_QC).tolist(), p_QC.max(axis=1).tolist()
    kept = [
        replace(
            question,
            answer=pick,
            gold_chunk=None,
            evidence=(),
            metadata={"confidence": round(p, 6)},
        )
        for question, pick, p in zip(questions, picks_Q, p_Q, strict=True)
        if p >= confidence
    ]
    if not kept:
        raise UserError(
            f"confidence={confidence}: none of {len(questions)} answers is as sure; "
            f"the surest has p = {max(p_Q):.3g}"
        )
    return kept


if __name__ == "__main__":
    config.run(main, LoggedConfig)

"""Open questions, answered in words: closed book and with retrieved chunks, by SQuAD's EM and F1.

    rag2 eval open generator=PATH questions=FILE.jsonl kb=kb.sqlite retriever=bm25 out=runs/open
    rag2 eval open generator=PATH questions=FILE.jsonl kb=kb.sqlite retriever=PATH ks=[0,1,2,4]

The text is generated greedily up to the end of the line. The best K chunks stand in one prompt, the
best nearest the question; K is the one with the highest F1 on validation questions.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, PositiveInt
from rich.console import Console

from rag2 import config, pipeline
from rag2.evaluation import open_results, place
from rag2.evaluation.arms import Found, retrieve
from rag2.evaluation.environment import environment
from rag2.evaluation.open_questions import Writer, choose
from rag2.evaluation.open_results import OpenResult
from rag2.evaluation.questions import load_questions, split, without_choices
from rag2.evaluation.score import recall_at
from rag2.evaluation.select import KS
from rag2.evaluation.shots import Shots
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Gold, Lexical, Retriever, gold_chunks
from rag2.retriever.encoder import DualEncoder
from rag2.training import distributed
from rag2.training.log import Advance, progress
from rag2.types import Chunk, Question, Retrieved

ARMS = {"bm25": "bm25_rag", "gold": "gold_rag"}  # any other retriever: dense_rag


class OpenConfig(pipeline.Inputs):
    """Exact match and F1 of generated answers, with and without retrieval."""

    out: str = "runs/open"
    questions: str | None = None
    """JSONL of questions with `answers`"""
    generator: str | None = None
    kb: str | None = None
    """knowledge base file; null: closed book only"""
    retriever: str = "bm25"
    """bm25, gold (a control) or the path of a trained retriever"""
    split: str = "test"
    ks: list[int] = Field(default=list(KS), min_length=1)
    """numbers of chunks to choose from on validation questions; 0 is the closed book"""
    shots: int = Field(default=0, ge=0)
    """worked examples before the question, the first of split train"""
    prompt: Prompt = Prompt()
    max_new_tokens: PositiveInt = 32
    """longest answer, in tokens"""
    limit: int | None = Field(default=None, ge=1)
    """the first so many questions to test, and to choose K on; null: all"""
    seed: int = Field(default=0, ge=0)
    """of the bootstrap"""
    dtype: str = "float32"
    device: str = "cpu"
    """cpu, cuda or cuda:N"""


def main(cfg: OpenConfig) -> dict:
    """Answer every question in both ways; writes results.json, samples and report.md."""
    cfg = pipeline.resolve(cfg, unused=() if cfg.world else ("kb",))
    assert cfg.generator and cfg.questions
    if cfg.prompt.format != "cloze":
        raise UserError(f"prompt.format={cfg.prompt.format}: open questions have no choices; cloze")
    place.check(cfg)
    pool = without_choices(load_questions(cfg.questions), cfg.questions)
    test = split(pool, cfg.split)[: cfg.limit]
    ks = [1] if cfg.retriever == "gold" else cfg.ks  # the gold chunk is read alone by definition
    chosen = split(pool, "validation")[: cfg.limit] if cfg.kb and len(set(ks)) > 1 else []
    chunks, search = corpus(cfg, [*test, *chosen])
    if min(ks) < 0 or (cfg.kb and max(ks) > len(chunks)):
        raise UserError(f"ks={ks}: each is from 0 to the {len(chunks)} chunks of {cfg.kb}")
    worked = [question for question in pool if question.split == "train"]
    asked = [*test, *chosen]
    made = Shots(count=cfg.shots).headers(asked, worked, cfg.prompt)
    headers = {question.id: header for question, header in zip(asked, made, strict=True)}
    writer = Writer(
        Generator.load(cfg.generator, cfg.dtype, distributed.device(cfg.device)),
        cfg.prompt,
        {chunk.id: chunk for chunk in chunks},
        headers,
        cfg.max_new_tokens,
    )
    work = len(test) * (1 + bool(cfg.kb)) + len(chosen) * len(set(ks))
    with place.claimed(cfg), progress("open", total=work) as advance:
        results = [closed_book(writer, test, advance)]
        if search:
            gold = gold_chunks(test, chunks)
            results.append(with_chunks(cfg, writer, search, test, chosen, ks, gold, advance))
    name = f"{Path(cfg.questions).stem} (open, {cfg.shots} shots)"
    summary = open_results.summarize(name, results, seed=cfg.seed, environment=environment())
    contexts, _ = writer.contexts(test, [[]] * len(test))
    open_results.write(cfg.out, summary, results, contexts, cfg.max_new_tokens)
    Console().print(open_results.terminal_table(summary))
    return summary


def corpus(cfg: OpenConfig, asked: Sequence[Question]) -> tuple[list[Chunk], Retriever | None]:
    """The chunks and the retriever over them; neither without a knowledge base."""
    if not cfg.kb:
        return [], None
    with KnowledgeBase(Path(cfg.kb)) as kb:
        chunks = kb.chunks()
    if cfg.retriever == "bm25":
        return chunks, Lexical(BM25(chunks))
    if cfg.retriever == "gold":
        return chunks, Gold(gold_chunks(asked, chunks))
    encoder = DualEncoder.load(cfg.retriever).to(distributed.device(cfg.device))
    return chunks, Dense.over(encoder, chunks)


def closed_book(writer: Writer, test: Sequence[Question], advance: Advance) -> OpenResult:
    """The generator by itself."""
    began = time.perf_counter()
    answers = writer.answer(test, [[]] * len(test), advance)
    seconds = time.perf_counter() - began
    return OpenResult(name="base", questions=tuple(test), answers=answers, eval_seconds=seconds)


def with_chunks(
    cfg: OpenConfig,
    writer: Writer,
    search: Retriever,
    test: Sequence[Question],
    validation: Sequence[Question],
    ks: Sequence[int],
    gold: dict[str, list[int]],
    advance: Advance,
) -> OpenResult:
    """The generator with the best K chunks in its prompt, K chosen on validation."""
    began = time.perf_counter()
    depth = max(1, *ks)  # recall@1 is told also where K = 0 was chosen
    choice = None
    if validation:
        found = retrieve(validation, search, depth)
        choice = choose(writer, validation, found.ids_QK.tolist(), ks, advance)
    k = choice.k if choice else ks[0]
    found = retrieve(test, search, depth)
    answers = writer.answer(test, found.ids_QK[:, :k].tolist(), advance)
    gold_Q = [frozenset(gold[question.id]) for question in test]
    return OpenResult(
        name=ARMS.get(cfg.retriever, "dense_rag"),
        questions=tuple(test),
        answers=answers,
        retriever=cfg.retriever if cfg.retriever in ARMS else "dense",
        k=k,
        retrieved=passages(found, k),
        choice=choice,
        recall_at_1=recall_at(found.ids_QK, gold_Q, 1),
        recall_at_k=recall_at(found.ids_QK, gold_Q, k),
        eval_seconds=time.perf_counter() - began,
    )


def passages(found: Found, k: int) -> tuple[tuple[Retrieved, ...], ...]:
    """The best `k` chunks of each question with their scores."""
    rows = zip(found.ids_QK[:, :k].tolist(), found.scores_QK[:, :k].tolist(), strict=True)
    return tuple(tuple(map(Retrieved, ids, scores)) for ids, scores in rows)


if __name__ == "__main__":
    config.run(main, OpenConfig)

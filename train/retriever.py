"""Warm start: the corpus alone -> an encoder whose neighbours are about the same thing.

    rag2 train retriever -c configs/demo/retriever.yaml out=runs/retriever

Unsupervised contrastive training (InfoNCE, van den Oord et al. 2018; independent cropping as in
Contriever, Izacard et al. 2022): the query is a span of words from a chunk, the positive is that
chunk, or another one under the same title. It goes on until recall@5 on validation questions stops
rising; the questions decide when to stop and nothing else.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator

from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.losses.contrastive import info_nce, same_group
from rag2.modes import Precision, matmul
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import batches, checkpoint, optim, track
from rag2.training.interrupt import Stop
from rag2.training.log import Clock, progress
from rag2.training.run import Run
from rag2.training.sequences import load_tokenizer
from rag2.training.watch import Watch
from rag2.types import Chunk


class RetrieverConfig(pipeline.Inputs):
    """Contrastive warm start of the dual encoder."""

    out: str = "runs/retriever"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions"""
    tokenizer: str | None = None
    """tokenizer of an encoder from scratch; a pretrained encoder brings its own"""
    encoder: EncoderConfig = EncoderConfig()
    siblings: float = Field(default=0.5, ge=0, le=1)
    """share of queries whose positive is another chunk under the same title"""
    words: tuple[PositiveInt, PositiveInt] = (4, 12)
    """fewest and most words of a query span"""
    steps: int = Field(default=1000, ge=0)
    """the most steps; validation stops earlier"""
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    betas: optim.Betas = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    max_norm: float = Field(default=1.0, gt=0)
    schedule: optim.Schedule = optim.Schedule(decay="constant")
    matmul: Precision = "highest"
    """of float32 products while training: medium is in bfloat16 where the CPU can (AMX)"""
    validate_every: int = Field(default=50, ge=1)
    patience: int = Field(default=4, ge=1)
    """validations without a better recall@5 before it stops"""
    checkpoint_every: int = Field(default=500, ge=1)
    resume: bool = False
    log_with: track.Names = []
    """trackers that get the log's figures too: tensorboard, trackio, wandb, ..."""

    @model_validator(mode="after")
    def _spans_have_lengths(self) -> "RetrieverConfig":
        if self.words[0] > self.words[1]:
            raise ValueError(f"words={list(self.words)}: the fewest are more than the most")
        return self


class Pairs:
    """(query, positive chunk) views of a corpus, as a function of (seed, step)."""

    def __init__(self, chunks: Sequence[Chunk], cfg: RetrieverConfig) -> None:
        self.chunks, self.cfg = chunks, cfg
        groups: dict[str, list[int]] = {}
        for row, chunk in enumerate(chunks):
            groups.setdefault(chunk.title or chunk.document, []).append(row)
        self.members = list(groups.values())
        self.group = np.empty(len(chunks), dtype=np.int64)
        for number, rows in enumerate(self.members):
            self.group[rows] = number

    def batch(self, step: int) -> tuple[list[str], list[str], torch.Tensor]:
        """Queries, positive passages, and the group of each, which is no negative for itself."""
        rng = batches.generator(self.cfg.seed, step, 7)
        rows = batches.sample(len(self.chunks), self.cfg.batch_size, self.cfg.seed, step)
        queries, passages = [], []
        for row in rows:
            others = [r for r in self.members[self.group[row]] if r != row]
            positive = row
            if others and rng.random() < self.cfg.siblings:
                positive = others[rng.integers(len(others))]
            queries.append(self._span(self.chunks[row], rng))
            passages.append(self.chunks[positive].passage)
        return queries, passages, torch.from_numpy(self.group[rows])

    def _span(self, chunk: Chunk, rng: np.random.Generator) -> str:
        """Consecutive words of the text with the title somewhere among them, as in a question."""
        words = chunk.text.split()
        length = min(len(words), int(rng.integers(self.cfg.words[0], self.cfg.words[1] + 1)))
        start = int(rng.integers(len(words) - length + 1))
        span = words[start : start + length]
        span.insert(int(rng.integers(length + 1)), chunk.title)
        return " ".join(span).strip()


def recall_at_5(encoder: DualEncoder, chunks: Sequence[Chunk], watch: Watch) -> float:
    """That of the validation questions, over the corpus as the encoder sees it now."""
    ids = np.array([chunk.id for chunk in chunks])
    index = Flat().build(embed_corpus(encoder, [chunk.passage for chunk in chunks]), ids)
    return watch.recall_at_5(encoder, lambda queries_BD, k: index.search(queries_BD, k)[1])


def main(cfg: RetrieverConfig) -> dict[str, float]:
    """Train the encoder; returns the best validation recall@5."""
    pretrained = cfg.encoder.model is not None
    cfg = pipeline.resolve(cfg, {"tokenizer"} if pretrained else ())
    assert cfg.kb and cfg.questions
    checkpoint.seed_everything(cfg.seed)
    with KnowledgeBase(Path(cfg.kb)) as kb:
        chunks = kb.chunks()
    if not chunks:
        raise UserError(f"{cfg.kb}: the knowledge base is empty")
    watch = Watch(split(load_questions(cfg.questions), "validation"), chunks)
    if not watch.questions:  # nothing to stop by
        raise UserError(f"{cfg.questions}: no validation question names evidence in {cfg.kb}")
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer and not pretrained else None
    encoder = DualEncoder.build(cfg.encoder, tokenizer)
    pairs = Pairs(chunks, cfg)
    weights = optim.trainable([encoder])
    optimizer = optim.adamw({"retriever": (weights, cfg.lr)}, cfg.weight_decay, cfg.betas)
    best = copy.deepcopy(encoder)  # a module, so that checkpoints hold it too
    run = Run(cfg, {"retriever": encoder, "best": best}, optimizer)
    top, waited = run.extra.get("top", -1.0), run.extra.get("waited", 0)
    with (
        Stop() as stop,
        matmul(cfg.matmul),
        progress("retriever", cfg.steps, run.start) as advance,
    ):
        clock = Clock()
        for step in range(run.start, cfg.steps):
            if waited >= cfg.patience:
                break
            queries, passages, group_B = pairs.batch(step)
            queries_BD, chunks_BD, scale = encoder(queries, passages)
            positive_B = torch.arange(len(queries))
            loss = info_nce(
                queries_BD, chunks_BD, positive_B, scale, same_group(group_B, group_B), True
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = optim.clip(weights, float(loss.detach()), cfg.max_norm, step)
            lr = optim.set_lr(optimizer, cfg.schedule.factor(step, cfg.steps))["retriever"]
            optimizer.step()
            line = {"step": step, "loss": float(loss.detach()), "grad_norm": norm, "lr": lr}
            if (step + 1) % cfg.validate_every == 0 or step + 1 == cfg.steps:
                line["recall"] = recall_at_5(encoder, chunks, watch)
                waited += 1
                if line["recall"] > top:
                    top, waited = line["recall"], 0
                    best.load_state_dict(encoder.state_dict())
            run.log.write(**line, seconds=clock.lap())
            advance(1, loss=line["loss"], recall=top)
            if (step + 1) % cfg.checkpoint_every == 0 or stop.asked():
                run.checkpoint(step + 1, top=top, waited=waited)
                stop.obey(run, step + 1)
    trained = sum(p.numel() for p in weights)
    run.finish(retriever=best.eval(), recall_at_5=top, trained={"retriever": trained})
    return {"recall_at_5": top}


if __name__ == "__main__":
    config.run(main, RetrieverConfig)

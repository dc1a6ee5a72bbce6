"""Warm start: the corpus, or questions with evidence -> an encoder that finds what is asked for.

    rag2 train retriever -c configs/demo/retriever.yaml out=runs/retriever
    rag2 train retriever -c configs/demo/retriever.yaml pairs=questions out=runs/dpr

Contrastive training (InfoNCE, van den Oord et al. 2018): a query, the chunk that belongs to it, and
the chunks of others. `pairs=spans` takes both from the corpus alone (independent cropping as in
Contriever, Izacard et al. 2022); `pairs=questions` takes training questions and their gold chunks,
with hard negatives (DPR, Karpukhin et al. 2020). It goes on until recall@5 on validation questions
stops rising; those decide when to stop and nothing else.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split
from rag2.index.exact import TorchExact
from rag2.kb.store import KnowledgeBase
from rag2.modes import Precision, matmul
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import checkpoint, optim, track
from rag2.training.choices import Pairs, RetrieverTuning
from rag2.training.interrupt import Stop
from rag2.training.log import Clock, progress
from rag2.training.pairs import Spans
from rag2.training.run import Run
from rag2.training.sequences import load_tokenizer
from rag2.training.watch import Watch
from rag2.tuning.full import Full
from rag2.types import Chunk
from rag2_kernels import info_nce


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
    pairs: Pairs = Spans()
    """spans: of the corpus alone; questions: training questions and their evidence"""
    tuning: RetrieverTuning = Full()
    """which weights learn; adapters are merged into what is saved"""
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


def recall_at_5(encoder: DualEncoder, chunks: Sequence[Chunk], watch: Watch) -> float:
    """That of the validation questions, over the corpus as the encoder sees it now."""
    ids = np.array([chunk.id for chunk in chunks])
    index = TorchExact().build(embed_corpus(encoder, [chunk.passage for chunk in chunks]), ids)
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
    everything = load_questions(cfg.questions)
    watch = Watch(split(everything, "validation"), chunks)
    if not watch.questions:  # nothing to stop by
        raise UserError(f"{cfg.questions}: no validation question names evidence in {cfg.kb}")
    train = [question for question in everything if question.split == "train"]
    draw = cfg.pairs.prepare(chunks, train, cfg.batch_size, cfg.seed)
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer and not pretrained else None
    encoder = DualEncoder.build(cfg.encoder, tokenizer)
    encoder.map_towers(cfg.tuning.apply)
    weights = optim.trainable([encoder])
    optimizer = optim.adamw({"retriever": (weights, cfg.lr)}, cfg.weight_decay, cfg.betas)
    best = copy.deepcopy(encoder)  # a module, so that checkpoints hold it too
    data = [*chunks, *train, *watch.questions]
    run = Run(cfg, {"retriever": encoder, "best": best}, optimizer, data)
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
            batch = draw(step)
            queries_BD, chunks_ND, scale = encoder(batch.queries, batch.passages)
            given = (queries_BD, chunks_ND, torch.arange(len(batch.queries)), scale)
            loss = info_nce(*given, groups=batch.groups, symmetric=batch.symmetric)
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
            if run.due(step) or stop.asked():
                run.checkpoint(step + 1, top=top, waited=waited)
                stop.obey(run, step + 1)
        trained = sum(p.numel() for p in weights)
        run.finish(retriever=best.eval(), recall_at_5=top, trained={"retriever": trained})
    return {"recall_at_5": top}


if __name__ == "__main__":
    config.run(main, RetrieverConfig)

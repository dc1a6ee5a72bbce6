"""Pretraining: reading rows -> a small causal LM from scratch, its tokenizer included.

    rag2 train pretrain -c configs/demo/pretrain.yaml out=runs/base

The corpus holds rows {"title", "text", "qa": [[question, answer], ...]}: a passage with questions
on it (reading), questions alone (closed book) or plain text. Answers weigh 1 in the loss, the text
around them `text_weight`, so that a small model spends its capacity on reading. The model is born
with two heads that look back, for a name never seen before can only be answered by copying it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from rag2 import config, pipeline
from rag2.generator.bpe import train_bpe
from rag2.generator.learning import sequence_nll
from rag2.generator.load import build_llama
from rag2.generator.prompt import Prompt
from rag2.modes import Precision, matmul
from rag2.registry import UserError
from rag2.training import batches, checkpoint, optim, track
from rag2.training.interrupt import Stop
from rag2.training.log import Clock, progress
from rag2.training.run import Run
from rag2.training.sequences import (
    collate,
    load_tokenizer,
    plain,
    read_rows,
    reading,
    thin,
    weigh,
)


class Network(config.Config):
    """Shape of the Llama that is trained from scratch."""

    hidden: int = Field(default=192, ge=8)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    intermediate: int = Field(default=512, ge=8)
    max_positions: int = Field(default=512, ge=16)


class PretrainConfig(pipeline.Inputs):
    """Pretraining of a small base model."""

    out: str = "runs/base"
    seed: int = Field(default=0, ge=0, lt=2**63)
    corpus: str | None = None
    """JSONL of reading rows"""
    tokenizer: str | None = None
    """directory of a tokenizer; null: one is trained on the corpus"""
    network: Network = Network()
    prompt: Prompt = Prompt()
    text_weight: float = Field(default=0.1, gt=0)
    """of a token that is no answer, where an answer's weighs 1"""
    text_share: float = Field(default=0.3, gt=0, le=1)
    """share of those tokens that a step's loss is taken on, drawn anew each time"""
    steps: int = Field(default=700, ge=0)
    batch_size: int = Field(default=24, ge=1)
    lr_hidden: float = Field(default=1e-2, gt=0)
    """of Muon, for the hidden matrices"""
    lr: float = Field(default=1e-2, gt=0)
    """of AdamW, for embeddings and vectors"""
    betas: optim.Betas = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    max_norm: float = Field(default=1.0, gt=0)
    schedule: optim.Schedule = optim.Schedule()
    matmul: Precision = "highest"
    """of float32 products while training: medium is in bfloat16 where the CPU can (AMX)"""
    checkpoint_every: int = Field(default=500, ge=1)
    resume: bool = False
    log_with: track.Names = []
    """trackers that get the log's figures too: tensorboard, trackio, wandb, ..."""


def main(cfg: PretrainConfig) -> dict[str, float]:
    """Train the base model; returns the last loss in nats per weighted token."""
    cfg = pipeline.resolve(cfg)
    assert cfg.corpus is not None
    checkpoint.seed_everything(cfg.seed)
    rows = read_rows(Path(cfg.corpus))
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    else:
        tokenizer = train_bpe(map(plain, rows), cfg.vocabulary)
    readings = [reading(row, cfg.prompt, tokenizer) for row in rows]
    data = weigh(readings, tokenizer, cfg.text_weight)
    lengths = [len(sequence.ids_L) for sequence in data]
    check_lengths(cfg, lengths)

    base = build_llama(tokenizer, **cfg.network.model_dump())
    base.model.train()
    weights = optim.trainable([base.model])
    optimizer = optim.muon(base.model, cfg.lr_hidden, cfg.lr, cfg.weight_decay, cfg.betas)
    run = Run(cfg, {"generator": base.model}, optimizer, rows)
    loss = float("nan")
    with (
        Stop() as stop,
        matmul(cfg.matmul),
        progress("pretrain", cfg.steps, run.start) as advance,
    ):
        clock = Clock()
        for step in range(run.start, cfg.steps):
            picked = batches.bucketed(lengths, cfg.batch_size, cfg.seed, step)
            rng = batches.generator(cfg.seed, step, 3)
            rows_B = [thin(data[row], cfg.text_share, rng) for row in picked]
            ids_BL, weights_BL = collate(rows_B)
            nll = sequence_nll(base.model, ids_BL, weights_BL)
            optimizer.zero_grad(set_to_none=True)
            nll.backward()
            loss = float(nll.detach())
            norm = optim.clip(weights, loss, cfg.max_norm, step)
            lr = optim.set_lr(optimizer, cfg.schedule.factor(step, cfg.steps))["generator"]
            optimizer.step()
            run.log.write(step=step, loss=loss, grad_norm=norm, lr=lr, seconds=clock.lap())
            advance(1, loss=loss)
            if run.due(step) or stop.asked():
                run.checkpoint(step + 1)
                stop.obey(run, step + 1)
        base.model.eval()
        run.finish(generator=base, trained={"generator": sum(p.numel() for p in weights)})
    return {"loss": loss}


def check_lengths(cfg: PretrainConfig, lengths: Sequence[int]) -> None:
    """Raise UserError, before the first step, if a row is longer than the network's positions."""
    longest = int(np.argmax(lengths))
    if lengths[longest] > cfg.network.max_positions:
        raise UserError(
            f"{cfg.corpus}:{longest + 1}: a row of {lengths[longest]} tokens, the network has "
            f"positions for {cfg.network.max_positions}: raise network.max_positions or shorten it"
        )


if __name__ == "__main__":
    config.run(main, PretrainConfig)

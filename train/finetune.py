"""Classic fine-tuning: a base model + the corpus as text, or + questions -> knowledge in weights.

rag2 train finetune -c configs/demo/finetune.yaml out=runs/ft
rag2 train finetune -c configs/demo/finetune.yaml tuning.name=lora steps=20 out=runs/lora
rag2 train finetune -c configs/demo/finetune.yaml objective.name=supervised out=runs/sft
torchrun --nproc-per-node 2 train/finetune.py -c configs/demo/finetune.yaml
"""

from pathlib import Path

import torch
from pydantic import Field

from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split, subset
from rag2.generator.load import Generator
from rag2.kb.store import KnowledgeBase
from rag2.modes import Precision, matmul
from rag2.registry import UserError
from rag2.training import checkpoint, distributed, optim, parts, track
from rag2.training.choices import Objective, Tuning
from rag2.training.interrupt import Stop
from rag2.training.log import Clock, progress
from rag2.training.objectives import Unsupervised
from rag2.training.run import Run
from rag2.training.sequences import read_passages
from rag2.tuning.full import Full


class FinetuneConfig(pipeline.Inputs):
    """Unsupervised or supervised fine-tuning of the generator."""

    out: str = "runs/ft"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file, for the unsupervised objective"""
    questions: str | None = None
    """JSONL of questions, for the supervised one"""
    question_share: float = Field(default=1.0, gt=0, le=1)
    """share of the training questions to learn from; a smaller one lies inside a larger one"""
    generator: str | None = None
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    dtype: str = "float32"
    """of the generator; bfloat16 for a base under adapters"""
    gradient_checkpointing: bool = False
    """compute the activations twice instead of keeping them"""
    paraphrases: str | None = None
    """JSONL of rewordings of the documents, trained on beside them (unsupervised)"""
    paraphrases_per_document: int | None = Field(default=None, ge=0)
    """the first so many rewordings of each document; null: all"""
    objective: Objective = Unsupervised()
    tuning: Tuning = Full()
    steps: int = Field(default=100, ge=0)
    batch_size: int = Field(default=16, ge=1)
    """sequences of a step, of all processes together"""
    accumulate: int = Field(default=1, ge=1)
    """the batch is taken in so many equal parts one after the other, which needs the memory of one;
    the loss is the mean over the tokens of the whole batch all the same"""
    lr: float = Field(default=5e-4, gt=0)
    betas: optim.Betas = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    max_norm: float = Field(default=1.0, gt=0)
    schedule: optim.Schedule = optim.Schedule(warmup=10)
    matmul: Precision = "highest"
    """of float32 products while training: medium is in bfloat16 where the CPU can (AMX)"""
    checkpoint_every: int = Field(default=500, ge=1)
    resume: bool = False
    log_with: track.Names = []
    """trackers that get the log's figures too: tensorboard, trackio, wandb, ..."""


def main(cfg: FinetuneConfig) -> dict[str, float]:
    """Fine-tune the generator; returns the last loss in nats per token."""
    unused = "kb" if cfg.objective.needs == "questions" else "questions"
    cfg = pipeline.resolve(cfg, {unused})
    assert cfg.generator
    device = distributed.start(cfg.device)
    mine = parts.slices(cfg.batch_size, cfg.accumulate)
    checkpoint.seed_everything(cfg.seed)
    generator = Generator.load(cfg.generator, cfg.dtype, device)
    if cfg.gradient_checkpointing:
        generator.model.gradient_checkpointing_enable()
    generator = generator.tuned(cfg.tuning)
    generator.model.train()
    data = read_data(cfg)
    batch_loss = cfg.objective.prepare(data, generator, cfg.batch_size, cfg.seed)
    weights = optim.trainable([generator.model])
    optimizer = optim.adamw({"generator": (weights, cfg.lr)}, cfg.weight_decay, cfg.betas)
    run = Run(cfg, {"generator": generator.model}, optimizer, data)
    loss, clock = float("nan"), Clock()
    with (
        Stop() as stop,
        matmul(cfg.matmul, cfg.device),
        progress("finetune", cfg.steps, run.start) as advance,
    ):
        for step in range(run.start, cfg.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for part in mine:
                nll = batch_loss(step, part)
                (distributed.world() * nll).backward()  # the processes' gradients are averaged
                loss += float(nll.detach())
            distributed.average_gradients(weights)
            loss = float(distributed.each(torch.tensor(loss, dtype=torch.float64)).sum())
            norm = optim.clip(weights, loss, cfg.max_norm, step)
            lr = optim.set_lr(optimizer, cfg.schedule.factor(step, cfg.steps))["generator"]
            optimizer.step()
            run.log.write(step=step, loss=loss, grad_norm=norm, lr=lr, seconds=clock.lap())
            advance(1, loss=loss)
            if run.due(step) or stop.asked():
                run.checkpoint(step + 1)
                stop.obey(run, step + 1)
        generator.model.eval()
        run.finish(generator=generator, trained={"generator": sum(p.numel() for p in weights)})
    return {"loss": loss}


def read_data(cfg: FinetuneConfig) -> list:
    """What the objective trains on: passages of the knowledge base, or training questions."""
    if cfg.objective.needs == "questions":
        assert cfg.questions
        questions = split(load_questions(cfg.questions), "train")
        return subset(questions, cfg.question_share, cfg.seed)
    assert cfg.kb
    with KnowledgeBase(Path(cfg.kb)) as kb:
        texts = [chunk.passage for chunk in kb.chunks()]
    if not texts:
        raise UserError(f"{cfg.kb}: the knowledge base is empty")
    if cfg.paraphrases:
        texts += read_passages(Path(cfg.paraphrases), cfg.paraphrases_per_document)
    return texts


if __name__ == "__main__":
    config.run(main, FinetuneConfig)

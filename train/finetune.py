"""Classic fine-tuning: a base model + the corpus as text, or + questions -> knowledge in weights.

rag2 train finetune -c configs/demo/finetune.yaml out=runs/ft
rag2 train finetune -c configs/demo/finetune.yaml tuning.name=lora steps=20 out=runs/lora
rag2 train finetune -c configs/demo/finetune.yaml objective.name=supervised out=runs/sft
rag2 train finetune -c configs/demo/finetune.yaml objective=raft objective.passages=1 out=runs/raft
rag2 train finetune -c configs/demo/finetune.yaml objective=instruction epochs=5 out=runs/told
rag2 train finetune -c configs/demo/finetune.yaml objective=mixed epochs=5 out=runs/mixed
torchrun --nproc-per-node 2 train/finetune.py -c configs/demo/finetune.yaml
"""

from pathlib import Path

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rag2 import config, pipeline
from rag2.evaluation import learning
from rag2.evaluation.questions import load_questions, split, subset
from rag2.generator.load import Generator
from rag2.kb.store import KnowledgeBase
from rag2.modes import Precision, matmul
from rag2.registry import UserError
from rag2.training import checkpoint, distributed, optim, parts, track
from rag2.training.budget import Course, one_length
from rag2.training.choices import Objective, Tuning
from rag2.training.interrupt import Stop
from rag2.training.lessons import Given, Validation, first_of_each, hold_out
from rag2.training.log import Clock, progress, train_seconds
from rag2.training.objectives import Unsupervised
from rag2.training.run import Run
from rag2.training.sequences import read_paraphrases
from rag2.tuning.full import Full
from rag2.types import Chunk, Question


class FinetuneConfig(pipeline.Inputs):
    """Fine-tuning of the generator on texts, on questions or on both."""

    out: str = "runs/ft"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file, for the objectives that read"""
    questions: str | None = None
    """JSONL of questions, for those that answer"""
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
    """JSONL of rewordings of the documents, read beside them (unsupervised, instruction, mixed)"""
    paraphrases_per_document: int | None = Field(default=None, ge=0)
    """the first so many rewordings of each document; null: all"""
    objective: Objective = Unsupervised()
    tuning: Tuning = Full()
    validation: int = Field(default=0, ge=0)
    """documents, two rewordings of each held out, or validation questions, whose loss is measured
    after each epoch and at the end; 0: none"""
    steps: int | None = Field(default=100, ge=0)
    """of training, unless one of the next three is given"""
    epochs: PositiveInt | None = None
    """every row so often, in batches of whole epochs"""
    tokens: PositiveInt | None = None
    """until so many tokens carried loss"""
    seconds: PositiveFloat | None = None
    """until so many seconds of training: not reproducible"""
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

    _one_length = model_validator(mode="after")(one_length)


def main(cfg: FinetuneConfig) -> dict[str, float]:
    """Fine-tune the generator; returns the last loss in nats per token."""
    cfg = pipeline.resolve(cfg, {"kb", "questions"} - cfg.objective.needs)
    assert cfg.generator
    device = distributed.start(cfg.device)
    mine = parts.slices(cfg.batch_size, cfg.accumulate)
    checkpoint.seed_everything(cfg.seed)
    generator = Generator.load(cfg.generator, cfg.dtype, device)
    if cfg.gradient_checkpointing:
        generator.model.gradient_checkpointing_enable()
    generator = generator.tuned(cfg.tuning)
    generator.model.train()
    data, held = read_data(cfg)
    train = cfg.objective.prepare(data, generator, cfg.seed)
    unseen = cfg.objective.prepare(held, generator, cfg.seed) if held else None
    validation = Validation(generator.model, unseen, cfg.batch_size)
    course = Course(cfg, train.tokens_N)
    cfg = cfg.model_copy(update={"steps": course.steps})
    weights = optim.trainable([generator.model])
    optimizer = optim.adamw({"generator": (weights, cfg.lr)}, cfg.weight_decay, cfg.betas)
    run = Run(cfg, {"generator": generator.model}, optimizer, data)
    step, loss, spent = run.start, float("nan"), train_seconds(run.out)
    tokens = course.tokens(step)
    with (
        Stop() as stop,
        matmul(cfg.matmul, cfg.device),
        progress("finetune", course.steps, step) as advance,
    ):
        line = validation.measure("validation_nll_before") if step == 0 else {}
        clock = Clock()
        while not course.over(step, spent):
            rows = course.rows(step)
            optimizer.zero_grad(set_to_none=True)
            loss, whole = 0.0, int(train.tokens_N[rows].sum())
            for part in mine:
                if len(rows[part]):  # the last batch of an epoch may be too short for all parts
                    share = int(train.tokens_N[rows[part]].sum()) / whole
                    nll = share * train.nll(rows[part])
                    (distributed.world() * nll).backward()  # the processes' gradients are averaged
                    loss += float(nll.detach())
            distributed.average_gradients(weights)
            loss = float(distributed.each(torch.tensor(loss, dtype=torch.float64)).sum())
            norm = optim.clip(weights, loss, cfg.max_norm, step)
            factor = course.factor(cfg.schedule, step, spent)
            lr = optim.set_lr(optimizer, factor)["generator"]
            optimizer.step()
            seconds = clock.lap()
            tokens, spent = tokens + whole, spent + seconds
            over = course.over(step + 1, spent)
            if course.validates(step, over):
                line |= validation.measure("validation_nll")
            line |= {"tokens": tokens, "epoch": course.epoch(step)}
            run.log.write(step=step, loss=loss, grad_norm=norm, lr=lr, seconds=seconds, **line)
            advance(1, loss=loss)
            if run.due(step) or over or stop.asked():
                run.checkpoint(step + 1)
                stop.obey(run, step + 1)
            clock.lap()  # measuring and saving are no training
            step, line = step + 1, {}
        generator.model.eval()
        run.finish(generator=generator, trained={"generator": sum(p.numel() for p in weights)})
    if unseen:
        learning.draw(run.out)
    return {"loss": loss}


def read_data(cfg: FinetuneConfig) -> tuple[Given, Given | None]:
    """What the objective trains on, and what is held out for validation if that was asked for.

    Held out are questions where it answers, else rewordings.
    """
    needs, chunks, held = cfg.objective.needs, [], None
    if "kb" in needs:
        assert cfg.kb
        with KnowledgeBase(Path(cfg.kb)) as kb:
            chunks = kb.chunks()
        if not chunks:
            raise UserError(f"{cfg.kb}: the knowledge base is empty")
    questions, unseen = read_questions(cfg) if "questions" in needs else ((), ())
    rewordings, aside = read_rewordings(cfg, hold="questions" not in needs)
    if cfg.validation:
        # Chunks that carry loss are trained on; those that only stand in prompts are not.
        held = Given(unseen, () if cfg.objective.reads_texts else chunks, aside)
    return Given(questions, chunks, rewordings), held


def read_questions(cfg: FinetuneConfig) -> tuple[list[Question], list[Question]]:
    """The training questions, and those whose loss is measured."""
    assert cfg.questions
    everything, held = load_questions(cfg.questions), []
    train = subset(split(everything, "train"), cfg.question_share, cfg.seed)
    if cfg.validation:
        held = split(everything, "validation")
        if len(held) < cfg.validation:
            raise UserError(
                f"validation={cfg.validation}: {cfg.questions} has {len(held)} such questions"
            )
        held = subset(held, cfg.validation / len(held), cfg.seed)
    return train, held


def read_rewordings(cfg: FinetuneConfig, hold: bool) -> tuple[list[Chunk], list[Chunk]]:
    """The rewordings that the objective reads, and those held out if it is to `hold` some."""
    count, source = cfg.paraphrases_per_document, cfg.paraphrases
    if not cfg.objective.reads_texts:
        if count:
            raise UserError(
                f"paraphrases_per_document={count}: objective={cfg.objective.name} reads none"
            )
        return [], []
    rewordings, held = [], []
    if source:
        rewordings = read_paraphrases(Path(source), count is not None or cfg.validation > 0)
        if not rewordings:
            raise UserError(f"paraphrases={source}: there is none in it")
    if cfg.validation and hold:
        rewordings, held = hold_out(rewordings, cfg.validation, cfg.seed, source)
    if source and count is not None:
        rewordings = first_of_each(rewordings, count, source)
    return rewordings, held


if __name__ == "__main__":
    config.run(main, FinetuneConfig)

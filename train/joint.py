"""Joint training: questions + a live corpus -> retriever and generator that know each other.

    rag2 train joint -c configs/demo/joint.yaml out=runs/a steps=60 refresh.every=15
    torchrun --nproc-per-node 2 train/joint.py -c configs/demo/joint.yaml

Minimises -log sum_k p(z_k|x) p(y|x,z_k) (Lewis et al. 2020, eq. 1; Guu et al. 2020) over K chunks
that a stale index, BM25 and chance propose and that today's encoder scores.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from rag2 import config, pipeline
from rag2.evaluation.questions import load_questions, split, subset
from rag2.generator.load import DTYPES, Generator
from rag2.generator.prompt import Prompt
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.losses.marginal import Marginal
from rag2.modes import Precision, matmul
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.reindex.collapse import Guard
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AdaptiveRefresh, EagerRefresh, NoRefresh, SyncRefresh
from rag2.reindex.staleness import Staleness
from rag2.reindex.store import Store
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import batches, checkpoint, distributed, optim, parts, sharding, track
from rag2.training.candidates import Candidates, Proposals, rerank
from rag2.training.choices import Index, Loss, Refresh, RetrieverTuning, Step, Tuning
from rag2.training.interrupt import Stop
from rag2.training.log import Clock, progress
from rag2.training.run import Run
from rag2.training.step import TwoPass
from rag2.training.telemetry import Telemetry
from rag2.training.watch import Watch
from rag2.tuning.full import Full
from rag2.types import Chunk


class JointConfig(pipeline.Inputs):
    """Joint training of retriever and generator."""

    out: str = "runs/joint"
    seed: int = Field(default=0, ge=0, lt=2**63)
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions"""
    question_share: float = Field(default=1.0, gt=0, le=1)
    """share of the training questions to learn from; a smaller one lies inside a larger one"""
    generator: str | None = None
    retriever: str | None = None
    """encoder folder of a warm start or an earlier run"""
    encoder: EncoderConfig | None = None
    """pretrained encoder to start from where no `retriever` is given"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    dtype: str = "float32"
    """of the generator; bfloat16 for a base under adapters; float64 is that of both halves"""
    gradient_checkpointing: bool = False
    """compute the generator's activations twice instead of keeping them"""
    shard: bool = False
    """FSDP2: the generator's weights, gradients and optimizer state are in pieces over the
    processes, layer by layer; the retriever is whole in each"""
    train: list[Literal["retriever", "generator"]] = ["retriever", "generator"]
    """the halves that learn; the other stays as it is"""
    steps: int = Field(default=300, ge=0)
    batch_size: int = Field(default=24, ge=1)
    """questions of a step, of all processes together"""
    accumulate: int = Field(default=1, ge=1)
    """the batch is taken in so many equal parts one after the other, which needs the memory of one;
    candidates.in_batch then means the candidates of a part"""
    candidates: Candidates = Candidates()
    loss: Loss = Marginal()
    step: Step = TwoPass()
    tuning: Tuning = Full()
    """which of the generator's weights learn"""
    retriever_tuning: RetrieverTuning = Full()
    """which of the retriever's weights learn; adapters are merged into what is saved"""
    index: Index = Flat()
    refresh: Refresh = SyncRefresh()
    staleness: Staleness = Staleness()
    guard: Guard = Guard()
    prompt: Prompt = Prompt()
    lr_retriever: float = Field(default=6e-4, ge=0)
    lr_generator: float = Field(default=1e-4, ge=0)
    betas: optim.Betas = (0.9, 0.98)
    weight_decay: float = Field(default=0.01, ge=0)
    max_norm: float = Field(default=1.0, gt=0)
    schedule: optim.Schedule = optim.Schedule()
    matmul: Precision = "highest"
    """of float32 products while training: medium is in bfloat16 where the CPU can (AMX)"""
    checkpoint_every: int = Field(default=100, ge=1)
    resume: bool = False
    log_with: track.Names = []
    """trackers that get the log's figures too: tensorboard, trackio, wandb, ..."""


def main(cfg: JointConfig) -> dict[str, float]:
    """Train both halves; returns the last step's loss in nats per question."""
    cfg = pipeline.resolve(cfg)
    assert cfg.kb and cfg.questions
    device = distributed.start(cfg.device)
    refuse(cfg)
    rows = parts.rows_each(cfg.batch_size, cfg.accumulate)
    checkpoint.seed_everything(cfg.seed)
    with KnowledgeBase(Path(cfg.kb)) as kb, kb.reading():
        chunks, kb_version, kb_hash = kb.chunks(), kb.version, kb.content_hash()
    everything = load_questions(cfg.questions)
    questions = subset(split(everything, "train"), cfg.question_share, cfg.seed)
    watch = Watch(everything, chunks)
    watch.needed_by(cfg.refresh, cfg.guard)
    propose = Proposals(cfg.candidates, chunks, questions, cfg.seed)
    rag, halves = load(cfg, device)
    weights = [p for parameters, _ in halves.values() for p in parameters]
    optimizer = optim.adamw(halves, cfg.weight_decay, cfg.betas)
    modules = {"retriever": rag.retriever, "generator": rag.generator}
    given = [kb_hash, *(question for question in everything if question.split != "test")]
    run = Run(cfg, modules, optimizer, given)
    first_rank = distributed.rank() == 0
    telemetry = Telemetry(rag.retriever, watch, cfg.staleness, cfg.guard, run.extra)
    store = Store(run.out, chunks, rag.retriever, cfg.index, kb_version, kb_hash, first_rank)

    loss, clock = float("nan"), Clock()
    stop = Stop()
    with (
        matmul(cfg.matmul, cfg.device),
        progress("joint", cfg.steps, run.start) as advance,
        LiveIndex(
            store,
            cfg.refresh,
            run.extra,
            check=telemetry.watchdog.check,
            stopping=lambda: stop.heard,
            largest=distributed.largest,
            gathered=distributed.gathered,
        ) as index,
        stop,  # before its first index is there, a run has nothing to commit
    ):

        def commit(step: int) -> None:
            run.checkpoint(step, **index.state(), **telemetry.state())
            prune()

        def prune() -> None:
            if first_rank:  # the others might read what it removes
                index.prune(checkpoint.retained(run.out))

        prune()
        index.poll(run.start - 1)  # a run that was stopped may have waited for this
        stop.obey(run, run.start)
        for step in range(run.start, cfg.steps):
            rows_B = batches.sample(len(questions), cfg.batch_size, cfg.seed, step)
            rows_B = rows_B[distributed.rank() :: distributed.world()]
            asked = [questions[row].question for row in rows_B]
            answers = [questions[row].gold for row in rows_B]

            told = telemetry.before(step, index)

            # A stale index, words and chance propose; the loss scores with today's weights.
            queries_BD = embed_corpus(rag.retriever, asked, side="question")
            found_BM = index.search(queries_BD, propose.depth)
            if cfg.candidates.over:
                found_BM = rerank(rag.retriever, queries_BD, found_BM, propose.by_id)
            chunks_BK = propose(rows_B, found_BM, step)
            optimizer.zero_grad(set_to_none=True)
            batch, crowded = (asked, answers, chunks_BK), cfg.candidates.in_batch
            result = parts.accumulated(cfg.step, rag, cfg.loss.at(step), batch, crowded, rows)

            distributed.average_gradients(weights)
            result = parts.of_all(result)
            loss = float(result.loss_B.mean())
            norm = optim.clip(weights, loss, cfg.max_norm, step)
            lr = optim.set_lr(
                optimizer, cfg.schedule.factor(step, cfg.steps), retriever=telemetry.watchdog.rate
            )
            optimizer.step()
            told |= telemetry.after(step, index)
            if cfg.candidates.null:  # the last one; high where no chunk helps
                told["null_posterior"] = float(result.posterior_BK[:, -1].mean())

            age_steps, age_seconds = index.age(step)
            run.log.write(
                step=step,
                loss=loss,
                grad_norm=norm,
                lr_retriever=lr.get("retriever", 0.0),
                lr_generator=lr.get("generator", 0.0),
                generation=index.number,
                index_age_steps=age_steps,
                index_age_seconds=age_seconds,
                index_stall_seconds=index.stalled(),
                effective_chunks=float((1 / result.posterior_BK.square().sum(-1)).mean()),
                kept_prompts=result.kept,
                retrieved_digest=digest(chunks_BK),
                seconds=clock.lap(),
                **told,
            )
            advance(1, loss=loss)
            index.refresh(step, told.get("overlap"))
            try:
                if index.poll(step):
                    prune()
            except UserError:  # no index to go on with; what was trained is not lost
                if distributed.world() == 1:
                    commit(step + 1)
                raise
            if run.due(step) or stop.asked():
                commit(step + 1)
                stop.obey(run, step + 1)
        finish(cfg, run, rag, halves)
    return {"loss": loss}


def refuse(cfg: JointConfig) -> None:
    """UserError for settings that do not go together."""
    if isinstance(cfg.refresh, AdaptiveRefresh) and not cfg.staleness.every:
        raise UserError("refresh.name=adaptive goes by what is measured: set staleness.every")
    if isinstance(cfg.refresh, EagerRefresh) and distributed.world() > 1:
        raise UserError("refresh.name=eager: the clocks of several processes differ; use async")
    if "retriever" not in cfg.train and not isinstance(cfg.refresh, NoRefresh):
        raise UserError("the retriever does not learn (train=...): set refresh.name=none")
    if "retriever" not in cfg.train and not cfg.loss.teaches_generator():
        raise UserError(f"nothing learns: train={cfg.train} and loss.reader=none")
    if cfg.shard and distributed.world() == 1:
        raise UserError("shard=true is for several processes: torchrun --nproc-per-node N ...")
    if cfg.shard and not cfg.tuning.shards:
        raise UserError(f"shard=true is for tuning full, lora and rslora, not {cfg.tuning.name}")


def load(cfg: JointConfig, device: torch.device) -> tuple[RagModel, dict[str, Any]]:
    """Both halves, frozen where cfg.train says so, and the optimizer's groups."""
    assert cfg.generator
    if cfg.retriever:
        retriever = DualEncoder.load(cfg.retriever)
    else:
        assert cfg.encoder
        retriever = DualEncoder.build(cfg.encoder)
    # Half precision is for a frozen base; the retriever's embeddings decide what is found.
    retriever.to(device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    # A sharded one is cut layer by layer: whole it may be larger than the device.
    generator = Generator.load(cfg.generator, cfg.dtype, "cpu" if cfg.shard else device)
    if cfg.gradient_checkpointing:
        generator.model.gradient_checkpointing_enable()
    if "retriever" in cfg.train:
        retriever.map_towers(cfg.retriever_tuning.apply)
    else:
        retriever.requires_grad_(False)
    if "generator" in cfg.train:
        generator = generator.tuned(cfg.tuning)
    else:
        generator.model.requires_grad_(False)
    if cfg.shard:
        sharding.shard(generator.model, DTYPES[cfg.dtype], device)
    rag = RagModel(retriever, generator, cfg.prompt)
    rag.train()
    halves = {
        "retriever": (optim.trainable([rag.retriever]), cfg.lr_retriever),
        "generator": (optim.trainable([rag.generator]), cfg.lr_generator),
    }
    return rag, halves


def finish(cfg: JointConfig, run: Run, rag: RagModel, halves: dict[str, Any]) -> None:
    """Commit final/: both halves, the prompt and how many weights of each were trained."""
    rag.eval()
    run.finish(
        generator=Generator(rag.generator, rag.tokenizer),
        retriever=rag.retriever,
        prompt=cfg.prompt,
        trained={half: sum(p.numel() for p in group) for half, (group, _) in halves.items()},
    )


def digest(chunks_BK: list[list[Chunk]]) -> str:
    """SHA-256 of the whole batch's retrieved chunk ids in order."""
    ids_BK = torch.tensor([[chunk.id for chunk in row] for row in chunks_BK])
    return hashlib.sha256(json.dumps(distributed.gathered(ids_BK).tolist()).encode()).hexdigest()


if __name__ == "__main__":
    config.run(main, JointConfig)

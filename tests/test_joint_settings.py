"""Settings of joint training that arrive: a run with one differs from a run without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from joint_gradients import Batch
from rag2.losses.base import JointLoss
from rag2.losses.emdr2 import EMDR2
from rag2.losses.hard_em import HardEM
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2.rag import RagModel
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder
from rag2.training import parts
from rag2.training.step import OnePass, StepResult, TwoPass
from small_runs import Killed, Load, killed_at, log, start, weights

pytestmark = pytest.mark.usefixtures("seed")


def test_a_schedule_of_losses_goes_on_where_it_was(recipe: Load, home: Path, tmp_path: Path):
    loss = {"name": "distil_then_marginal", "steps": 6}
    # Few chunks: those of a question must fit one prompt.
    changes = {"loss": loss, "candidates": {"dense": 2, "bm25": 1, "random": 0}}
    start(recipe, "joint", home, tmp_path / "whole", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=5)
        start(recipe, "joint", home, tmp_path / "cut", **changes)
    start(recipe, "joint", home, tmp_path / "cut", **changes, resume=True)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    kept = [row["kept_prompts"] for row in log(tmp_path / "whole")]
    assert max(kept[:6]) < min(kept[6:])  # the distilled reader's one prompt, then every chunk's


def test_todays_encoder_chooses_among_what_a_stale_index_proposes(
    recipe: Load, home: Path, tmp_path: Path
):
    changes = {"refresh": {"name": "none"}, "lr_retriever": 0.05, "steps": 6}
    digests = []
    for over in (0, 12):
        candidates = {"dense": 3, "bm25": 0, "random": 0, "over": over}
        start(recipe, "joint", home, tmp_path / f"{over}", candidates=candidates, **changes)
        digests.append([row["retrieved_digest"] for row in log(tmp_path / f"{over}")])
    assert digests[0][-1] != digests[1][-1]


def test_in_batch_negatives_raise_the_loss_of_a_run(recipe: Load, home: Path, tmp_path: Path):
    losses = []
    for in_batch in (False, True):
        candidates = {"in_batch": in_batch}
        start(recipe, "joint", home, tmp_path / f"{in_batch}", candidates=candidates, steps=1)
        losses.append(log(tmp_path / f"{in_batch}")[0]["loss"])
    assert losses[1] > losses[0] + 0.1


def test_the_log_tells_the_posterior_of_the_null_chunk_and_the_effective_number_of_chunks(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[StepResult] = []
    honest = parts.of_all
    monkeypatch.setattr(parts, "of_all", lambda r: (seen.append(honest(r)), seen[-1])[1])
    start(recipe, "joint", home, tmp_path / "a", candidates={"null": True}, steps=3)
    for row, result in zip(log(tmp_path / "a"), seen, strict=True):
        posterior_BK = result.posterior_BK.double()
        assert row["null_posterior"] == pytest.approx(float(posterior_BK[:, -1].mean()), rel=1e-5)
        effective_B = 1 / (posterior_BK**2).sum(-1)
        assert row["effective_chunks"] == pytest.approx(float(effective_B.mean()), rel=1e-5)


def test_the_time_that_training_waits_for_its_index_is_in_the_log(
    recipe: Load, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest, clock = Store.build, {"now": 0.0}

    def build(self: Store, *args: Any, **named: Any) -> Any:
        clock["now"] += 100.0
        return honest(self, *args, **named)

    monkeypatch.setattr(Store, "build", build)
    monkeypatch.setattr("rag2.reindex.live.time.monotonic", lambda: clock["now"])
    start(recipe, "joint", home, tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    stalls = [row["index_stall_seconds"] for row in rows]
    assert stalls == [0, 0, 0, 100, 0, 0, 100, 0, 0]  # told with the first step after it


def test_the_optimizers_settings_arrive(recipe: Load, home: Path, tmp_path: Path):
    before = dict(DualEncoder.load(home / "retriever").named_parameters())
    moved = {}
    for name, changes in {
        "plain": {},
        "clipped": {"max_norm": 1e-12},  # far below Adam's epsilon: hardly a step
        "hasty": {"betas": (0.0, 0.0)},
    }.items():
        changes = {"steps": 3, "weight_decay": 0.0} | changes
        start(recipe, "joint", home, tmp_path / name, **changes)
        after = dict(DualEncoder.load(tmp_path / name / "final" / "retriever").named_parameters())
        moved[name] = torch.cat([(after[n] - before[n]).detach().flatten() for n in before])
    assert moved["clipped"].abs().max() < 1e-2 * moved["plain"].abs().max()
    assert not torch.equal(moved["plain"], moved["hasty"])


@pytest.mark.parametrize("in_batch", [False, True])
def test_each_part_of_an_accumulated_batch_is_what_the_step_makes_of_it(
    rag: RagModel, batch: Batch, in_batch: bool
):
    questions, answers, chunks_BK = batch
    twice = (2 * questions, 2 * answers, 2 * chunks_BK)
    result = parts.accumulated(OnePass(), rag, Marginal(), twice, in_batch, rows=3)
    alone = OnePass()(rag, Marginal(), *batch, in_batch)
    torch.testing.assert_close(result.loss_B, torch.cat([alone.loss_B] * 2))


@pytest.mark.parametrize(
    "loss",
    [Marginal(level="token"), EMDR2(level="token"), EMDR2(), HardEM(), PDist()],
    ids=lambda loss: f"{loss.name}-{getattr(loss, 'level', '')}",
)
def test_crowding_counts_as_often_as_a_loss_holds_the_prior(
    rag: RagModel, batch: Batch, loss: JointLoss
):
    """Scores of chunks that are read by nobody act as a larger normaliser, and as nothing else."""
    rag = rag.double()
    step = TwoPass()
    lonely = step(rag, loss, *batch).loss_B
    crowded = step(rag, loss, *batch, in_batch=True).loss_B
    _, crowding_B, logp_BST, mask_BST = rag(*batch, loss.subsets(4))
    scores_BK, *_ = rag.scores(batch[0], batch[2])
    wider = _with_crowd(loss, scores_BK, crowding_B, logp_BST, mask_BST)
    torch.testing.assert_close(crowded, wider.detach(), rtol=0, atol=1e-8)
    assert (crowded > lonely + 1e-6).all()


def _with_crowd(
    loss: JointLoss, scores_BK: Tensor, crowding_B: Tensor, logp_BST: Tensor, mask_BST: Tensor
) -> Tensor:
    """The loss where each prior is smaller by exp(-crowding), by one more, hopeless candidate."""
    k = scores_BK.shape[1]
    crowd_B = scores_BK.logsumexp(1) + torch.expm1(crowding_B).log()
    wide_BK = torch.cat([scores_BK, crowd_B[:, None]], dim=1)
    hopeless = torch.full_like(logp_BST[:, :1], -1e4)
    logp_BST = torch.cat([logp_BST[:, :k], hopeless, logp_BST[:, k:]], dim=1)
    mask_BST = torch.cat([mask_BST[:, :k], mask_BST[:, :1], mask_BST[:, k:]], dim=1)
    return loss(wide_BK, logp_BST, mask_BST)[0]

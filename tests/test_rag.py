"""Retriever and generator as one module: which weights the loss reaches, and by which two ways."""

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from joint_gradients import Batch, dead, gradients, left
from rag2.generator.prompt import Prompt
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training.step import OnePass, TwoPass
from small_world import SHAPE

pytestmark = pytest.mark.usefixtures("seed")


# --- what the loss reaches ------------------------------------------------------------------------

steps = pytest.mark.parametrize("step", [OnePass(), TwoPass(micro_batch=5)], ids=lambda s: s.name)


@steps
def test_a_step_reaches_every_tensor_but_the_key_biases_of_bert(rag: RagModel, batch: Batch, step):
    names = {name for name, _ in rag.named_parameters()}
    # Softmax over keys does not feel what all keys have in common.
    keys = {name for name in names if name.endswith("attention.self.key.bias")}
    assert len(keys) == 2 * SHAPE["layers"] and not any("pooler" in name for name in names)
    assert dead(rag, step, batch) == keys
    assert {name.split(".")[0] for name in names} == {"retriever", "generator"}
    assert {"retriever.towers.question", "retriever.towers.chunk", "retriever.log_scale"} <= {
        ".".join(name.split(".")[:3]) for name in names
    }


@steps
def test_a_chunk_encoder_that_is_cut_off_is_noticed(
    rag: RagModel, batch: Batch, step, monkeypatch: pytest.MonkeyPatch
):
    honest = DualEncoder.encode_chunks
    monkeypatch.setattr(
        DualEncoder, "encode_chunks", lambda self, texts: honest(self, texts).detach()
    )
    found = dead(rag, step, batch)
    towers = {n for n, _ in rag.named_parameters() if n.startswith("retriever.towers.chunk")}
    assert towers and towers <= found


def test_the_gradient_at_the_scores_is_prior_minus_posterior(rag: RagModel, batch: Batch):
    scores_BK, _, logp_BKT, mask_BKT = rag.double()(*batch)
    scores_BK = scores_BK.detach().double().requires_grad_()
    logp_BKT = logp_BKT.detach().requires_grad_()
    loss_B, posterior_BK = Marginal()(scores_BK, logp_BKT, mask_BKT)
    (grad_BK,) = torch.autograd.grad(loss_B.sum(), scores_BK)
    prior_BK = scores_BK.detach().softmax(-1)
    assert float((grad_BK - (prior_BK - posterior_BK)).abs().max()) <= 1e-6
    assert float((prior_BK - posterior_BK).abs().max()) > 1e-3  # else the line above says nothing
    joint_BK = (prior_BK.log() + (logp_BKT * mask_BKT).detach().sum(-1)).softmax(-1)
    torch.testing.assert_close(posterior_BK, joint_BK)
    for level in ("sequence", "token"):
        loss = Marginal(level=level)
        assert torch.autograd.gradcheck(
            lambda s, y, loss=loss: loss(s, y, mask_BKT)[0],
            (scores_BK, logp_BKT),
            atol=1e-6,
            rtol=1e-6,
        )


@steps
def test_with_one_chunk_a_step_is_plain_cross_entropy(rag: RagModel, batch: Batch, step):
    questions, answers, chunks_BK = batch
    single = (questions, answers, [row[:1] for row in chunks_BK])
    found = gradients(rag.double(), step, single)
    rag.zero_grad(set_to_none=True)
    nll_B = []
    for context_ids, answer_ids in rag.pairs(*single):
        ids = torch.tensor([[*context_ids, *answer_ids]])
        logits = rag.generator(input_ids=ids).logits[0, len(context_ids) - 1 : -1]
        labels = torch.tensor(answer_ids)
        nll_B.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    torch.stack(nll_B).mean().backward()
    expected = {f"generator.{n}": p.grad for n, p in rag.generator.named_parameters()}
    for name, grad in found.items():
        if name.startswith("generator."):
            torch.testing.assert_close(grad, expected[name], atol=1e-12, rtol=1e-9)
        else:  # one chunk is certain, whatever its score
            assert not grad.any(), name
    result = step(rag, Marginal(), *single)
    torch.testing.assert_close(result.loss_B, torch.stack(nll_B).detach(), atol=0, rtol=1e-9)
    assert result.posterior_BK.tolist() == [[1.0]] * 3


def test_a_chunk_that_questions_share_is_encoded_once_and_scored_for_each(
    rag: RagModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    honest = DualEncoder.encode_chunks

    def counted(self: DualEncoder, texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return honest(self, texts)

    monkeypatch.setattr(DualEncoder, "encode_chunks", counted)
    questions, _, chunks_BK = batch
    scores_BK, _ = rag.scores(questions, chunks_BK)
    assert len(seen) == len(set(seen)) == 10
    for row, question in enumerate(questions):
        alone_K = torch.cat([rag.scores([question], [[c]])[0][0] for c in chunks_BK[row]])
        torch.testing.assert_close(scores_BK[row], alone_K, atol=1e-4, rtol=1e-4)


def test_a_chunk_that_the_budget_has_no_room_for_stops_training(rag: RagModel, batch: Batch):
    longest = max(len(rag.tokenizer.encode(c.passage)) for row in batch[2] for c in row)
    rag.prompt = Prompt(budget=longest)
    with pytest.raises(UserError, match=rf"prompt.budget={longest}: chunk \d+ of document .* fit"):
        rag.pairs(*batch)


# --- negatives from the batch --------------------------------------------------------------------


@pytest.mark.parametrize("step", [OnePass(), TwoPass()], ids=lambda step: step.name)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_in_batch_negatives_normalise_the_prior_over_all_chunks_of_the_batch(
    rag: RagModel, batch: Batch, level: Literal["sequence", "token"], step: OnePass | TwoPass
):
    questions, answers, chunks_BK = batch
    result = step(rag, Marginal(level=level), *batch, in_batch=True)
    every = list({chunk.id: chunk for row in chunks_BK for chunk in row}.values())
    assert len(every) == 10
    with torch.no_grad():
        scores_BU, none_B = rag.scores(questions, [every] * 3)
        logp_RT, mask_RT = rag.logp(rag.pairs(questions, answers, [every] * 3))
    torch.testing.assert_close(none_B, torch.zeros(3), atol=1e-5, rtol=0)
    logp_BUT = (logp_RT * mask_RT).view(3, 10, -1)
    if level == "sequence":
        logp_BUT = logp_BUT.sum(-1, keepdim=True)
    said_BT = torch.ones(3, 1) if level == "sequence" else mask_RT.view(3, 10, -1)[:, 0]
    joint_BUT = scores_BU.log_softmax(1)[..., None] + logp_BUT
    own_BU = torch.tensor([[c.id in {own.id for own in row} for c in every] for row in chunks_BK])
    own_BUT = joint_BUT.masked_fill(~own_BU[..., None], -torch.inf)
    by_hand_B, larger_B = (-(rows.logsumexp(1) * said_BT).sum(-1) for rows in (own_BUT, joint_BUT))
    torch.testing.assert_close(result.loss_B, by_hand_B, atol=1e-4, rtol=1e-4)
    assert (result.loss_B >= larger_B - 1e-4).all(), "no bound of the larger marginal"
    assert (result.loss_B > step(rag, Marginal(level=level), *batch).loss_B).all()


def test_negatives_from_the_batch_push_the_retriever_away(rag: RagModel, batch: Batch):
    questions, _, chunks_BK = batch
    rag.double()
    weights = [p for p in rag.retriever.parameters() if p.requires_grad]
    along = [torch.randn_like(weight) for weight in weights]
    rag.scores(questions, chunks_BK)[1].sum().backward()
    slope = sum(
        (p.grad * d).sum() for p, d in zip(weights, along, strict=True) if p.grad is not None
    )

    def crowding(size: float) -> Tensor:
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight.add_(direction, alpha=size)
            value = rag.scores(questions, chunks_BK)[1].sum()
            for weight, direction in zip(weights, along, strict=True):
                weight.sub_(direction, alpha=size)
        return value

    by_hand = (crowding(1e-6) - crowding(-1e-6)) / 2e-6
    assert abs(by_hand) > 1e-4
    torch.testing.assert_close(slope, by_hand, rtol=1e-4, atol=1e-6)


def test_one_question_alone_has_no_negatives_in_the_batch(rag: RagModel, batch: Batch):
    questions, _, chunks_BK = batch
    _, crowding_B = rag.scores(questions[:1], chunks_BK[:1])
    torch.testing.assert_close(crowding_B, torch.zeros(1), atol=1e-5, rtol=0)


@steps
def test_a_loss_that_nothing_trainable_takes_part_in_leaves_everything_as_it_is(
    rag: RagModel, batch: Batch, step: OnePass | TwoPass
):
    rag.retriever.requires_grad_(False)  # and without a reader the generator is only a teacher
    result = step(rag, PDist(reader="none"), *batch)
    assert result.loss_B.isfinite().all() and not any(grad.any() for grad in left(rag).values())

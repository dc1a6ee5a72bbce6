"""Losses against their equations."""

import math

import pytest
import torch
from torch import Tensor, nn

from rag2.losses.base import JointLoss
from rag2.losses.emdr2 import EMDR2
from rag2.losses.hard_em import HardEM
from rag2.losses.loop import LOOP
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2.losses.schedule import DistilThenMarginal

Inputs = tuple[Tensor, Tensor, Tensor]

pytestmark = pytest.mark.usefixtures("seed")


def answers(questions=3, chunks=5, tokens=4):
    scores = torch.randn(questions, chunks, requires_grad=True)
    logp = -torch.rand(questions, chunks, tokens) * 3
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (questions, 1, 1))
    return scores, logp.requires_grad_(), mask.expand(questions, chunks, tokens)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_with_one_chunk_the_marginal_is_the_cross_entropy_of_the_answer(level):
    scores, logp, mask = answers(chunks=1)
    loss, posterior = Marginal(level=level)(scores, logp, mask)
    torch.testing.assert_close(loss, -(logp * mask).sum(2)[:, 0])
    torch.testing.assert_close(posterior, torch.ones(3, 1))


def test_the_sequence_marginal_is_minus_log_of_the_summed_probability():
    scores, logp, mask = answers()
    loss, posterior = Marginal()(scores, logp, mask)
    prior = scores.softmax(1)
    joint = prior * (logp * mask).sum(2).exp()
    torch.testing.assert_close(loss, -joint.sum(1).log())
    torch.testing.assert_close(posterior, joint / joint.sum(1, keepdim=True))
    loss.sum().backward()
    torch.testing.assert_close(scores.grad, prior - posterior)
    torch.testing.assert_close(logp.grad, -posterior[:, :, None] * mask)


def test_both_levels_agree_on_answers_of_one_token():
    scores, logp, mask = answers(tokens=1)
    a, b = (Marginal(level=level)(scores, logp, mask)[0] for level in ("sequence", "token"))
    torch.testing.assert_close(a, b)


LOSSES = {
    "sequence": Marginal(),
    "token": Marginal(level="token"),
    "mean": Marginal(level="mean"),
    "emdr2": EMDR2(),
    "emdr2 at tokens": EMDR2(level="token"),
    "pdist": PDist(temperature=0.5),
    "pdist of sums": PDist(answer="sum", temperature=2.0, reader="none"),
    "loop": LOOP(temperature=0.5),
    "hard_em": HardEM(),
}


def asked(loss: JointLoss, chunks: int = 5, questions: int = 3, tokens: int = 4) -> Inputs:
    """Random scores and log-probabilities for as many prompts as the loss reads, in fp64."""
    prompts = len(loss.subsets(chunks))
    scores = torch.randn(questions, chunks, dtype=torch.float64, requires_grad=True)
    logp = -3 * torch.rand(questions, prompts, tokens, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (questions, 1, 1))
    mask = (torch.arange(tokens) < lengths).expand(questions, prompts, tokens)
    return scores, logp.requires_grad_(), mask


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> JointLoss:
    return LOSSES[request.param]


def total(loss: JointLoss, logp: Tensor, mask: Tensor) -> Tensor:
    """The answer's log-probability in each prompt."""
    return (logp * mask).sum(2)


def test_the_gradient_of_every_loss_is_that_of_its_value(loss: JointLoss):
    scores, logp, mask = asked(loss)
    judge = logp.detach().clone()
    # What a loss judges by is no part of its gradient: it stays as it is while the rest moves.
    fixed = {EMDR2: 5, PDist: 5, LOOP: 5}.get(type(loss), 0)

    def value(scores: Tensor, logp: Tensor) -> Tensor:
        return loss(scores, torch.cat([judge[:, :fixed], logp[:, fixed:]], 1), mask)[0]

    assert torch.autograd.gradcheck(value, (scores, logp), eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_at_the_scores_is_prior_minus_what_each_chunk_deserves(name: str):
    loss = LOSSES[name]
    scores, logp, mask = asked(loss)
    value, deserved = loss(scores, logp, mask)
    value.sum().backward()
    prior, said = scores.detach().softmax(1), total(loss, logp, mask).detach()[:, :5]
    length = mask.sum(2)[:, :5]
    expected = {
        "sequence": (prior.log() + said).softmax(1),
        "mean": (prior.log() + said / length).softmax(1),
        "emdr2": (prior.log() + said).softmax(1),
        "pdist": (said / length / 0.5).softmax(1),
        "pdist of sums": (said / 2.0).softmax(1),
        "loop": (-said / length / 0.5).softmax(1),
        "hard_em": nn.functional.one_hot((prior.log() + said).argmax(1), 5).double(),
    }
    weight = length[:, :1] if name in ("token", "emdr2 at tokens") else 1
    assert scores.grad is not None and not deserved.requires_grad
    torch.testing.assert_close(scores.grad, weight * (prior - deserved))
    torch.testing.assert_close(deserved.sum(1), torch.ones(3, dtype=torch.float64))
    if name in expected:
        torch.testing.assert_close(deserved, expected[name])


@pytest.mark.parametrize("name", LOSSES)
def test_what_reaches_the_generator_is_what_the_equation_says(name: str):
    loss = LOSSES[name]
    scores, logp, mask = asked(loss)
    value, deserved = loss(scores, logp, mask)
    value.sum().backward()
    got = torch.zeros_like(logp) if logp.grad is None else logp.grad
    expected = torch.zeros_like(logp)
    if name in ("sequence", "hard_em"):
        expected = -deserved[:, :, None] * mask
    elif name == "mean":
        expected = -(deserved / mask.sum(2))[:, :, None] * mask
    elif name == "token":
        expected = -(scores.log_softmax(1)[:, :, None] + logp).softmax(1) * mask
    elif name != "pdist of sums":  # all chunks in one prompt
        expected[:, 5] = -1.0 * mask[:, 5]
    torch.testing.assert_close(got, expected.detach())


def test_with_one_chunk_every_loss_is_the_cross_entropy_of_the_answer(loss: JointLoss):
    scores, logp, mask = asked(loss, chunks=1)
    value, deserved = loss(scores, logp, mask)
    value.sum().backward()
    nll = -total(loss, logp, mask)[:, -1].detach()
    if isinstance(loss, Marginal) and loss.level == "mean":
        nll = nll / mask.sum(2)[:, 0]
    if isinstance(loss, PDist) and loss.reader == "none":
        nll = torch.zeros_like(nll)  # there is nothing to tell apart and nobody to teach
    if isinstance(loss, EMDR2):
        nll = nll - total(loss, logp, mask)[:, 0].detach()
    torch.testing.assert_close(value.detach(), nll)
    torch.testing.assert_close(deserved, torch.ones_like(deserved))
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores))


def test_chunks_that_are_all_alike_teach_the_retriever_nothing(loss: JointLoss):
    scores, logp, mask = asked(loss)
    scores = torch.zeros_like(scores).requires_grad_()
    alike = logp.detach()[:, :1].expand_as(logp).clone().requires_grad_()
    loss(scores, alike, mask)[0].sum().backward()
    expected = torch.zeros_like(scores)
    if isinstance(loss, HardEM):  # it takes the first of equals for the only one
        expected = torch.full_like(scores, 1 / 5) - nn.functional.one_hot(torch.zeros(3).long(), 5)
    torch.testing.assert_close(scores.grad, expected, atol=1e-12, rtol=0)


def test_what_stands_under_a_false_mask_and_under_a_masked_chunk_is_ignored(loss: JointLoss):
    scores, logp, mask = asked(loss)
    poisoned = torch.where(mask, logp.detach(), torch.nan).requires_grad_()
    (a, b), (c, d) = loss(scores, logp, mask), loss(scores, poisoned, mask)
    assert torch.equal(a, c) and torch.equal(b, d)
    c.sum().backward()
    assert poisoned.grad is None or poisoned.grad[mask].isfinite().all()
    masked = scores.detach().clone()
    masked[:, 2] = -torch.inf
    value, deserved = loss(masked.requires_grad_(), logp, mask)
    value.sum().backward()
    assert value.isfinite().all() and (deserved[:, 2] == 0).all()
    assert masked.grad is not None and (masked.grad[:, 2] == 0).all()


def test_hard_em_is_the_limit_of_the_tempered_marginal_and_bounds_it():
    scores, logp, mask = asked(HardEM())
    hard, one_hot = HardEM()(scores, logp, mask)
    joint = scores.log_softmax(1) + total(HardEM(), logp, mask)
    for temperature in (1e-2, 1e-3):
        tempered = -temperature * (joint / temperature).logsumexp(1)
        assert (tempered <= hard + 1e-12).all()
        assert (hard - tempered <= temperature * math.log(5) + 1e-12).all()
    torch.testing.assert_close(one_hot, (joint / 1e-4).softmax(1).detach(), atol=1e-3, rtol=0)
    soft, _ = Marginal()(scores, logp, mask)
    assert ((hard - soft >= 0) & (hard - soft <= math.log(5))).all()


def test_distillation_finds_a_chunk_that_the_retriever_rates_at_nothing_the_marginal_does_not():
    scores = torch.tensor([[20.0, 19.0, -20.0]], dtype=torch.float64)
    logp = torch.tensor([[[-6.0], [-6.0], [-0.1]]], dtype=torch.float64)
    mask = torch.ones_like(logp)
    pulls = {}
    for name, loss in {"marginal": Marginal(), "pdist": PDist(reader="none")}.items():
        moved = scores.clone().requires_grad_()
        loss(moved, logp, mask)[0].sum().backward()
        assert moved.grad is not None
        pulls[name] = -float(moved.grad[0, 2])
    assert pulls["marginal"] < 1e-10 and pulls["pdist"] > 0.99


def test_the_target_of_sums_is_the_posterior_of_a_uniform_prior():
    loss = PDist(answer="sum", temperature=1.0, reader="none")
    _, logp, mask = asked(loss)
    uniform = torch.zeros(3, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(uniform, logp, mask)[1], Marginal()(uniform, logp, mask)[1])


def test_leaving_one_of_two_out_judges_it_by_what_the_other_lacks():
    scores, logp, mask = asked(PDist(), chunks=2)
    assert LOOP().subsets(2) == [(1,), (0,), (0, 1)]
    without = logp.detach()[:, [1, 0, 2]]  # the answer's log-probability when chunk k is left out
    _, gained = PDist()(scores, logp, mask)
    _, missed = LOOP()(scores, without, mask)
    torch.testing.assert_close(missed, gained)


def test_a_schedule_is_the_first_loss_and_then_the_other():
    loss = DistilThenMarginal(steps=3)
    assert [type(loss.at(step)) for step in range(5)] == [PDist] * 3 + [Marginal] * 2
    assert DistilThenMarginal(steps=0).at(0) == Marginal()
    assert HardEM().at(7) == HardEM()


def test_divergence_divides_by_the_batch_and_not_by_the_number_of_chunks():
    scores, logp, mask = asked(PDist(reader="none"))
    value, target = PDist(reader="none")(scores, logp, mask)
    ours = nn.functional.kl_div(scores.log_softmax(1), target, reduction="batchmean")
    torch.testing.assert_close(value.mean(), ours)

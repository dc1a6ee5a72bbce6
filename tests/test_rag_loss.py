"""The head fused with the loss: the definition's values and gradients, and what is skipped."""

import math

import pytest
import torch

import rag2_kernels
from rag2.losses.emdr2 import EMDR2
from rag2.losses.hard_em import HardEM
from rag2.losses.loop import LOOP
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2_kernels import rag_loss, reference
from rag2_kernels.scaled import ScaledRows

pytestmark = pytest.mark.usefixtures("seed")

LOSSES = [Marginal(), Marginal(level="token"), Marginal(level="mean"), HardEM(), EMDR2()]
LOSSES += [PDist(), LOOP()]


def inputs(questions=6, chunks=4, prompts=4, longest=5, hidden=7, vocabulary=31):
    """Ragged answers, as many tokens under each prompt of a question."""
    counts_B = torch.randint(1, longest + 1, (questions,))
    pair_M = torch.arange(questions * prompts).repeat_interleave(
        counts_B.repeat_interleave(prompts)
    )
    rows = len(pair_M)
    hidden_MH = torch.randn(rows, hidden, dtype=torch.float64).requires_grad_()
    weight_VH = torch.randn(vocabulary, hidden, dtype=torch.float64).requires_grad_()
    scores_BK = (2 * torch.randn(questions, chunks, dtype=torch.float64)).requires_grad_()
    return hidden_MH, weight_VH, torch.randint(vocabulary, (rows,)), pair_M, scores_BK


def defined(hidden_MH, weight_VH, labels_M, pair_M, scores_BK, loss, prompts):
    """The definition's mean loss and its gradients."""
    loss_B, posterior_BK = reference.rag_loss(
        hidden_MH, weight_VH, labels_M, pair_M, scores_BK, loss, prompts
    )
    leaves = (hidden_MH, weight_VH, scores_BK)
    gradients = torch.autograd.grad(loss_B.mean(), leaves, allow_unused=True)
    return loss_B, posterior_BK, gradients


@pytest.mark.parametrize("workspace, whole", [(1, 1), (1, 10**9), (200, 200), (10**9, 10**9)])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.name}-{loss.model_dump_json()}")
def test_every_separable_loss_is_the_definition_s_in_value_and_gradient(
    loss, workspace, whole, monkeypatch
):
    monkeypatch.setattr(ScaledRows, "room", workspace)
    monkeypatch.setattr(ScaledRows, "whole", whole)
    prompts = len(loss.subsets(4))
    given = inputs(prompts=prompts)
    loss_B, posterior_BK, wanted = defined(*given, loss, prompts)
    got = rag_loss(*given, loss=loss, prompts=prompts)
    torch.testing.assert_close(got.loss_B, loss_B.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.loss, loss_B.mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.posterior_BK, posterior_BK.detach(), rtol=0, atol=1e-12)
    leaves = (given[0], given[1], given[4])
    for a, b in zip(torch.autograd.grad(3 * got.loss, leaves), wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, 3 * b, rtol=0, atol=1e-10)


def test_the_fused_loss_passes_gradcheck_in_double():
    hidden_MH, weight_VH, labels_M, pair_M, scores_BK = inputs(2, 2, 2, 2, 3, 5)
    assert torch.autograd.gradcheck(
        lambda h, w, s: rag_loss(h, w, labels_M, pair_M, s).loss,
        (hidden_MH, weight_VH, scores_BK),
        atol=1e-6,
    )


@pytest.mark.parametrize("workspace, whole", [(1, 1), (1, 10**9), (10**9, 10**9)])
def test_prompts_below_the_bound_get_no_gradient_and_the_others_theirs(
    workspace, whole, monkeypatch
):
    monkeypatch.setattr(ScaledRows, "room", workspace)
    monkeypatch.setattr(ScaledRows, "whole", whole)
    given = inputs(questions=20)
    hidden_MH, weight_VH, labels_M, pair_M, scores_BK = given
    _, posterior_BK, (dhidden_MH, _, dscores_BK) = defined(*given, Marginal(), 4)
    got = rag_loss(*given, skip_below=0.1)
    felt_M = posterior_BK.flatten()[pair_M] >= 0.1
    assert felt_M.any() and not felt_M.all()
    assert float(got.kept) == pytest.approx(float((posterior_BK >= 0.1).double().mean()))
    a, b, c = torch.autograd.grad(got.loss, (hidden_MH, weight_VH, scores_BK))
    torch.testing.assert_close(a[felt_M], dhidden_MH[felt_M], rtol=0, atol=1e-12)
    assert not a[~felt_M].any()
    torch.testing.assert_close(c, dscores_BK, rtol=0, atol=1e-12)
    # The weight's gradient is that of the rows that are left, each weighed as before.
    weight_M = -(posterior_BK.flatten()[pair_M] * felt_M) / 20
    logp_M = reference.answer_logprob(hidden_MH, weight_VH, labels_M)
    (wanted_VH,) = torch.autograd.grad((weight_M.detach() * logp_M).sum(), weight_VH)
    torch.testing.assert_close(b, wanted_VH, rtol=0, atol=1e-12)


def test_a_frozen_half_gets_nothing_and_costs_the_other_nothing():
    hidden_MH, weight_VH, labels_M, pair_M, scores_BK = inputs()
    frozen = weight_VH.detach()
    got = rag_loss(hidden_MH, frozen, labels_M, pair_M, scores_BK)
    full = rag_loss(hidden_MH, weight_VH, labels_M, pair_M, scores_BK)
    a, b = (torch.autograd.grad(r.loss, (hidden_MH, scores_BK)) for r in (got, full))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    silent = rag_loss(hidden_MH.detach(), frozen, labels_M, pair_M, scores_BK.detach())
    assert not silent.loss.requires_grad and torch.equal(silent.loss, full.loss)


def test_half_precision_rows_are_as_exact_as_plain_torch_makes_them():
    given = [x.detach() for x in inputs(questions=8, hidden=64, vocabulary=301)]
    given[0], given[1] = given[0] / 4, given[1] / 2
    half = [given[0].bfloat16(), given[1].bfloat16(), given[2], given[3], given[4].float()]
    for some in (given, half):
        for i in (0, 1, 4):
            some[i].requires_grad_()
    truth = [half[0].double(), half[1].double(), half[2], half[3], half[4].double()]
    truth = [x.detach().requires_grad_(x.is_floating_point()) for x in truth]
    _, _, wanted = defined(*truth, Marginal(), 4)
    logits_MV = half[0] @ half[1].T  # what a user writes, in bfloat16
    logp_M = logits_MV.float().log_softmax(-1).gather(-1, half[2][:, None])[:, 0]
    plain_B, _ = Marginal()(half[4], *reference.padded(logp_M, half[3], 8, 4))
    leaves = (half[0], half[1], half[4])
    plain = torch.autograd.grad(plain_B.mean(), leaves)
    got = torch.autograd.grad(rag_loss(*half).loss, leaves)
    for a, b, true in zip(got, plain, wanted, strict=True):
        assert a.dtype == b.dtype
        assert (a - true).norm() <= 1.5 * (b - true).norm() + 1e-6 * true.norm()


def test_rows_out_of_order_and_prompts_out_of_range_are_refused():
    hidden_MH, weight_VH, labels_M, pair_M, scores_BK = inputs()
    with pytest.raises(ValueError, match="in order"):
        rag_loss(hidden_MH, weight_VH, labels_M, pair_M.flip(0), scores_BK)
    with pytest.raises(ValueError, match="prompt 23 of 20"):
        rag_loss(hidden_MH, weight_VH, labels_M, pair_M, scores_BK[:5])
    with pytest.raises(ValueError, match="H=7.*H=6"):
        rag_loss(hidden_MH, weight_VH[:, :6], labels_M, pair_M, scores_BK)
    with pytest.raises(ValueError, match="impl"):
        rag2_kernels.rag_loss(hidden_MH, weight_VH, labels_M, pair_M, scores_BK, impl="cuda")


def test_prompts_are_kept_by_their_posterior_and_one_that_weighs_nothing_never():
    hidden_MH, weight_VH, labels_M, pair_M, _ = inputs(questions=3, chunks=2, prompts=2)
    given = (hidden_MH, weight_VH, labels_M, pair_M, torch.randn(3, 2, dtype=torch.float64))
    posterior_BK = rag_loss(*given).posterior_BK
    bound = float(posterior_BK.max(1).values.min())  # of the question that is least certain
    for factor in (1 - 1e-9, 1 + 1e-9):  # just below that posterior, and just above
        share = (posterior_BK >= factor * bound).double().mean()
        assert float(rag_loss(*given, skip_below=factor * bound).kept) == pytest.approx(
            float(share)
        )
    assert rag_loss(*given, loss=HardEM()).kept == 0.5


def test_where_the_label_is_all_but_certain_the_gradient_keeps_its_digits():
    hidden_MH = torch.tensor([[20.0, 0.0]], requires_grad=True)
    weight_VH = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    given = (torch.tensor([0]), torch.tensor([0]), torch.zeros(1, 1))
    leaves = (hidden_MH, weight_VH)
    dhidden_MH, dweight_VH = torch.autograd.grad(rag_loss(*leaves, *given).loss, leaves)
    rest = math.exp(-20) / (1 + math.exp(-20))  # 1 - p, of which fp32's 1 - p has few digits
    assert dhidden_MH[0].tolist() == pytest.approx([-rest, rest], rel=1e-5)
    assert float(dweight_VH[0, 0]) == pytest.approx(-20 * rest, rel=1e-5)


def test_a_loss_scale_beyond_half_precision_s_range_scales_the_gradient():
    given = [x.detach() for x in inputs(questions=4, hidden=16)]
    given[0] = (given[0] / 1000).half().requires_grad_()
    given[1], given[4] = given[1].half(), given[4].float()
    loss = rag_loss(*given).loss
    (plain,) = torch.autograd.grad(loss, given[0], retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 2.0**17, given[0])
    wanted = 2.0**17 * plain.float()
    small = wanted.abs() < 60000  # of fp16's 65,504
    assert small.any()
    torch.testing.assert_close(scaled.float()[small], wanted[small])


def test_without_gradients_none_is_made(monkeypatch):
    monkeypatch.setattr(ScaledRows, "backward", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        assert rag_loss(*inputs()).loss.isfinite()


def test_a_question_that_is_not_a_number_shows_in_the_gradient():
    hidden_MH, weight_VH, labels_M, pair_M, scores_BK = inputs()
    wrong_MH = hidden_MH.detach().clone()
    wrong_MH[0] = torch.nan
    loss = rag_loss(wrong_MH, weight_VH, labels_M, pair_M, scores_BK.detach()).loss
    assert torch.autograd.grad(loss, weight_VH)[0].isnan().any()


@pytest.mark.parametrize("bound", [-0.1, 1.0, 2.0, math.nan])
def test_a_bound_that_is_no_share_is_refused(bound):
    with pytest.raises(ValueError, match="skip_below"):
        rag_loss(*inputs(), skip_below=bound)


@pytest.mark.parametrize("label", [-100, -1, 31])
def test_labels_that_are_no_tokens_are_named(label):
    given = list(inputs())
    given[2][0] = label
    with pytest.raises(ValueError, match=rf"labels.*{label}.*V=31"):
        rag_loss(*given)

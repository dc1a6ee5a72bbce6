"""The plain-torch definitions: values, exact gradients and the invariants of the marginal."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from rag2_kernels import answer_logprob, marginal_nll

pytestmark = pytest.mark.usefixtures("seed")


def head_inputs(rows=37, hidden=19, vocabulary=101, dtype=torch.float64, scale=1.0):
    hidden_MH = (torch.randn(rows, hidden, dtype=torch.float64) * scale).to(dtype)
    weight_VH = torch.randn(vocabulary, hidden, dtype=torch.float64).to(dtype)
    labels_M = torch.randint(vocabulary, (rows,))
    return hidden_MH.requires_grad_(), weight_VH.requires_grad_(), labels_M


def marginal_inputs(questions=5, chunks=4, tokens=6, dtype=torch.float64):
    scores_BK = (3 * torch.randn(questions, chunks, dtype=dtype)).requires_grad_()
    logp_BKT = (-4 * torch.rand(questions, chunks, tokens, dtype=dtype)).requires_grad_()
    lengths_B = torch.randint(1, tokens + 1, (questions,))
    mask_BKT = (torch.arange(tokens) < lengths_B[:, None])[:, None].expand(-1, chunks, -1)
    return scores_BK, logp_BKT, mask_BKT.clone()


# -- answer_logprob ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000, None])
def test_answer_logprob_and_its_gradients_equal_cross_entropy_for_every_chunk_size(chunk):
    hidden_MH, weight_VH, labels_M = head_inputs()
    weights_M = torch.randn(37, dtype=torch.float64)
    logp_M = answer_logprob(hidden_MH, weight_VH, labels_M, chunk=chunk)
    expected_M = -cross_entropy(hidden_MH @ weight_VH.T, labels_M, reduction="none")
    assert logp_M.dtype == torch.float64
    torch.testing.assert_close(logp_M, expected_M, rtol=0, atol=1e-12)
    leaves = (hidden_MH, weight_VH)
    got = torch.autograd.grad((weights_M * logp_M).sum(), leaves)
    expected = torch.autograd.grad((weights_M * expected_M).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 100])
def test_answer_logprob_passes_gradcheck_in_double(chunk):
    hidden_MH, weight_VH, labels_M = head_inputs(rows=5, hidden=3, vocabulary=7)
    assert torch.autograd.gradcheck(
        lambda h, w: answer_logprob(h, w, labels_M, chunk=chunk), (hidden_MH, weight_VH), atol=1e-6
    )


def test_answer_logprob_keeps_no_logits_of_all_rows():
    hidden_MH, weight_VH, labels_M = head_inputs(rows=64, vocabulary=100)
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        answer_logprob(hidden_MH, weight_VH, labels_M, chunk=16)
    assert kept and (64, 100) not in kept, kept


def test_answer_logprob_gives_no_gradient_to_a_frozen_weight():
    hidden_MH, weight_VH, labels_M = head_inputs()
    weight_VH.requires_grad_(False)
    answer_logprob(hidden_MH, weight_VH, labels_M).sum().backward()
    assert weight_VH.grad is None and hidden_MH.grad is not None and hidden_MH.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answer_logprob_is_at_least_as_exact_as_plain_torch(dtype):
    hidden_MH, weight_VH, labels_M = head_inputs(dtype=dtype, scale=2.0)
    truth_M = -cross_entropy(hidden_MH.double() @ weight_VH.double().T, labels_M, reduction="none")
    logits_MV = hidden_MH @ weight_VH.T
    plain_M = -cross_entropy(logits_MV, labels_M, reduction="none")
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            logp_M = answer_logprob(hidden_MH, weight_VH, labels_M, chunk=10)
        assert logp_M.dtype == torch.float32
        assert (logp_M - truth_M).abs().max() <= (plain_M - truth_M).abs().max() + 2e-5
    for gradient in torch.autograd.grad(logp_M.sum(), (hidden_MH, weight_VH)):
        assert gradient.dtype == dtype


def test_answer_logprob_of_no_rows_is_empty():
    hidden_MH, weight_VH, labels_M = head_inputs(rows=0)
    logp_M = answer_logprob(hidden_MH, weight_VH, labels_M)
    (gradient,) = torch.autograd.grad(logp_M.sum(), weight_VH)
    assert logp_M.shape == (0,) and not gradient.any()


# -- marginal_nll --------------------------------------------------------------------------------


def test_the_marginal_is_the_log_of_the_mean_answer_probability_under_the_prior():
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT)
    joint_BK = scores_BK.softmax(-1) * (logp_BKT * mask_BKT).sum(-1).exp()
    torch.testing.assert_close(loss_B, -joint_BK.sum(-1).log())
    torch.testing.assert_close(posterior_BK, joint_BK / joint_BK.sum(-1, keepdim=True))
    assert not posterior_BK.requires_grad


def test_the_token_level_multiplies_the_marginals_of_the_tokens():
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level="token")
    p_BT = (scores_BK.softmax(-1)[..., None] * logp_BKT.exp()).sum(1)
    torch.testing.assert_close(loss_B, -(p_BT.log() * mask_BKT[:, 0]).sum(-1))
    torch.testing.assert_close(posterior_BK.sum(-1), torch.ones_like(loss_B))


def test_both_levels_agree_on_answers_of_one_token():
    inputs = marginal_inputs(tokens=1)
    for a, b in zip(marginal_nll(*inputs), marginal_nll(*inputs, level="token"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_marginal_passes_gradcheck_in_double_with_masked_chunks(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    hidden_BK = torch.zeros_like(scores_BK, dtype=torch.bool)
    hidden_BK[1, 2] = hidden_BK[3, 0] = True

    def loss(scores, logp):
        return marginal_nll(scores.masked_fill(hidden_BK, -torch.inf), logp, mask_BKT, level=level)[
            0
        ]

    assert torch.autograd.gradcheck(loss, (scores_BK, logp_BKT), atol=1e-6)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_gradient_of_the_scores_is_prior_minus_posterior_and_sums_to_zero(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)
    (grad_BK,) = torch.autograd.grad(loss_B.sum(), scores_BK)
    times_B1 = mask_BKT[:, 0].sum(-1, keepdim=True) if level == "token" else 1
    expected_BK = times_B1 * (scores_BK.softmax(-1) - posterior_BK)
    torch.testing.assert_close(grad_BK, expected_BK, rtol=0, atol=1e-12)
    assert grad_BK.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_one_chunk_gives_the_cross_entropy_of_the_answer_whatever_its_score(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs(chunks=1)
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)
    torch.testing.assert_close(loss_B, -(logp_BKT * mask_BKT).sum((1, 2)), rtol=0, atol=1e-14)
    torch.testing.assert_close(posterior_BK, torch.ones_like(scores_BK))
    assert not torch.autograd.grad(loss_B.sum(), scores_BK)[0].any()


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_shifts_permutations_and_duplicates_change_nothing(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)
    shifted_B, _ = marginal_nll(scores_BK + 1e4, logp_BKT, mask_BKT, level=level)
    torch.testing.assert_close(shifted_B, loss_B, rtol=0, atol=1e-10)
    order = torch.randperm(4)
    permuted = marginal_nll(scores_BK[:, order], logp_BKT[:, order], mask_BKT, level=level)
    torch.testing.assert_close(permuted[0], loss_B)
    torch.testing.assert_close(permuted[1], posterior_BK[:, order])
    twice = [torch.cat([x, x], dim=1) for x in (scores_BK, logp_BKT, mask_BKT)]
    doubled = marginal_nll(*twice, level=level)
    torch.testing.assert_close(doubled[0], loss_B)
    torch.testing.assert_close(doubled[1][:, :4], posterior_BK / 2)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_padding_and_masked_chunks_may_hold_nan(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    keep = torch.tensor([0, 2, 3])
    expected = marginal_nll(scores_BK[:, keep], logp_BKT[:, keep], mask_BKT[:, keep], level=level)
    wanted = torch.autograd.grad(expected[0].sum(), (scores_BK, logp_BKT))
    with torch.no_grad():
        scores_BK[:, 1] = -torch.inf
        logp_BKT[~mask_BKT] = torch.nan
        logp_BKT[:, 1] = torch.nan
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)
    torch.testing.assert_close(loss_B, expected[0])
    torch.testing.assert_close(posterior_BK[:, keep], expected[1])
    assert not posterior_BK[:, 1].any()
    got = torch.autograd.grad(loss_B.sum(), (scores_BK, logp_BKT))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_question_without_chunks_has_no_loss_and_no_gradient(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs()
    with torch.no_grad():
        scores_BK[2] = -torch.inf
        logp_BKT[2] = torch.nan
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)
    assert loss_B[2] == 0 and not posterior_BK[2].any()
    dscores_BK, dlogp_BKT = torch.autograd.grad(loss_B.sum(), (scores_BK, logp_BKT))
    assert not dscores_BK[2].any() and not dlogp_BKT[2].any()
    assert dscores_BK.isfinite().all() and dlogp_BKT.isfinite().all() and dscores_BK.any()


def test_half_precision_inputs_are_summed_in_single_precision():
    scores_BK, logp_BKT, mask_BKT = marginal_inputs(dtype=torch.bfloat16)
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT)
    exact_B, _ = marginal_nll(scores_BK.double(), logp_BKT.double(), mask_BKT)
    assert loss_B.dtype == posterior_BK.dtype == torch.float32
    torch.testing.assert_close(loss_B.double(), exact_B, rtol=1e-5, atol=1e-5)


def test_an_unknown_implementation_is_refused_by_name():
    with pytest.raises(ValueError, match="auto, torch.*'cuda'"):
        answer_logprob(*head_inputs(), impl="cuda")
    with pytest.raises(ValueError, match="'cuda'"):
        marginal_nll(*marginal_inputs(), impl="cuda")

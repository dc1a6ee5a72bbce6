"""Triton kernels (in the interpreter where there is no GPU) against the definition in fp64.

The rule for errors is in `exactness`: at most twice that of the plain torch operation.
"""

import subprocess
import sys

import pytest
import torch

from exactness import LAST, excess
from rag2_kernels import answer_logprob, greedy_logprob, marginal_nll, rag_loss, reference
from rag2_kernels.rows import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("seed")

HALF = [torch.bfloat16, torch.float16]
FLOATS = [torch.float64, torch.float32, *HALF]


def head(rows, vocabulary, hidden, dtype):
    """What a model of width H gives its head: logits of a few nats."""
    hidden_MH = torch.randn(rows, hidden, device=DEVICE, dtype=torch.float64)
    weight_VH = torch.randn(vocabulary, hidden, device=DEVICE, dtype=torch.float64)
    labels_M = torch.randint(vocabulary, (rows,), device=DEVICE)
    weight_VH *= 3 / hidden**0.5
    return hidden_MH.to(dtype), weight_VH.to(dtype), labels_M


def gradients(function, given, upstream):
    """function(*given) and its gradients at the floating-point tensors."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    out = function(*given)
    leaves = [x for x in given if x.requires_grad]
    return out.detach(), *torch.autograd.grad((out * upstream).sum(), leaves)


def doubled(given):
    return [x.double() if x.is_floating_point() else x for x in given]


def plain_logprob(hidden_MH, weight_VH, labels_M):
    """What a user writes."""
    logits_MV = (hidden_MH @ weight_VH.T).to(torch.promote_types(hidden_MH.dtype, torch.float32))
    return logits_MV.log_softmax(-1).gather(-1, labels_M[:, None])[:, 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, vocabulary, hidden", [(63, 127, 41), (1, 3, 7), (33, 64, 9)])
def test_answer_logprob_is_as_exact_as_plain_torch(dtype, rows, vocabulary, hidden):
    given = head(rows, vocabulary, hidden, dtype)
    upstream_M = torch.randn(rows, device=DEVICE)
    chunk = 20 if rows == 33 else None  # the logits are computed again, or kept
    truth = gradients(reference.answer_logprob, doubled(given), upstream_M)
    plain = gradients(plain_logprob, given, upstream_M)
    got = gradients(lambda *x: answer_logprob(*x, impl="triton", chunk=chunk), given, upstream_M)
    for a, b, true in zip(got, plain, truth, strict=True):
        assert a.dtype == b.dtype
        # Of few rows the luckier rounding decides.
        assert excess(a, b, true, LAST[b.dtype], times=2 if rows == 63 else 5) <= 1


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in FLOATS if d != torch.bfloat16),
    ],
)
def test_answer_logprob_on_the_odd_shape_that_others_test(dtype):
    given = head(252, 507, 123, dtype)
    upstream_M = torch.randn(252, device=DEVICE)
    truth = gradients(reference.answer_logprob, doubled(given), upstream_M)
    plain = gradients(plain_logprob, given, upstream_M)
    got = gradients(lambda *x: answer_logprob(*x, impl="triton"), given, upstream_M)
    for a, b, true in zip(got, plain, truth, strict=True):
        assert excess(a, b, true, LAST[b.dtype]) <= 1


@pytest.mark.parametrize("nats", [8, 20])
@pytest.mark.parametrize("dtype", HALF)
def test_the_gradient_of_large_logits_is_as_exact_as_plain_torch(dtype, nats):
    hidden_MH, weight_VH, labels_M = head(63, 127, 41, torch.float64)
    hidden_MH = hidden_MH * (nats / (hidden_MH @ weight_VH.T).std())
    labels_M[::2] = (hidden_MH @ weight_VH.T).argmax(-1)[::2]
    given = (hidden_MH.to(dtype), weight_VH.to(dtype), labels_M)
    upstream_M = torch.randn(63, device=DEVICE)
    truth = gradients(reference.answer_logprob, doubled(given), upstream_M)
    plain = gradients(plain_logprob, given, upstream_M)
    got = gradients(lambda *x: answer_logprob(*x, impl="triton"), given, upstream_M)
    for a, b, true in zip(got, plain, truth, strict=True):
        assert excess(a, b, true, LAST[b.dtype]) <= 1


def test_answer_logprob_twice_is_equal_to_the_bit_and_backward_may_run_twice():
    given = [x.requires_grad_(x.is_floating_point()) for x in head(40, 70, 33, torch.float32)]
    first, second = (answer_logprob(*given, impl="triton") for _ in range(2))
    assert torch.equal(first, second)
    once, again = (torch.autograd.grad(first.sum(), given[:2], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("room", [64, 1 << 24])
def test_a_label_is_greedy_where_no_other_token_is_more_likely(impl, room, monkeypatch):
    monkeypatch.setattr(Rows, "room", room)
    hidden_MH, weight_VH, labels_M = head(40, 30, 24, torch.float64)
    best_M = (hidden_MH @ weight_VH.T).argmax(-1)
    labels_M[::2] = best_M[::2]
    logp_M, greedy_M = greedy_logprob(hidden_MH, weight_VH, labels_M, impl=impl)
    wanted = reference.greedy_logprob(hidden_MH, weight_VH, labels_M)
    torch.testing.assert_close(logp_M, wanted[0], rtol=0, atol=1e-10)
    assert torch.equal(greedy_M, wanted[1]) and torch.equal(greedy_M, labels_M == best_M)
    assert greedy_M.any() and not greedy_M.all()


def test_large_logits_neither_overflow_nor_lose_the_answer():
    hidden_MH, weight_VH, labels_M = head(9, 40, 16, torch.float32)
    got = answer_logprob(300 * hidden_MH, weight_VH, labels_M, impl="triton")
    truth = reference.answer_logprob(300 * hidden_MH.double(), weight_VH.double(), labels_M)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-3)


def marginal_inputs(questions, chunks, tokens, dtype=torch.float64):
    scores_BK = (3 * torch.randn(questions, chunks, device=DEVICE, dtype=torch.float64)).to(dtype)
    logp_BKT = (-4 * torch.rand(questions, chunks, tokens, device=DEVICE)).to(dtype)
    lengths_B = torch.randint(1, tokens + 1, (questions,), device=DEVICE)
    mask_BT = torch.arange(tokens, device=DEVICE) < lengths_B[:, None]
    return scores_BK, logp_BKT, mask_BT[:, None].expand(-1, chunks, -1).clone()


def marginal_gradients(given, impl, level):
    """Loss, posterior and both gradients under a random weight of each question."""
    scores_BK, logp_BKT, mask_BKT = given
    scores_BK, logp_BKT = (x.detach().requires_grad_() for x in (scores_BK, logp_BKT))
    loss_B, posterior_BK = marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level, impl=impl)
    assert not posterior_BK.requires_grad
    weight_B = torch.linspace(-1, 2, len(loss_B), device=DEVICE)
    pulled = torch.autograd.grad((weight_B * loss_B).sum(), (scores_BK, logp_BKT))
    return loss_B.detach(), posterior_BK, *pulled


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("questions, chunks, tokens", [(3, 1, 1), (2, 5, 131)])
def test_the_marginal_is_the_definition_with_dead_chunks_and_poisoned_padding(
    level, dtype, questions, chunks, tokens
):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs(questions, chunks, tokens, dtype)
    scores_BK[0, 0] = -torch.inf  # with K = 1, a question without chunks
    logp_BKT[~mask_BKT] = torch.nan
    logp_BKT[0, 0] = torch.nan
    given = (scores_BK, logp_BKT, mask_BKT)
    truth = marginal_gradients(doubled(given), "torch", level)
    plain = marginal_gradients(given, "torch", level)
    got = marginal_gradients(given, "triton", level)
    for a, b, true in zip(got, plain, truth, strict=True):
        assert a.dtype == b.dtype
        # A sum of T log-probabilities of up to 4 nats is rounded at its own size.
        assert excess(a, b, true, max(LAST[b.dtype], 4 * tokens * LAST[torch.float32] / 8)) <= 1


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_marginal_passes_gradcheck_in_double(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs(1, 3, 2)
    assert torch.autograd.gradcheck(
        lambda s, logp: marginal_nll(s, logp, mask_BKT, level=level, impl="triton")[0],
        (scores_BK.requires_grad_(), logp_BKT.requires_grad_()),
        fast_mode=True,
    )


def test_answer_logprob_passes_gradcheck_in_double():
    hidden_MH, weight_VH, labels_M = head(3, 5, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: answer_logprob(h, w, labels_M, impl="triton"),
        (hidden_MH.requires_grad_(), weight_VH.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_shifts_permutations_and_duplicates_keep_the_marginal(level):
    scores_BK, logp_BKT, mask_BKT = marginal_inputs(3, 4, 5)
    loss_B, posterior_BK, dscores_BK, _ = marginal_gradients(
        (scores_BK, logp_BKT, mask_BKT), "triton", level
    )
    assert dscores_BK.sum(-1).abs().max() < 1e-12
    order_K = torch.randperm(4, device=DEVICE)
    permuted = (scores_BK[:, order_K] + 50, logp_BKT[:, order_K], mask_BKT)
    got = marginal_gradients(permuted, "triton", level)
    torch.testing.assert_close(got[0], loss_B)
    torch.testing.assert_close(got[2], dscores_BK[:, order_K])
    twice = [torch.cat([x, x], dim=1) for x in (scores_BK, logp_BKT, mask_BKT)]
    loss, posterior = marginal_nll(*twice, level=level, impl="triton")
    torch.testing.assert_close(loss, loss_B)
    torch.testing.assert_close(posterior[:, :4], posterior_BK / 2)


@pytest.mark.parametrize("room", [100, 10**6])
def test_the_fused_loss_is_the_torch_one(room, monkeypatch):
    hidden_MH, weight_VH, labels_M = head(48, 70, 24, torch.float32)
    pair_M = torch.arange(24, device=DEVICE).repeat_interleave(2)
    scores_BK = torch.randn(6, 4, device=DEVICE)
    given = (hidden_MH, weight_VH, labels_M, pair_M, scores_BK)
    wanted = gradients(lambda *x: rag_loss(*x, skip_below=0.05, impl="torch").loss, given, 1.0)
    from rag2_kernels.gpu import linear

    monkeypatch.setattr(linear.Rows, "room", room)
    monkeypatch.setattr(linear.Rows, "whole", room)
    got = gradients(lambda *x: rag_loss(*x, skip_below=0.05, impl="triton").loss, given, 1.0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_operations_are_whole_for_torch_compile():
    from rag2_kernels.gpu import marginal, pool

    given = marginal_inputs(2, 3, 4)
    for tensor in given[:2]:
        tensor.requires_grad_()
    hidden_BLH = torch.randn(2, 3, 4, device=DEVICE, requires_grad=True)
    mask_BL = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    for operation, inputs in (
        (marginal.marginal_nll, (*given, "token")),
        (pool.masked_mean_pool, (hidden_BLH, mask_BL, True)),
    ):
        checks = torch.library.opcheck(operation, inputs)
        assert len(checks) == 4 and set(checks.values()) == {"SUCCESS"}, checks


IMPORT = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, rag2_kernels
given = torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0])
assert rag2_kernels.answer_logprob(*given) < 0
try:
    rag2_kernels.answer_logprob(*given, impl="triton")
except RuntimeError as error:
    print(error)
"""


def test_the_package_works_without_triton_and_says_so_where_it_is_asked_for():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.stdout.strip() == (
        "impl='triton': triton is not installed; impl='torch' runs anywhere"
    ), done.stderr

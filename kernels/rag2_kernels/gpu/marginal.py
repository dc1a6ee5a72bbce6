"""K4: the marginal over a question's chunks, one program a question, forward and backward.

One launch each way; the definition takes about eight and ten. Letters as in `reference`.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag2_kernels.gpu.launch import accumulator, on_device
from rag2_kernels.reference import promoted

TOKENS = 64  # of an answer that a program holds at once


@triton.jit
def _prior(scores_ptr, b, k, K, ACC: tl.constexpr):
    """log p_K (-inf where masked) and whether any chunk of the question is alive."""
    s_K = tl.load(scores_ptr + b * K + k, mask=k < K, other=float("-inf")).to(ACC)
    most = tl.max(s_K, 0)
    alive = most > float("-inf")
    most = tl.where(alive, most, 0.0)
    total = tl.sum(tl.exp(s_K - most), 0)
    return s_K - most - tl.log(tl.where(alive, total, 1.0)), alive


@triton.jit
def _tokens(logp_ptr, mask_ptr, b, k, t, K, T, prior_K, ACC: tl.constexpr):
    """Where the answers' log-probabilities lie, whether they count, and they [BK, BT], else 0."""
    at_KT = (b * K + k[:, None]) * T + t[None, :]
    inside_KT = (k < K)[:, None] & (t < T)[None, :]
    used_KT = tl.load(mask_ptr + at_KT, mask=inside_KT, other=0) != 0
    used_KT = used_KT & (prior_K > float("-inf"))[:, None]
    logp_KT = tl.load(logp_ptr + at_KT, mask=used_KT, other=0.0).to(ACC)
    return at_KT, inside_KT, used_KT, logp_KT


@triton.jit
def _token_posterior(prior_K, logp_KT, used_KT):
    """r_KT and LSE_T of the columns that hold a token; zeros in the others."""
    used_T = tl.max(used_KT.to(tl.int32), 0) > 0
    joint_KT = prior_K[:, None] + logp_KT
    most_T = tl.max(joint_KT, 0)
    most_T = tl.where(used_T, most_T, 0.0)
    exp_KT = tl.exp(joint_KT - most_T[None, :])
    total_T = tl.where(used_T, tl.sum(exp_KT, 0), 1.0)
    posterior_KT = tl.where(used_T[None, :], exp_KT / total_T[None, :], 0.0)
    return posterior_KT, tl.where(used_T, most_T + tl.log(total_T), 0.0), used_T


@triton.jit
def _forward(
    scores_ptr, logp_ptr, mask_ptr, loss_ptr, posterior_ptr, K, T,
    TILES: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    prior_K, alive = _prior(scores_ptr, b, k, K, ACC)
    sum_K = tl.zeros([BK], ACC)  # of the answer's log p, or of the tokens' posteriors
    loss = tl.zeros([1], ACC)
    tokens = tl.zeros([1], ACC)
    for tile in range(TILES):
        t = tile * BT + tl.arange(0, BT)
        _, _, used_KT, logp_KT = _tokens(logp_ptr, mask_ptr, b, k, t, K, T, prior_K, ACC)
        if TOKEN:
            posterior_KT, lse_T, used_T = _token_posterior(prior_K, logp_KT, used_KT)
            sum_K += tl.sum(posterior_KT, 1)
            loss -= tl.sum(lse_T, 0)
            tokens += tl.sum(used_T.to(ACC), 0)
        else:
            sum_K += tl.sum(logp_KT, 1)
    if TOKEN:
        posterior_K = sum_K / tl.maximum(tokens, 1.0)
    else:
        joint_K = prior_K + sum_K
        most = tl.where(alive, tl.max(joint_K, 0), 0.0)
        exp_K = tl.exp(joint_K - most)
        total = tl.where(alive, tl.sum(exp_K, 0), 1.0)
        posterior_K = exp_K / total
        loss -= tl.where(alive, most + tl.log(total), 0.0)
    one = tl.arange(0, 1)
    tl.store(loss_ptr + b + one, loss)
    tl.store(posterior_ptr + b * K + k, posterior_K, mask=k < K)


@triton.jit
def _backward(
    scores_ptr, logp_ptr, mask_ptr, posterior_ptr, grad_ptr, dscores_ptr, dlogp_ptr, K, T,
    TILES: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    prior_K, alive = _prior(scores_ptr, b, k, K, ACC)
    posterior_K = tl.load(posterior_ptr + b * K + k, mask=k < K, other=0.0).to(ACC)
    grad = tl.load(grad_ptr + b).to(ACC)
    tokens = tl.zeros([1], ACC)
    for tile in range(TILES):
        t = tile * BT + tl.arange(0, BT)
        at_KT, inside_KT, used_KT, logp_KT = _tokens(
            logp_ptr, mask_ptr, b, k, t, K, T, prior_K, ACC
        )
        if TOKEN:
            weight_KT, _, used_T = _token_posterior(prior_K, logp_KT, used_KT)
            tokens += tl.sum(used_T.to(ACC), 0)
        else:
            weight_KT = posterior_K[:, None]
        dlogp_KT = tl.where(used_KT, -grad * weight_KT, 0.0)
        tl.store(dlogp_ptr + at_KT, dlogp_KT, mask=inside_KT)
    if not TOKEN:
        tokens += 1.0
    dscores_K = tl.where(alive, grad * tokens * (tl.exp(prior_K) - posterior_K), 0.0)
    tl.store(dscores_ptr + b * K + k, dscores_K, mask=k < K)


@torch.library.custom_op("rag2::marginal_nll", mutates_args=())
def marginal_nll(
    scores_BK: Tensor, logp_BKT: Tensor, mask_BKT: Tensor, level: str
) -> tuple[Tensor, Tensor]:
    """As `reference.marginal_nll`."""
    loss_B, posterior_BK = _empty(scores_BK, logp_BKT, mask_BKT, level)
    given = [x.contiguous() for x in (scores_BK, logp_BKT, mask_BKT)]
    with on_device(scores_BK):
        _forward[(len(scores_BK),)](
            *given, loss_B, posterior_BK, *logp_BKT.shape[1:], **_tiles(logp_BKT, loss_B, level)
        )
    return loss_B, posterior_BK


@marginal_nll.register_fake
def _empty(
    scores_BK: Tensor, logp_BKT: Tensor, mask_BKT: Tensor, level: str
) -> tuple[Tensor, Tensor]:
    wide = promoted(scores_BK, logp_BKT)
    return scores_BK.new_empty(len(scores_BK), dtype=wide), torch.empty_like(
        scores_BK, dtype=wide, memory_format=torch.contiguous_format
    )


@torch.library.custom_op("rag2::marginal_nll_backward", mutates_args=())
def _gradients(
    scores_BK: Tensor,
    logp_BKT: Tensor,
    mask_BKT: Tensor,
    posterior_BK: Tensor,
    grad_B: Tensor,
    level: str,
) -> tuple[Tensor, Tensor]:
    dscores_BK, dlogp_BKT = _empty_gradients(
        scores_BK, logp_BKT, mask_BKT, posterior_BK, grad_B, level
    )
    given = [x.contiguous() for x in (scores_BK, logp_BKT, mask_BKT, posterior_BK, grad_B)]
    with on_device(scores_BK):
        _backward[(len(scores_BK),)](
            *given,
            *(dscores_BK, dlogp_BKT, *logp_BKT.shape[1:]),
            **_tiles(logp_BKT, posterior_BK, level),
        )
    return dscores_BK, dlogp_BKT


@_gradients.register_fake
def _empty_gradients(
    scores_BK: Tensor,
    logp_BKT: Tensor,
    mask_BKT: Tensor,
    posterior_BK: Tensor,
    grad_B: Tensor,
    level: str,
) -> tuple[Tensor, Tensor]:
    flat = torch.contiguous_format
    return torch.empty_like(scores_BK, memory_format=flat), torch.empty_like(
        logp_BKT, memory_format=flat
    )


def _remember(ctx, inputs, output) -> None:
    scores_BK, logp_BKT, mask_BKT, ctx.level = inputs
    ctx.save_for_backward(scores_BK, logp_BKT, mask_BKT, output[1])
    ctx.mark_non_differentiable(output[1])


def _pull(ctx, grad_B: Tensor, _):
    return *_gradients(*ctx.saved_tensors, grad_B, ctx.level), None, None


marginal_nll.register_autograd(_pull, setup_context=_remember)


def _tiles(logp_BKT: Tensor, wide: Tensor, level: str) -> dict:
    chunks, tokens = logp_BKT.shape[1:]
    block = min(TOKENS, triton.next_power_of_2(max(1, tokens)))
    return {
        "TILES": triton.cdiv(tokens, block),
        "BK": triton.next_power_of_2(chunks),
        "BT": block,
        "TOKEN": level == "token",
        "ACC": accumulator(wide.dtype),
    }

"""K5: mean over a mask, then the L2 norm: one read of the states forward, one write backward."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag2_kernels.gpu.launch import accumulator, on_device
from rag2_kernels.reference import promoted

HELD = 8192  # states that a program holds at once: 64 registers of each of 128 threads


@triton.jit
def _forward(
    hidden_ptr, mask_ptr, out_ptr, norm_ptr, L,
    TILES: tl.constexpr, H: tl.constexpr, BL: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    sum_LH = tl.zeros([BL, BH], ACC)
    count_L = tl.zeros([BL], ACC)
    for tile in range(TILES):
        pos = tile * BL + tl.arange(0, BL)
        used_L = tl.load(mask_ptr + b * L + pos, mask=pos < L, other=0) != 0
        at_LH = (b * L + pos[:, None]) * H + h[None, :]
        mask_LH = used_L[:, None] & (h < H)[None, :]
        sum_LH += tl.load(hidden_ptr + at_LH, mask=mask_LH, other=0.0).to(ACC)
        count_L += used_L.to(ACC)
    count = tl.sum(count_L, 0) + tl.zeros([1], ACC)
    mean_H = tl.sum(sum_LH, 0) / tl.maximum(count, 1.0)
    norm = tl.sqrt(tl.sum(mean_H * mean_H, 0)) + tl.zeros([1], ACC)
    if NORMALIZE:
        mean_H = mean_H / tl.maximum(norm, 1e-12)
    tl.store(out_ptr + b * H + h, mean_H, mask=h < H)
    one = tl.arange(0, 1)
    tl.store(norm_ptr + 2 * b + one, norm)
    tl.store(norm_ptr + 2 * b + 1 + one, count)


@triton.jit
def _backward(
    mask_ptr, out_ptr, norm_ptr, grad_ptr, dhidden_ptr, L,
    H: tl.constexpr, BL: tl.constexpr, BH: tl.constexpr,
    NORMALIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BH)
    grad_H = tl.load(grad_ptr + b * H + h, mask=h < H, other=0.0).to(ACC)
    if NORMALIZE:
        out_H = tl.load(out_ptr + b * H + h, mask=h < H, other=0.0).to(ACC)
        norm = tl.load(norm_ptr + 2 * b).to(ACC)
        along = tl.where(norm > 1e-12, tl.sum(grad_H * out_H, 0), 0.0)
        grad_H = (grad_H - along * out_H) / tl.maximum(norm, 1e-12)
    grad_H = grad_H / tl.maximum(tl.load(norm_ptr + 2 * b + 1).to(ACC), 1.0)
    pos = tl.program_id(1) * BL + tl.arange(0, BL)
    used_L = tl.load(mask_ptr + b * L + pos, mask=pos < L, other=0) != 0
    dhidden_LH = tl.where(used_L[:, None], grad_H[None, :], 0.0)
    at_LH = (b * L + pos[:, None]) * H + h[None, :]
    tl.store(dhidden_ptr + at_LH, dhidden_LH, mask=(pos < L)[:, None] & (h < H)[None, :])


@torch.library.custom_op("rag2::masked_mean_pool", mutates_args=())
def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """As `reference.masked_mean_pool`, and [B, 2]: the norm before it and the tokens of a text."""
    out_BH, norm_B2 = _empty(hidden_BLH, mask_BL, normalize)
    texts, tokens, width = hidden_BLH.shape
    shape = constants(width, normalize, out_BH.dtype)
    with on_device(hidden_BLH):
        _forward[(texts,)](
            *(hidden_BLH.contiguous(), mask_BL.contiguous(), out_BH, norm_B2, tokens),
            TILES=triton.cdiv(tokens, shape["BL"]),
            **shape,
        )
    return out_BH, norm_B2


@masked_mean_pool.register_fake
def _empty(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    texts, _, width = hidden_BLH.shape
    wide = promoted(hidden_BLH)
    return (
        hidden_BLH.new_empty(texts, width, dtype=wide),
        hidden_BLH.new_empty(texts, 2, dtype=wide),
    )


@torch.library.custom_op("rag2::masked_mean_pool_backward", mutates_args=())
def _gradient(
    hidden_BLH: Tensor,
    mask_BL: Tensor,
    out_BH: Tensor,
    norm_B2: Tensor,
    grad_BH: Tensor,
    normalize: bool,
) -> Tensor:
    dhidden_BLH = _empty_gradient(hidden_BLH, mask_BL, out_BH, norm_B2, grad_BH, normalize)
    texts, tokens, width = hidden_BLH.shape
    shape = constants(width, normalize, out_BH.dtype)
    with on_device(hidden_BLH):
        _backward[(texts, triton.cdiv(tokens, shape["BL"]))](
            *(mask_BL.contiguous(), out_BH, norm_B2, grad_BH.contiguous(), dhidden_BLH, tokens),
            **shape,
        )
    return dhidden_BLH


@_gradient.register_fake
def _empty_gradient(
    hidden_BLH: Tensor,
    mask_BL: Tensor,
    out_BH: Tensor,
    norm_B2: Tensor,
    grad_BH: Tensor,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(hidden_BLH, memory_format=torch.contiguous_format)


def _remember(ctx, inputs, output) -> None:
    hidden_BLH, mask_BL, ctx.normalize = inputs
    ctx.save_for_backward(hidden_BLH, mask_BL, *output)
    ctx.mark_non_differentiable(output[1])


def _pull(ctx, grad_BH: Tensor, _):
    return _gradient(*ctx.saved_tensors, grad_BH, ctx.normalize), None, None


masked_mean_pool.register_autograd(_pull, setup_context=_remember)


def constants(width: int, normalize: bool, wide: torch.dtype) -> dict:
    """The compile-time arguments of both kernels, but for the number of tiles."""
    padded = triton.next_power_of_2(width)
    return {
        "H": width,
        "BL": min(16, max(1, HELD // padded)),
        "BH": padded,
        "NORMALIZE": normalize,
        "ACC": accumulator(wide),
    }

"""K1: rows of logits z = h W^T -> the log-sum-exp and the label's logit, tile by tile.

The label's logit and the exponentials come from the same fp32 accumulator. A program computes
`SPAN` tiles of [BM, BN] one after the other and writes one maximum and one sum a row, which a few
torch operations on [splits, M] put together in a fixed order: two runs agree to the bit. With
`STORE`, the logits are written too (rounded to the inputs' dtype), for a backward pass that needs
no second product. M rows, V vocabulary, H hidden.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag2_kernels import rows
from rag2_kernels.gpu.launch import (
    Tiles,
    accumulator,
    arithmetic,
    descriptors,
    on_device,
    rounds,
    tiles,
)
from rag2_kernels.gpu.tile import narrowed, place
from rag2_kernels.gpu.tile import product as tile_product
from rag2_kernels.reference import promoted
from rag2_kernels.rows import add_product, product, within


@triton.jit
def linear_lse(
    x_desc, w_desc, x_ptr, w_ptr, labels_ptr, most_ptr, total_ptr, label_ptr, out_ptr, M,
    V: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    SPAN: tl.constexpr, GROUP: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr,
    UP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial maxima, sums of exponentials and label logits, [splits, M]; perhaps the logits."""
    splits: tl.constexpr = ((V + BN - 1) // BN + SPAN - 1) // SPAN
    row, split = place(tl.program_id(0), (M + BM - 1) // BM, splits, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    label_M = tl.load(labels_ptr + m, mask=m < M, other=-1)
    most_M = tl.full([BM], float("-inf"), ACC)
    total_M = tl.zeros([BM], ACC)
    own_M = tl.zeros([BM], ACC)
    for tile in range(SPAN):
        n0 = (split * SPAN + tile) * BN
        acc = tile_product(
            x_desc, w_desc, x_ptr, w_ptr, row * BM, n0, M, V,
            H, BM, BN, BH, TMA, UP, ACC, PRECISION,
        )  # fmt: skip
        if STORE:
            at = m.to(tl.int64)[:, None] * V + (n0 + n)[None, :]
            inside_MN = (m < M)[:, None] & (n0 + n < V)[None, :]
            narrow = narrowed(acc, out_ptr.dtype.element_ty, UP)
            tl.store(out_ptr + at, narrow, mask=inside_MN)
        own_M += tl.sum(tl.where((n0 + n)[None, :] == label_M[:, None], acc, 0.0), 1)
        acc = tl.where((n0 + n < V)[None, :], acc, float("-inf"))
        # A split's first tile has a column, so the maximum is finite from there on.
        higher_M = tl.maximum(most_M, tl.max(acc, 1))
        total_M = total_M * tl.exp(most_M - higher_M) + tl.sum(tl.exp(acc - higher_M[:, None]), 1)
        most_M = higher_M
    at_M = split.to(tl.int64) * M + m
    tl.store(most_ptr + at_M, most_M, mask=m < M)
    tl.store(total_ptr + at_M, total_M, mask=m < M)
    tl.store(label_ptr + at_M, own_M, mask=m < M)


@triton.jit
def logits_gradient(
    logits_ptr, logp_ptr, labels_ptr, grad_ptr,
    V: tl.constexpr, BV: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In place: z -> g (onehot(label) - softmax(z)), a row a program.

    z has been rounded, and is normalised as it is now: by the log-sum-exp of before, large logits
    would give no softmax. The label's entry is 1 - p from its log-probability, since where p is
    near 1 the rounding of z is more than that.
    """
    m = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BV)
    most_V = tl.full([BV], -1e38, ACC)  # not -inf: a lane beyond V would give NaN
    total_V = tl.zeros([BV], ACC)
    for tile in range((V + BV - 1) // BV):
        v = tile * BV + n
        z_V = tl.load(logits_ptr + m * V + v, mask=v < V, other=float("-inf")).to(ACC)
        higher_V = tl.maximum(most_V, z_V)
        total_V = total_V * tl.exp(most_V - higher_V) + tl.exp(z_V - higher_V)
        most_V = higher_V
    most = tl.max(most_V, 0)
    total = tl.sum(total_V * tl.exp(most_V - most), 0)
    grad = tl.load(grad_ptr + m).to(ACC)
    logp = tl.load(logp_ptr + m).to(ACC)
    # 1 - exp(logp), by its series where that would cancel.
    series = 1 / 6 + logp * (1 / 24 + logp * (1 / 120 + logp / 720))
    series = -logp * (1.0 + logp * (0.5 + logp * series))
    own = tl.where(logp > -0.01, series, 1.0 - tl.exp(logp))
    label = tl.load(labels_ptr + m)
    for tile in range((V + BV - 1) // BV):
        v = tile * BV + n
        z_V = tl.load(logits_ptr + m * V + v, mask=v < V, other=0.0).to(ACC)
        dz_V = grad * tl.where(v == label, own, -tl.exp(z_V - most) / total)
        narrow = narrowed(dz_V, logits_ptr.dtype.element_ty, UP)
        tl.store(logits_ptr + m * V + v, narrow, mask=v < V)


def label_logprob(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, out_MV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp_M, lse_M, greedy_M), sums in fp32; the logits go to `out_MV`, if given."""
    count, vocabulary = len(labels_M), len(weight_VH)
    wide = promoted(hidden_MH, weight_VH)
    if hidden_MH.dtype != weight_VH.dtype:
        hidden_MH, weight_VH = hidden_MH.to(wide), weight_VH.to(wide)
    hidden_MH, weight_VH = hidden_MH.contiguous(), weight_VH.contiguous()
    shape = tiles("linear_lse", hidden_MH, count, weight_VH.shape)
    splits = triton.cdiv(triton.cdiv(vocabulary, shape.BN), shape.SPAN)
    most_SM, total_SM, label_SM = hidden_MH.new_empty(3, splits, count, dtype=wide)
    if count:
        with on_device(hidden_MH):
            linear_lse[(triton.cdiv(count, shape.BM) * splits,)](
                *descriptors(shape, hidden_MH, weight_VH),
                *(hidden_MH, weight_VH, labels_M, most_SM, total_SM, label_SM),
                *(out_MV if out_MV is not None else most_SM, count),
                **constants(shape, weight_VH, store=out_MV is not None),
                num_warps=shape.warps,
                num_stages=shape.stages,
            )
    most_M = most_SM.amax(0)
    lse_M = most_M + (total_SM * (most_SM - most_M).exp()).sum(0).log()
    own_M = label_SM.sum(0)  # the one split that holds the label, and zeros
    return own_M - lse_M, lse_M, own_M >= most_M


def columns(vocabulary: int, wide: torch.dtype) -> int:
    """Logits of a row that a program of `logits_gradient` holds at once."""
    return min(1024 if wide == torch.float64 else 4096, 1 << (vocabulary - 1).bit_length())


def constants(shape: Tiles, weight_VH: Tensor, store: bool) -> dict:
    """The compile-time arguments of `linear_lse`."""
    return {
        "V": weight_VH.shape[0],
        "H": weight_VH.shape[1],
        **{name: getattr(shape, name) for name in ("BM", "BN", "BH", "SPAN", "GROUP", "TMA")},
        "STORE": store,
        **arithmetic(weight_VH.dtype),
    }


class Rows(rows.Rows):
    """Held are the logits, in the inputs' dtype, and their log-sum-exp."""

    room = 1 << 27  # logits held at once: 256 MiB in bf16
    whole = 1 << 28
    spends = True

    @classmethod
    def logp(cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> Tensor:
        """Their log-probabilities alone: no logits are stored."""
        return label_logprob(hidden_CH, weight_VH, labels_C)[0]

    @classmethod
    def greedy(
        cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Their log-probabilities, and whether no token has a larger logit (equal ones count)."""
        logp_C, _, greedy_C = label_logprob(hidden_CH, weight_VH, labels_C)
        return logp_C, greedy_C

    @classmethod
    def held_dtype(cls, weight_VH: Tensor) -> torch.dtype:
        """That of the weight."""
        return weight_VH.dtype

    @classmethod
    def of(
        cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, space: Tensor | None = None
    ) -> Self:
        """Their logits and log-probabilities."""
        narrow = torch.promote_types(hidden_CH.dtype, weight_VH.dtype)
        shape = (len(labels_C), len(weight_VH))
        logits_CV = within(space, shape, narrow)
        if logits_CV is None:
            logits_CV = hidden_CH.new_empty(shape, dtype=narrow)
        logp_C, lse_C, _ = label_logprob(hidden_CH, weight_VH, labels_C, logits_CV)
        return cls(hidden_CH, weight_VH, labels_C, logits_CV, lse_C, logp_C)

    def backward(
        self, grad_C: Tensor, dhidden_CH: Tensor | None, dweight_VH: Tensor | None
    ) -> None:
        """Write the gradient of the rows and add that of the weight; the logits are used up."""
        dlogits_CV, vocabulary = self.held_CV, self.held_CV.shape[1]
        block = columns(vocabulary, self.norm_C.dtype)
        if len(grad_C):
            with on_device(dlogits_CV):
                logits_gradient[(len(grad_C),)](
                    *(dlogits_CV, self.logp_C, self.labels_C, grad_C.contiguous()),
                    **{"V": vocabulary, "BV": block, "UP": rounds(dlogits_CV.dtype)},
                    ACC=accumulator(self.norm_C.dtype),
                )
        if dhidden_CH is not None:
            dhidden_CH.copy_(product(dlogits_CV, self.weight_VH))
        if dweight_VH is not None:
            add_product(dweight_VH, dlogits_CV.T, self.hidden_CH)

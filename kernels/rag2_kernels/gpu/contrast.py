"""K3: the contrastive loss from tiles of scores s = scale q c^T, which only backward writes.

Forward leaves the log-sum-exp of each tile's rows and columns, which one torch operation puts
together in a fixed order: two runs agree to the bit. Backward computes the tiles of some questions
again and writes their gradient, rounded to the inputs' dtype, for two products to read. B
questions, N chunks, D embedding, G groups a question.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag2_kernels import contrast
from rag2_kernels.gpu.launch import Tiles, arithmetic, descriptors, on_device, tiles
from rag2_kernels.gpu.tile import narrowed, place
from rag2_kernels.gpu.tile import product as tile_product
from rag2_kernels.reference import promoted


@triton.jit
def _scores(
    q_desc, c_desc, q_ptr, c_ptr, scale_ptr, positive_M, question_ptr, chunk_ptr, m0, n0, B, N,
    D: tl.constexpr, G: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of scores, -inf where a chunk does not count, and where it is not the positive."""
    m = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    other = positive_M[:, None] != n[None, :]
    acc = tile_product(
        q_desc, c_desc, q_ptr, c_ptr, m0, n0, B, N, D, BM, BN, BH, TMA, UP, ACC, PRECISION
    )
    acc = acc * tl.load(scale_ptr)
    acc = tl.where((n < N)[None, :], acc, float("-inf"))
    if G > 0:
        group_N = tl.load(chunk_ptr + n, mask=n < N, other=-2)
        for g in range(G):
            own_M = tl.load(question_ptr + m.to(tl.int64) * G + g, mask=m < B, other=-1)
            acc = tl.where((own_M[:, None] == group_N[None, :]) & other, float("-inf"), acc)
    return acc, other


@triton.jit
def _lse(x, axis: tl.constexpr):
    """The log-sum-exp along an axis, -inf where there is nothing else."""
    most = tl.max(x, axis)
    safe = tl.where(most > float("-inf"), most, 0.0)
    total = tl.sum(tl.exp(x - tl.expand_dims(safe, axis)), axis)
    empty = total == 0
    return tl.where(empty, float("-inf"), safe + tl.log(tl.where(empty, 1.0, total)))


@triton.jit
def contrast_sums(
    q_desc, c_desc, q_ptr, c_ptr, scale_ptr, positive_ptr, question_ptr, chunk_ptr,
    own_ptr, row_ptr, column_ptr, B, N,
    D: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """own [B]; log-sum-exps of the tiles' rows [columns, B] and columns [rows, N], positives out.

    The positive's score is written by the one tile that holds it.
    """
    columns = (N + BN - 1) // BN
    row, column = place(tl.program_id(0), (B + BM - 1) // BM, columns, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    positive_M = tl.load(positive_ptr + m, mask=m < B, other=-1).to(tl.int32)
    acc, other = _scores(
        q_desc, c_desc, q_ptr, c_ptr, scale_ptr, positive_M, question_ptr, chunk_ptr,
        row * BM, column * BN, B, N, D, G, BM, BN, BH, TMA, UP, ACC, PRECISION,
    )  # fmt: skip
    here_M = (positive_M >= column * BN) & (positive_M < (column + 1) * BN)
    own_M = tl.sum(tl.where(other, 0.0, acc), 1)
    tl.store(own_ptr + m, own_M, mask=(m < B) & here_M)
    tl.store(row_ptr + column.to(tl.int64) * B + m, _lse(acc, 1), mask=m < B)
    if SYMMETRIC:
        acc = tl.where(other & (m < B)[:, None], acc, float("-inf"))
        tl.store(column_ptr + row.to(tl.int64) * N + n, _lse(acc, 0), mask=n < N)


@triton.jit
def contrast_gradient(
    q_desc, c_desc, q_ptr, c_ptr, scale_ptr, positive_ptr, question_ptr, chunk_ptr,
    row_ptr, pull_ptr, spread_ptr, out_ptr, B, N,
    D: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BH: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ds [B, N] from the scores, computed again; the positives' entries are given."""
    row, column = place(tl.program_id(0), (B + BM - 1) // BM, (N + BN - 1) // BN, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    positive_M = tl.load(positive_ptr + m, mask=m < B, other=-1).to(tl.int32)
    acc, other = _scores(
        q_desc, c_desc, q_ptr, c_ptr, scale_ptr, positive_M, question_ptr, chunk_ptr,
        row * BM, column * BN, B, N, D, G, BM, BN, BH, TMA, UP, ACC, PRECISION,
    )  # fmt: skip
    row_M = tl.load(row_ptr + m, mask=m < B, other=0.0)
    pull_M = tl.load(pull_ptr + m, mask=m < B, other=0.0)
    ds = tl.exp(acc - row_M[:, None])
    if SYMMETRIC:
        spread_N = tl.load(spread_ptr + n, mask=n < N, other=0.0)
        # Of a positive, or beyond the last question, this is no log-probability and may overflow.
        rival = other & (m < B)[:, None]
        ds += tl.exp(tl.where(rival, acc + spread_N[None, :], float("-inf")))
    ds = tl.where(other, ds, pull_M[:, None])
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    narrow = narrowed(ds, out_ptr.dtype.element_ty, UP)
    tl.store(out_ptr + at, narrow, mask=(m < B)[:, None] & (n < N)[None, :])


class Scores(contrast.Scores):
    """As the torch one, but only the gradient is ever held."""

    room = 1 << 26  # of the gradient, 128 MiB in bf16

    def sums(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """own_B, row_B and, if symmetric, others_N."""
        queries, count, wide = len(self.queries_BD), len(self.chunks_ND), promoted(self.queries_BD)
        shape = tiles("contrast", self.queries_BD, queries, self.chunks_ND.shape)
        # NaN where no tile holds the positive: an id beyond the chunks must not go unseen.
        own_B = self.queries_BD.new_full((queries,), torch.nan, dtype=wide)
        row_SB = own_B.new_empty(triton.cdiv(count, shape.BN), queries)
        column_SN = own_B.new_empty(triton.cdiv(queries, shape.BM) if self.symmetric else 0, count)
        self._launch(contrast_sums, shape, slice(None), own_B, row_SB, column_SN)
        others_N = column_SN.logsumexp(0) if self.symmetric else None
        return own_B, row_SB.logsumexp(0), others_N

    def gradient(
        self, some: slice, row_B: Tensor, pull_B: Tensor, spread_N: Tensor | None
    ) -> Tensor:
        """ds_bN of some questions in the inputs' dtype."""
        queries_bD = self.queries_BD[some]
        ds_bN = queries_bD.new_empty(len(queries_bD), len(self.chunks_ND))
        shape = tiles("contrast", queries_bD, len(queries_bD), self.chunks_ND.shape)
        spread_N = row_B if spread_N is None else spread_N  # of no use where not symmetric
        self._launch(contrast_gradient, shape, some, row_B[some], pull_B[some], spread_N, ds_bN)
        return ds_bN

    def _launch(self, kernel, shape: Tiles, some: slice, *more: Tensor) -> None:
        queries_bD, count = self.queries_BD[some], len(self.chunks_ND)
        rows, columns = triton.cdiv(len(queries_bD), shape.BM), triton.cdiv(count, shape.BN)
        with on_device(queries_bD):
            kernel[(rows * columns,)](
                *descriptors(shape, queries_bD, self.chunks_ND),
                *(queries_bD, self.chunks_ND, self.scale, self.positive_B[some]),
                *(self.question_BG[some], self.chunk_N, *more, len(queries_bD), count),
                **constants(shape, self.chunks_ND, self.question_BG.shape[1], self.symmetric),
                num_warps=shape.warps,
                num_stages=shape.stages,
            )


def constants(shape: Tiles, chunks_ND: Tensor, groups: int, symmetric: bool) -> dict:
    """The compile-time arguments of both kernels."""
    return {
        "D": chunks_ND.shape[1],
        "G": groups,
        "SYMMETRIC": symmetric,
        **{name: getattr(shape, name) for name in ("BM", "BN", "BH", "GROUP", "TMA")},
        **arithmetic(chunks_ND.dtype),
    }

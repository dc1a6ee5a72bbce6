"""K2: exact top-k of inner products without the [B, N] scores, by the maxima of groups of rows.

A tile of scores [BM, BN] leaves only the maxima of its `GROUPS` groups of BN / GROUPS corpus rows
(rows g, g + GROUPS, ... of the tile). The k groups with the largest maxima hold the k best rows:
were a best row in another group, k groups would each hold a row at least as good. Their rows are
scored again in fp32 and sorted. Where maxima tie at the boundary that leaves a choice, and those
queries are searched in full, so that equal scores stay in the order of their rows.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from rag2_kernels.gpu.launch import Tiles, arithmetic, descriptors, on_device, tiles
from rag2_kernels.gpu.tile import place
from rag2_kernels.gpu.tile import product as tile_product
from rag2_kernels.reference import promoted
from rag2_kernels.topk import best_rows

GROUPS = 8  # of a tile's columns
GATHERED = 1 << 27  # numbers of the corpus's rows that are scored again at once


@triton.jit
def group_maxima(
    q_desc, c_desc, q_ptr, c_ptr, out_ptr, B, N,
    D: tl.constexpr, GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, UP: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The maxima [B, tiles * GROUPS] of each tile's groups; -inf where a group has no row."""
    columns = (N + BN - 1) // BN
    row, tile = place(tl.program_id(0), (B + BM - 1) // BM, columns, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = tile * BN + tl.arange(0, BN)
    acc = tile_product(
        q_desc, c_desc, q_ptr, c_ptr, row * BM, tile * BN, B, N,
        D, BM, BN, BH, TMA, UP, ACC, PRECISION,
    )  # fmt: skip
    acc = tl.where((n < N)[None, :], acc, float("-inf"))
    most = tl.max(tl.reshape(acc, [BM, BN // GROUPS, GROUPS]), 1)
    at = m.to(tl.int64)[:, None] * (columns * GROUPS) + (tile * GROUPS + tl.arange(0, GROUPS))
    tl.store(out_ptr + at, most, mask=(m < B)[:, None])


@torch.no_grad()
def search(queries_BD: Tensor, corpus_ND: Tensor, k: int) -> Tensor:
    """rows_BK of the k best."""
    if queries_BD.dtype != corpus_ND.dtype:  # rounded queries would choose other rows
        both = torch.promote_types(queries_BD.dtype, corpus_ND.dtype)
        queries_BD, corpus_ND = queries_BD.to(both), corpus_ND.to(both)
    queries_BD, corpus_ND = queries_BD.contiguous(), corpus_ND.contiguous()
    queries, rows = len(queries_BD), len(corpus_ND)
    shape = tiles("group_maxima", queries_BD, queries, corpus_ND.shape)
    columns = triton.cdiv(rows, shape.BN)
    if k >= columns * GROUPS or not queries:
        return best_rows(queries_BD, corpus_ND, k)
    maxima_BG = queries_BD.new_empty(queries, columns * GROUPS, dtype=promoted(queries_BD))
    with on_device(queries_BD):
        group_maxima[(triton.cdiv(queries, shape.BM) * columns,)](
            *descriptors(shape, queries_BD, corpus_ND),
            *(queries_BD, corpus_ND, maxima_BG, queries, rows),
            **constants(shape, corpus_ND),
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    best_BK, group_BK = maxima_BG.topk(k, dim=1)
    tied_B = (maxima_BG >= best_BK[:, -1:]).sum(1) > k
    rows_BK = torch.empty_like(group_BK)
    step = max(1, GATHERED // (k * shape.BN // GROUPS * corpus_ND.shape[1]))
    for start in range(0, queries, step):
        some = slice(start, start + step)
        rows_BK[some] = _scored_again(queries_BD[some], corpus_ND, group_BK[some], k, shape.BN)
    if bool(tied_B.any()):
        rows_BK[tied_B] = best_rows(queries_BD[tied_B], corpus_ND, k)
    return rows_BK


def constants(shape: Tiles, corpus_ND: Tensor) -> dict:
    """The compile-time arguments of `group_maxima`."""
    return {
        "D": corpus_ND.shape[1],
        "GROUPS": GROUPS,
        **{name: getattr(shape, name) for name in ("BM", "BN", "BH", "GROUP", "TMA")},
        **arithmetic(corpus_ND.dtype),
    }


def _scored_again(
    queries_bD: Tensor, corpus_ND: Tensor, group_bK: Tensor, k: int, columns: int
) -> Tensor:
    """The k best rows of each query among those of its groups, equal ones in order."""
    member = torch.arange(columns // GROUPS, device=group_bK.device) * GROUPS
    first_bK = group_bK // GROUPS * columns + group_bK % GROUPS
    rows_bM = (first_bK[..., None] + member).flatten(1).sort(dim=1).values
    inside_bM = rows_bM < len(corpus_ND)
    vectors_bMD = corpus_ND[rows_bM.clamp_max(len(corpus_ND) - 1)]
    wide = promoted(corpus_ND)
    scores_bM = torch.bmm(vectors_bMD.to(wide), queries_bD.to(wide)[..., None])[..., 0]
    scores_bM = scores_bM.masked_fill(~inside_bM, -torch.inf)
    order_bM = scores_bM.sort(dim=1, descending=True, stable=True).indices
    return rows_bM.gather(1, order_bM[:, :k])

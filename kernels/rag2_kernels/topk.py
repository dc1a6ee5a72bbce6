"""Exact maximum inner product search in torch: blocks of the corpus and a running best list.

B queries, N corpus rows, D embedding. Equal scores are in the order of their rows.
"""

import torch
from torch import Tensor

from rag2_kernels.reference import promoted
from rag2_kernels.rows import product

SCORES = 1 << 24  # scores, or numbers of chosen rows, held at once: 64 MiB in fp32


@torch.no_grad()
def best_rows(queries_BD: Tensor, corpus_ND: Tensor, k: int) -> Tensor:
    """rows_BK of the k best."""
    step = max(k, SCORES // max(1, len(queries_BD)))
    best_BM, rows_BM = None, None
    for start in range(0, len(corpus_ND), step):
        block_ND = corpus_ND[start : start + step]
        scores_BN = product(queries_BD, block_ND.T)
        scores_BK, rows_BK = _top(scores_BN, min(k, len(block_ND)))
        rows_BK = rows_BK + start
        if best_BM is not None and rows_BM is not None:
            # Earlier rows stand before later ones, so that places break ties as rows do.
            scores_BK, rows_BK = (
                torch.cat([best_BM, scores_BK], 1),
                torch.cat([rows_BM, rows_BK], 1),
            )
            scores_BK, place_BK = _top(scores_BK, min(k, scores_BK.shape[1]))
            rows_BK = rows_BK.gather(1, place_BK)
        best_BM, rows_BM = scores_BK, rows_BK
    assert rows_BM is not None
    return rows_BM


def scored(queries_BD: Tensor, corpus_ND: Tensor, rows_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and their scores with gradient, best first, equal ones in the order of the rows."""
    step = max(1, SCORES // max(1, rows_BK.shape[1] * corpus_ND.shape[1]))
    rows_BK = rows_BK.sort(dim=1).values
    parts = zip(queries_BD.split(step), rows_BK.split(step), strict=True)
    scores_BK = torch.cat([_products(q_bD, corpus_ND, rows_bK) for q_bD, rows_bK in parts])
    order_BK = scores_BK.detach().sort(dim=1, descending=True, stable=True).indices
    return scores_BK.gather(1, order_BK), rows_BK.gather(1, order_BK)


def _products(queries_bD: Tensor, corpus_ND: Tensor, rows_bK: Tensor) -> Tensor:
    wide = promoted(queries_bD, corpus_ND)
    vectors_bKD = corpus_ND[rows_bK].to(wide)
    return torch.bmm(vectors_bKD, queries_bD.to(wide)[..., None])[..., 0]


def _top(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row and their places, equal ones by place."""
    best_BM, place_BM = scores_BN.topk(min(k + 1, scores_BN.shape[1]), dim=1)
    best_BK, place_BK = best_BM[:, :k].contiguous(), place_BM[:, :k].contiguous()
    # topk takes any of those that are equal at the boundary; a full, stable sort the first ones.
    tied_B = (best_BM[:, k:] == best_BK[:, -1:]).any(1)
    if bool(tied_B.any()):
        order_bN = scores_BN[tied_B].sort(dim=1, descending=True, stable=True)
        best_BK[tied_B], place_BK[tied_B] = order_bN.values[:, :k], order_bN.indices[:, :k]
    place_BK, order_BK = place_BK.sort(dim=1)
    best_BK, order = best_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return best_BK, place_BK.gather(1, order)

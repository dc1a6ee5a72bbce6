"""Exact maximum inner product search in torch: blocks of the corpus and a running best list.

B queries, N corpus rows, D embedding. Equal scores are in the order of their rows.
"""

import torch
from torch import Tensor

from rag2_kernels.reference import promoted
from rag2_kernels.rows import product

SCORES = 1 << 24  # scores held at once: 64 MiB in fp32


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
    wide = promoted(queries_BD, corpus_ND)
    rows_BK = rows_BK.sort(dim=1).values
    vectors_BKD = corpus_ND[rows_BK].to(wide)
    scores_BK = torch.bmm(vectors_BKD, queries_BD.to(wide)[..., None])[..., 0]
    order_BK = scores_BK.detach().sort(dim=1, descending=True, stable=True).indices
    return scores_BK.gather(1, order_BK), rows_BK.gather(1, order_BK)


def _top(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row and their places, equal ones by place."""
    best_BK, place_BK = scores_BN.topk(k, dim=1)
    # topk takes any of those that are equal at the boundary; a full, stable sort the first ones.
    tied_B = (scores_BN >= best_BK[:, -1:]).sum(1) > k
    if bool(tied_B.any()):
        order_bN = scores_BN[tied_B].sort(dim=1, descending=True, stable=True)
        best_BK[tied_B], place_BK[tied_B] = order_bN.values[:, :k], order_bN.indices[:, :k]
    place_BK, order_BK = place_BK.sort(dim=1)
    best_BK, order = best_BK.gather(1, order_BK).sort(dim=1, descending=True, stable=True)
    return best_BK, place_BK.gather(1, order)

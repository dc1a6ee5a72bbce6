"""The scoring operations of retrieval-augmented generation, each defined in `reference`.

`impl="torch"` runs anywhere and never stores the logits of all rows; `impl="triton"` runs kernels
on a GPU; `impl="auto"` goes by the tensors' device, see `switch`. Importing this package needs no
GPU, no driver and no triton.
"""

from torch import Tensor

from rag2_kernels import contrast, fused, logprob, pool, reference, topk
from rag2_kernels.fused import RagLoss
from rag2_kernels.reference import Loss
from rag2_kernels.rows import Rows
from rag2_kernels.scaled import ScaledRows
from rag2_kernels.switch import takes_kernel

__all__ = [
    "Loss",
    "RagLoss",
    "answer_logprob",
    "greedy_logprob",
    "info_nce",
    "marginal_nll",
    "masked_mean_pool",
    "mips_topk",
    "rag_loss",
]


def answer_logprob(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability in nats of each label under `softmax(hidden W^T)`: see `reference`."""
    rows = _rows("answer_logprob", impl, hidden_MH, Rows)
    return logprob.answer_logprob(hidden_MH, weight_VH, labels_M, chunk, rows)


def greedy_logprob(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`answer_logprob` without gradient, and whether each label is the most likely token."""
    rows = _rows("answer_logprob", impl, hidden_MH, Rows)
    return logprob.greedy_logprob(hidden_MH, weight_VH, labels_M, rows)


def marginal_nll(
    scores_BK: Tensor,
    logp_BKT: Tensor,
    mask_BKT: Tensor,
    *,
    level: str = "sequence",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss in nats of each question and the posterior of its chunks: see `reference`."""
    if level not in ("sequence", "token"):
        raise ValueError(f"level must be sequence or token, not {level!r}")
    if logp_BKT.shape != mask_BKT.shape or logp_BKT.shape[:-1] != scores_BK.shape:
        raise ValueError(
            "scores [B, K], logp [B, K, T] and mask [B, K, T] are needed, not "
            f"{tuple(scores_BK.shape)}, {tuple(logp_BKT.shape)} and {tuple(mask_BKT.shape)}"
        )
    if not takes_kernel("marginal_nll", impl, scores_BK):
        return reference.marginal_nll(scores_BK, logp_BKT, mask_BKT, level)
    from rag2_kernels.gpu import marginal

    return marginal.marginal_nll(scores_BK, logp_BKT, mask_BKT, level)


def rag_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    pair_M: Tensor,
    scores_BK: Tensor,
    *,
    loss: Loss = reference.marginal_nll,
    prompts: int | None = None,
    skip_below: float = 0.0,
    impl: str = "auto",
) -> RagLoss:
    """The mean loss in nats of B questions from the output head's inputs, fused with its gradient.

    `pair_M` names the prompt b S + s of each row, in order, with S = `prompts` (by default K);
    `loss` is any loss that is separable by question. Rows of prompts whose weight in their
    question's loss is below `skip_below` (for the marginal: their posterior) get no gradient and
    add none to the weight's.
    """
    prompts = scores_BK.shape[1] if prompts is None else prompts
    given = (hidden_MH, weight_VH, labels_M, pair_M, scores_BK)
    rows = _rows("rag_loss", impl, hidden_MH, ScaledRows)
    return fused.rag_loss(*given, loss, prompts, skip_below, rows)


def info_nce(
    queries_BD: Tensor,
    chunks_ND: Tensor,
    positive_B: Tensor,
    scale: Tensor | float,
    *,
    groups: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The contrastive loss of B questions over N chunks in nats, a scalar: see `reference`.

    `groups` = (question_BG, chunk_N) are int64 ids of at least 0, question_BG padded with -1: chunk
    n is no negative of question b if its id is among the question's. `scale` may be a 0-d tensor
    with a gradient. ValueError where shapes do not fit and for a number `scale` that is not
    positive; on a CPU also for a `positive_B` beyond the chunks.
    """
    given = (queries_BD, chunks_ND, positive_B, scale, groups, symmetric)
    if not takes_kernel("info_nce", impl, queries_BD):
        return contrast.info_nce(*given)
    from rag2_kernels.gpu import contrast as kernels

    return contrast.info_nce(*given, kernels.Scores)


def mips_topk(
    queries_BD: Tensor, corpus_ND: Tensor, k: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query and their rows, exact: see `reference`.

    No [B, N] tensor is stored. With fewer than k rows there are as many columns as rows.
    """
    if queries_BD.ndim != 2 or corpus_ND.ndim != 2 or queries_BD.shape[1] != corpus_ND.shape[1]:
        raise ValueError(
            "queries [B, D] and corpus [N, D] are needed, not "
            f"{tuple(queries_BD.shape)} and {tuple(corpus_ND.shape)}"
        )
    if k < 1 or not len(corpus_ND):
        raise ValueError(f"k={k} of {len(corpus_ND)} rows: both must be at least 1")
    k = min(k, len(corpus_ND))
    if takes_kernel("mips_topk", impl, queries_BD):
        from rag2_kernels.gpu import groupmax

        rows_BK = groupmax.search(queries_BD, corpus_ND, k)
    else:
        rows_BK = topk.best_rows(queries_BD, corpus_ND, k)
    return topk.scored(queries_BD, corpus_ND, rows_BK)


def masked_mean_pool(
    hidden_BLH: Tensor, mask_BL: Tensor, *, normalize: bool = True, impl: str = "auto"
) -> Tensor:
    """The mean of the states under the mask, to length 1 if asked, in fp32: see `reference`."""
    if hidden_BLH.ndim != 3 or mask_BL.shape != hidden_BLH.shape[:2]:
        raise ValueError(
            "hidden [B, L, H] and mask [B, L] are needed, not "
            f"{tuple(hidden_BLH.shape)} and {tuple(mask_BL.shape)}"
        )
    if not takes_kernel("masked_mean_pool", impl, hidden_BLH):
        return pool.masked_mean_pool(hidden_BLH, mask_BL, normalize)
    from rag2_kernels.gpu import pool as kernel

    return kernel.masked_mean_pool(hidden_BLH, mask_BL, normalize)[0]


def _rows(operation: str, impl: str, tensor: Tensor, plain: type[Rows]) -> type[Rows]:
    if not takes_kernel(operation, impl, tensor):
        return plain
    from rag2_kernels.gpu import linear

    return linear.Rows

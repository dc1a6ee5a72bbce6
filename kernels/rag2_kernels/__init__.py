"""The scoring operations of retrieval-augmented generation, each defined in `reference`.

`impl="torch"` runs anywhere and never stores the logits of all rows; `impl="triton"` runs kernels
on a GPU; `impl="auto"` takes them where the tensors are on one. Importing this package needs no
GPU, no driver and no triton.
"""

from importlib.util import find_spec

from torch import Tensor

from rag2_kernels import fused, logprob, pool, reference, topk
from rag2_kernels.fused import RagLoss
from rag2_kernels.reference import Loss
from rag2_kernels.rows import Rows
from rag2_kernels.scaled import ScaledRows

__all__ = [
    "Loss",
    "RagLoss",
    "answer_logprob",
    "marginal_nll",
    "masked_mean_pool",
    "mips_topk",
    "rag_loss",
]

IMPLEMENTATIONS = ("auto", "torch", "triton")


def answer_logprob(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability in nats of each label under `softmax(hidden W^T)`: see `reference`."""
    rows = _rows(impl, hidden_MH, Rows)
    return logprob.answer_logprob(hidden_MH, weight_VH, labels_M, chunk, rows)


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
    if not _triton(impl, scores_BK):
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
    rows = _rows(impl, hidden_MH, ScaledRows)
    return fused.rag_loss(*given, loss, prompts, skip_below, rows)


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
    if _triton(impl, queries_BD):
        from rag2_kernels.gpu import groupmax

        rows_BK = groupmax.search(queries_BD, corpus_ND, k)
    else:
        rows_BK = topk.best_rows(queries_BD, corpus_ND, k)
    return topk.scored(queries_BD, corpus_ND, rows_BK)


def masked_mean_pool(
    hidden_BLH: Tensor, mask_BL: Tensor, *, normalize: bool = True, impl: str = "auto"
) -> Tensor:
    """The mean of the states under the mask, to length 1 if asked, in fp32: see `reference`."""
    if not _triton(impl, hidden_BLH):
        return pool.masked_mean_pool(hidden_BLH, mask_BL, normalize)
    from rag2_kernels.gpu import pool as kernel

    return kernel.masked_mean_pool(hidden_BLH, mask_BL, normalize)[0]


def _rows(impl: str, tensor: Tensor, plain: type[Rows]) -> type[Rows]:
    if not _triton(impl, tensor):
        return plain
    from rag2_kernels.gpu import linear

    return linear.Rows


def _triton(impl: str, tensor: Tensor) -> bool:
    """Whether the kernels are to run; raises ValueError, RuntimeError where they cannot."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
    installed = find_spec("triton") is not None
    if impl != "triton":
        return impl == "auto" and tensor.is_cuda and installed
    if not installed:
        raise RuntimeError("impl='triton': triton is not installed; impl='torch' runs anywhere")
    from rag2_kernels.gpu.launch import interpreted

    if not (tensor.is_cuda or interpreted()):
        raise RuntimeError(
            f"impl='triton' needs tensors on a GPU, not on {tensor.device} (or TRITON_INTERPRET=1, "
            "set before triton is imported, to run its interpreter)"
        )
    return True

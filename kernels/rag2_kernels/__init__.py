"""The scoring operations, each defined by its plain-torch twin in `reference`.

Importing this package needs no GPU and no driver.
"""

from torch import Tensor

from rag2_kernels import reference

__all__ = ["answer_logprob", "marginal_nll"]

IMPLEMENTATIONS = ("auto", "torch")


def answer_logprob(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability in nats of each label under `softmax(hidden W^T)`: see `reference`."""
    _check(impl)
    return reference.answer_logprob(hidden_MH, weight_VH, labels_M, chunk=chunk)


def marginal_nll(
    scores_BK: Tensor,
    logp_BKT: Tensor,
    mask_BKT: Tensor,
    *,
    level: str = "sequence",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Loss in nats of each question and the posterior of its chunks: see `reference`."""
    _check(impl)
    return reference.marginal_nll(scores_BK, logp_BKT, mask_BKT, level=level)


def _check(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")

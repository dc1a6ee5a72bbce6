"""The rule for a kernel's errors, as a number: at most 1 is as exact as it must be."""

import torch
from torch import Tensor

LAST = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""The rounding of a result to its dtype."""


def excess(got: Tensor, plain: Tensor, truth: Tensor, last: float, times: float = 2) -> float:
    """The error of `got` over what it may be; infinite where it is not finite.

    It may err by `times` what plain torch does in the same dtype, and the last place: in the norm,
    and, twice as much, in any one number. Both are against fp64 on the same rounded inputs.
    """
    if not bool(got.isfinite().all()):
        return float("inf")
    allowed = times * (plain - truth).norm() + last * (truth.norm() + 0.1)
    worst = (plain - truth).abs().max() + last * (truth.abs().max() + 0.1)
    ratios = ((got - truth).norm() / allowed, (got - truth).abs().max() / (2 * times * worst))
    return float(max(ratios))

"""Rows of logits z = h W^T, some at a time: log-probabilities, then gradients from the same rows.

C rows of a chunk, H hidden, V vocabulary. The exponentials exp(z - max z) of a chunk are the only
[C, V] tensor; the gradient of the logits, g (onehot - softmax), is never stored. With E the
exponentials, 0 at the labels, t the sum over all of V, a = g / t and o = g (1 - p(label)):
    dh = o W[label] - a (E W);    dW = -E^T (a h), plus o h added to the rows of the labels
The label's share is taken from its log-probability: where p is near 1, rounding E to half precision
there would be larger than 1 - p.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from rag2_kernels.reference import promoted


@dataclass(frozen=True, slots=True)
class Rows:
    """The log-probabilities logp_C of C rows' labels, and what their gradients are made from."""

    room: ClassVar[int] = 1 << 23  # logits held at once: 32 MiB in fp32
    spends: ClassVar[bool] = False  # whether `backward` writes over what is held

    hidden_CH: Tensor
    weight_VH: Tensor
    labels_C: Tensor
    held_CV: Tensor  # the exponentials but those of the labels
    norm_C: Tensor  # the sums of all
    logp_C: Tensor

    @classmethod
    def logp(cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> Tensor:
        """Their log-probabilities alone."""
        return cls.of(hidden_CH, weight_VH, labels_C).logp_C

    @classmethod
    def of(cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> Self:
        """Their logits, exponentials and log-probabilities."""
        exp_CV = product(hidden_CH, weight_VH.T)
        most_C1 = exp_CV.amax(-1, keepdim=True)
        label_C = exp_CV.gather(-1, labels_C[:, None])[:, 0]
        exp_CV.sub_(most_C1).exp_()
        total_C = exp_CV.sum(-1)
        logp_C = label_C - most_C1[:, 0] - total_C.log()
        exp_CV.scatter_(-1, labels_C[:, None], 0)
        return cls(hidden_CH, weight_VH, labels_C, exp_CV, total_C, logp_C)

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """What `Rows(hidden, weight, labels, *kept, logp)` is made of again."""
        return self.held_CV, self.norm_C

    def backward(
        self, grad_C: Tensor, dhidden_CH: Tensor | None, dweight_VH: Tensor | None
    ) -> None:
        """Write the gradient of the rows and add that of the weight, given dloss/dlogp."""
        scaled_C1 = (grad_C / self.norm_C)[:, None]
        own_C1 = (-grad_C * torch.expm1(self.logp_C))[:, None]
        exp_CV = self.held_CV.to(self.weight_VH.dtype)
        if dhidden_CH is not None:
            own_CH = own_C1 * self.weight_VH[self.labels_C]
            dhidden_CH.copy_(own_CH - scaled_C1 * product(exp_CV, self.weight_VH))
        if dweight_VH is not None:
            pulled_CH = (scaled_C1 * self.hidden_CH).to(exp_CV.dtype)
            add_product(dweight_VH, exp_CV.T, pulled_CH, alpha=-1)
            own_CH = (own_C1 * self.hidden_CH).to(dweight_VH.dtype)
            dweight_VH.index_add_(0, self.labels_C, own_CH)

    def take(self, some_R: Tensor) -> Self:
        """Some of the rows."""
        names = ("hidden_CH", "labels_C", "held_CV", "norm_C", "logp_C")
        return replace(self, **{name: getattr(self, name)[some_R] for name in names})


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and returned in fp32 (fp64 for fp64), whatever the dtypes of the inputs."""
    if _tensor_cores(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)  # no fp32 copy of the weight
    wide = promoted(a, b)
    return a.to(wide) @ b.to(wide)


def add_product(into: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> None:
    """into += alpha a @ b, without a second tensor of its size where the dtypes allow it."""
    if a.dtype == b.dtype == into.dtype:
        into.addmm_(a, b, alpha=alpha)
    elif _tensor_cores(a, b) and into.dtype == torch.float32:
        torch.addmm(into, a, b, alpha=alpha, out_dtype=torch.float32, out=into)
    else:
        into.add_(product(a, b), alpha=alpha)


def _tensor_cores(a: Tensor, b: Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)

"""Rows of logits z = h W^T, some at a time: log-probabilities, then gradients from the same rows.

C rows of a chunk, H hidden, V vocabulary. A chunk's logits and their gradient are the only [C, V]
tensors. With g = dloss/dlogp:
    dz = g (onehot(label) - softmax);  dh = dz W;  dW = dz^T h
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from rag2_kernels.reference import promoted


@dataclass(frozen=True, slots=True)
class Rows:
    """The log-probabilities logp_C of C rows' labels, and what their gradients are made from."""

    room: ClassVar[int] = 1 << 24  # logits held at once: 64 MiB in fp32
    whole: ClassVar[int] = 1 << 26  # those of one question that must stay together
    spends: ClassVar[bool] = False  # whether `backward` writes over what is held

    hidden_CH: Tensor
    weight_VH: Tensor
    labels_C: Tensor
    held_CV: Tensor  # the logits
    norm_C: Tensor  # their log-sum-exp
    logp_C: Tensor

    @classmethod
    def logp(cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> Tensor:
        """Their log-probabilities alone."""
        return cls.of(hidden_CH, weight_VH, labels_C).logp_C

    @classmethod
    def greedy(
        cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Their log-probabilities, and whether each is the (first) most likely token."""
        rows = cls.of(hidden_CH, weight_VH, labels_C)
        return rows.logp_C, rows.held_CV.argmax(-1) == labels_C

    @classmethod
    def held_dtype(cls, weight_VH: Tensor) -> torch.dtype:
        """What numbers are held in."""
        return promoted(weight_VH)

    @classmethod
    def of(
        cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, space: Tensor | None = None
    ) -> Self:
        """Their logits, in `space` if it fits, and log-probabilities."""
        logits_CV = product(hidden_CH, weight_VH.T, space)
        lse_C = logits_CV.logsumexp(-1)
        logp_C = logits_CV.gather(-1, labels_C[:, None])[:, 0] - lse_C
        return cls(hidden_CH, weight_VH, labels_C, logits_CV, lse_C, logp_C)

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """What `Rows(hidden, weight, labels, *kept, logp)` is made of again."""
        return self.held_CV, self.norm_C

    def backward(
        self, grad_C: Tensor, dhidden_CH: Tensor | None, dweight_VH: Tensor | None
    ) -> None:
        """Write the gradient of the rows and add that of the weight, given dloss/dlogp."""
        dlogits_CV = (self.held_CV - self.norm_C[:, None]).exp_().mul_(-grad_C[:, None])
        dlogits_CV.scatter_add_(-1, self.labels_C[:, None], grad_C[:, None])
        if dhidden_CH is not None:
            dhidden_CH.copy_(product(dlogits_CV.to(self.weight_VH.dtype), self.weight_VH))
        if dweight_VH is not None:
            dweight_VH += product(dlogits_CV.to(self.hidden_CH.dtype).T, self.hidden_CH)

    def take(self, some_R: Tensor) -> Self:
        """Some of the rows."""
        names = ("hidden_CH", "labels_C", "held_CV", "norm_C", "logp_C")
        return replace(self, **{name: getattr(self, name)[some_R] for name in names})


def product(a: Tensor, b: Tensor, space: Tensor | None = None) -> Tensor:
    """a @ b summed and returned in fp32 (fp64 for fp64), whatever the dtypes of the inputs.

    `space`, numbers in a row, is written to where it is large enough and of that dtype: a CPU hands
    large tensors' pages back, and to clear them anew takes a third of the time of the product.
    """
    wide, shape = promoted(a, b), (a.shape[0], b.shape[1])
    out = within(space, shape, wide)
    if tensor_cores(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)  # no fp32 copy of the weight
    return torch.mm(a.to(wide), b.to(wide), out=out)


def within(space: Tensor | None, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The first numbers of `space` as a matrix, or None where they are too few or others."""
    count = shape[0] * shape[1]
    if space is None or space.dtype != dtype or len(space) < count:
        return None
    return space[:count].view(shape)


def add_product(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, without a second tensor of its size where the dtypes allow it."""
    if a.dtype == b.dtype == into.dtype:
        into.addmm_(a, b)
    elif tensor_cores(a, b) and into.dtype == torch.float32:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    else:
        into += product(a, b)


def tensor_cores(a: Tensor, b: Tensor) -> bool:
    """Whether a product in half precision may leave its sum in fp32."""
    return a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)

"""Rows whose exponentials are held in place of their logits: no gradient of logits is ever made.

With E = exp(z - max z), n its sum and c = g / n, a row's dz is -c E but at the label, and so
    dh = -c (E W) + g (1 - p) W_label;   dW = -E^T (c h), and g (1 - p) h added at the label's row
where E is 0 at the label: c scales [C, H] numbers instead of [C, V], and 1 - p = -expm1(logp) does
not cancel where p is near 1, however E is rounded. (QuACK's linear cross-entropy stores E, too.)
"""

from typing import Self

import torch
from torch import Tensor

from rag2_kernels.rows import Rows, add_product, product


class ScaledRows(Rows):
    """Held are E, 0 at the labels, and its sums n, labels included."""

    room = 1 << 23  # 32 MiB in fp32: of more, a CPU's pages are handed back and cleared every time
    whole = 1 << 26

    @classmethod
    def of(
        cls, hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, space: Tensor | None = None
    ) -> Self:
        """Their exponentials and log-probabilities."""
        held_CV = product(hidden_CH, weight_VH.T, space)
        own_C1 = held_CV.gather(-1, labels_C[:, None])
        most_C1 = held_CV.amax(-1, keepdim=True)
        held_CV.sub_(most_C1).exp_().scatter_(-1, labels_C[:, None], 0.0)
        below_C, others_C = (own_C1 - most_C1)[:, 0], held_CV.sum(-1)
        norm_C = others_C + below_C.exp()
        # Where the label is the largest, n is 1 + others, and its digits are those of others.
        logp_C = below_C - torch.where(below_C == 0, others_C.log1p(), norm_C.log())
        return cls(hidden_CH, weight_VH, labels_C, held_CV, norm_C, logp_C)

    def backward(
        self, grad_C: Tensor, dhidden_CH: Tensor | None, dweight_VH: Tensor | None
    ) -> None:
        """Write the gradient of the rows and add that of the weight, given dloss/dlogp."""
        share_C1 = (-grad_C / self.norm_C)[:, None]
        label_C1 = (-self.logp_C.expm1() * grad_C)[:, None]
        # A GPU's fast products are of half precision; a CPU's would only round for nothing.
        factor_CV = self.held_CV.to(self.weight_VH.dtype) if self.held_CV.is_cuda else self.held_CV
        if dhidden_CH is not None:
            others_CH = product(factor_CV, self.weight_VH)
            dhidden_CH.copy_(others_CH * share_C1 + label_C1 * self.weight_VH[self.labels_C])
        if dweight_VH is not None:
            add_product(dweight_VH, factor_CV.T, (share_C1 * self.hidden_CH).to(factor_CV.dtype))
            label_CH = (label_C1 * self.hidden_CH).to(dweight_VH.dtype)
            # Unlike index_add, this sorts on a GPU: equal labels add up in one order.
            dweight_VH.index_put_((self.labels_C,), label_CH, accumulate=True)

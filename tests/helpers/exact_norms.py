"""Llama's norms in float64 where they are given float64.

The library's own round to float32 inside: of two runs that agree to 1e-14 a value now and then
falls to either side of a rounding, and from there they differ by 1e-8 and more.
"""

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def exact_norms(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    honest = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float64:
            return honest(self, hidden_states)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    patch.setattr(LlamaRMSNorm, "forward", forward)

"""Mean over a mask in torch: one product for the sum, and no masked copy of the states."""

import torch
from torch import Tensor

from rag2_kernels.reference import promoted


def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> Tensor:
    """As `reference.masked_mean_pool`, for states that are finite under a false mask."""
    wide = promoted(hidden_BLH)
    weight_BL = mask_BL.to(wide)
    sum_BH = torch.bmm(weight_BL[:, None], hidden_BLH.to(wide))[:, 0]
    mean_BH = sum_BH / weight_BL.sum(1, keepdim=True).clamp_min(1)
    return torch.nn.functional.normalize(mean_BH, dim=-1) if normalize else mean_BH

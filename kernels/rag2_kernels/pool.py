"""Mean over a mask in torch: one product for the sum and, on a CPU, no masked copy of the states."""

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import normalize as to_length_1

from rag2_kernels.reference import promoted


def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> Tensor:
    """As `reference.masked_mean_pool`."""
    wide = promoted(hidden_BLH)
    weight_BL = mask_BL.bool().to(wide)
    sum_BH = einsum(hidden_BLH.to(wide), weight_BL, "b l h, b l -> b h")
    # 0 x NaN is NaN. A masked copy is cheaper than a CPU's wait for a GPU's answer whether there is.
    if sum_BH.is_cuda or not bool(sum_BH.isfinite().all()):
        used_BLH = torch.where(rearrange(mask_BL.bool(), "b l -> b l 1"), hidden_BLH.to(wide), 0)
        sum_BH = used_BLH.sum(1)
    mean_BH = sum_BH / rearrange(weight_BL.sum(1).clamp(min=1), "b -> b 1")
    return to_length_1(mean_BH, dim=-1) if normalize else mean_BH

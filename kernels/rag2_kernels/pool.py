"""Mean over a mask in torch: one product for the sum, and no masked copy of the states."""

from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import normalize as to_length_1

from rag2_kernels.reference import promoted


def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> Tensor:
    """As `reference.masked_mean_pool`, for states that are finite under a false mask."""
    wide = promoted(hidden_BLH)
    weight_BL = mask_BL.to(wide)
    sum_BH = einsum(hidden_BLH.to(wide), weight_BL, "b l h, b l -> b h")
    mean_BH = sum_BH / rearrange(weight_BL.sum(1).clamp(min=1), "b -> b 1")
    return to_length_1(mean_BH, dim=-1) if normalize else mean_BH

"""Mean over a mask in torch; on a CPU one product for the sum, and no masked copy of the states."""

from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import normalize as to_length_1

from rag2_kernels import reference


def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool) -> Tensor:
    """As `reference.masked_mean_pool`."""
    defined = (hidden_BLH, mask_BL, normalize)
    if hidden_BLH.is_cuda:  # its masked copy costs less than to wait whether one is needed
        return reference.masked_mean_pool(*defined)
    wide = reference.promoted(hidden_BLH)
    weight_BL = mask_BL.bool().to(wide)
    sum_BH = einsum(hidden_BLH.to(wide), weight_BL, "b l h, b l -> b h")
    if not bool(sum_BH.isfinite().all()):  # 0 x NaN
        return reference.masked_mean_pool(*defined)
    mean_BH = sum_BH / rearrange(weight_BL.sum(1).clamp(min=1), "b -> b 1")
    return to_length_1(mean_BH, dim=-1) if normalize else mean_BH

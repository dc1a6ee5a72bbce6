"""Hard EM: only the chunk that explains the answer best counts."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rag2.losses.base import JointLoss, summed


class HardEM(JointLoss):
    """-max_k [log p(z_k|x) + log p(y|x,z_k)], in nats (Min et al. 2019, eq. 3).

    Gradient: dloss/ds_k = p_k - 1[k is the best]; only the best chunk's tokens get -1.
    Relations: an upper bound of the sequence marginal, by at most log K, and the limit T -> 0 of
    -T LSE_k((log p_k + log p(y|x,z_k)) / T), whose T = 1 is the marginal; equal where the posterior
    is certain, and so, nearly, on long answers; K = 1 is the cross-entropy of the answer.
    """

    name: Literal["hard_em"] = "hard_em"

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, one-hot posterior_BK); the mask is 1 on answer tokens."""
        logp_BK = summed(logp_BST, mask_BST)
        prior_BK = scores_BK.to(torch.promote_types(scores_BK.dtype, torch.float32)).log_softmax(-1)
        joint_BK = prior_BK + logp_BK
        best_B = joint_BK.detach().argmax(-1)
        posterior_BK = one_hot(best_B, joint_BK.shape[1]).to(joint_BK.dtype)
        return -(torch.where(posterior_BK > 0, joint_BK, 0)).sum(-1), posterior_BK

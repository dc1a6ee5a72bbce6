"""Retrieval scores and answer log-probabilities -> the RAG marginal likelihood loss."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

import rag2_kernels
from rag2.losses.base import JointLoss, answer_tokens


class Marginal(JointLoss):
    """-log sum_k p(z_k|x) p(y|x,z_k), in nats, with p(z_k|x) = softmax_k of the scores.

    `sequence` (Lewis et al. 2020, RAG-Sequence; Guu et al. 2020, eq. 1) marginalises whole answers:
        loss = -LSE_k(log p_k + sum_t logp_kt)
    `token` (Lewis et al. 2020, RAG-Token) marginalises each answer token:
        loss = -sum_t LSE_k(log p_k + logp_kt)
    `mean` takes the mean over the T tokens for their sum (as JSA-RAG and RetGen do): no longer a
    probability, but the posterior does not get harder with the length of the answer:
        loss = -LSE_k(log p_k + mean_t logp_kt)
    Gradient: dloss/ds_k = p_k - r_k with the posterior r = softmax(log p + logp), and each
    chunk's log-probability gets -r_k (at token level, r_kt and their sum over t; `mean`: a T-th).
    Relations: K = 1 is the cross-entropy of the answer; with one answer token all levels agree;
    hard-EM is the limit of certainty; EMDR2 keeps the gradient to p and reads all chunks at once.
    """

    name: Literal["marginal"] = "marginal"
    level: Literal["sequence", "token", "mean"] = "sequence"

    def priors(self, mask_BST: Tensor) -> Tensor | int:
        """Once, or once a token of the answer."""
        return answer_tokens(mask_BST) if self.level == "token" else 1

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, posterior_BK); the mask is 1 on answer tokens."""
        if self.level != "mean":
            return rag2_kernels.marginal_nll(scores_BK, logp_BST, mask_BST, level=self.level)
        tokens_BS = mask_BST.sum(-1).clamp_min(1)
        mean_BST = torch.where(mask_BST.bool(), logp_BST, 0) / rearrange(tokens_BS, "b s -> b s 1")
        return rag2_kernels.marginal_nll(scores_BK, mean_BST, mask_BST, level="sequence")

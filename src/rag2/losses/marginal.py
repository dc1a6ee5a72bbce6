"""Retrieval scores and answer log-probabilities -> the RAG marginal likelihood loss."""

from typing import Literal

from torch import Tensor

import rag2_kernels
from rag2.config import Config


class Marginal(Config):
    """-log sum_k p(z_k|x) p(y|x,z_k), in nats, with p(z_k|x) = softmax_k of the scores.

    `sequence` (Lewis et al. 2020, RAG-Sequence; Guu et al. 2020, eq. 1) marginalises whole answers:
        loss = -LSE_k(log p_k + sum_t logp_kt)
    `token` (Lewis et al. 2020, RAG-Token) marginalises each answer token:
        loss = -sum_t LSE_k(log p_k + logp_kt)
    Gradient: dloss/ds_k = p_k - r_k with the posterior r = softmax(log p + logp), and each
    chunk's log-probability gets -r_k (at token level, r_kt and their sum over t).
    Relations: K = 1 is the cross-entropy of the answer; with one answer token both levels agree.
    """

    name: Literal["marginal"] = "marginal"
    level: Literal["sequence", "token"] = "sequence"

    def __call__(
        self, scores_BK: Tensor, logp_BKT: Tensor, mask_BKT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, posterior_BK); the mask is 1 on answer tokens."""
        return rag2_kernels.marginal_nll(scores_BK, logp_BKT, mask_BKT, level=self.level)

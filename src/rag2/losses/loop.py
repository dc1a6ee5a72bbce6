"""LOOP: a chunk is worth what the answer loses when it is left out."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rag2.losses.base import JointLoss, Subset, divergence, per_token, reader_nll


class LOOP(JointLoss):
    """KL(q || p) - log p(y|x,z_1..K), in nats, with q_k = softmax_k(-sg[l_k] / temperature).

    l_k is the answer's log-probability a token in a prompt of all chunks but z_k: leave-one-out
    perplexity distillation (Izacard et al. 2023, Atlas, section 2.2). It sees that two chunks say
    the same (neither is missed) and that two are needed together; it costs K + 1 prompts of nearly
    K chunks.
    Gradient: dloss/ds_k = p_k - q_k. The prompt with all chunks trains the generator; with
    `reader: none` nothing does.
    Relations: with K = 1 the target is certain, and the cross-entropy of the answer remains; with
    K = 2 the target is PDist's, since leaving one out is reading the other alone.
    """

    name: Literal["loop"] = "loop"
    temperature: float = Field(default=0.1, gt=0)
    reader: Literal["concat", "none"] = "concat"

    def teaches_generator(self) -> bool:
        """Only as a reader."""
        return self.reader == "concat"

    def subsets(self, k: int) -> list[Subset]:
        """All chunks but one, for each one; with a reader, then all."""
        without_each = [tuple(other for other in range(k) if other != left) for left in range(k)]
        return [*without_each, *([tuple(range(k))] if self.reader == "concat" else [])]

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, target_BK); the mask is 1 on answer tokens."""
        k = scores_BK.shape[1]
        lost_BK = -per_token(logp_BST[:, :k].detach(), mask_BST[:, :k]) / self.temperature
        target_BK = torch.where(scores_BK > -torch.inf, lost_BK, -torch.inf).softmax(-1)
        loss_B = divergence(target_BK, scores_BK)
        if self.reader == "concat":
            loss_B = loss_B + reader_nll(logp_BST, mask_BST, k)
        return loss_B, target_BK

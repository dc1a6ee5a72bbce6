"""PDist: the generator's opinion of each chunk, distilled into the retriever."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rag2.losses.base import JointLoss, Subset, divergence, per_token, reader_nll, summed


class PDist(JointLoss):
    """KL(q || p) - log p(y|x,z_1..K), in nats, with q_k = softmax_k(sg[l_k] / temperature).

    l_k = log p(y|x,z_k), the mean over the answer's tokens: perplexity distillation (Izacard et al.
    2023, Atlas, section 2.2). With `answer: sum` and `reader: none` it is the LM-supervised
    retriever of REPLUG (Shi et al. 2023, section 4) and of RA-DIT. The second term trains the
    generator, on one prompt with all chunks; `reader: none` leaves it as it is.
    Gradient: dloss/ds_k = p_k - q_k. As q does not depend on p, a chunk that the retriever rates at
    nothing is still found, which the marginal's posterior r ~ p q cannot.
    Relations: with uniform p and temperature 1, q of sums is the marginal's posterior; K = 1 leaves
    the cross-entropy of the answer.
    """

    name: Literal["pdist"] = "pdist"
    temperature: float = Field(default=0.1, gt=0)
    """of the target: the mean token's log-probability is a flat judge without"""
    answer: Literal["mean", "sum"] = "mean"
    """log-probability of the answer: of its mean token, or of all of it"""
    reader: Literal["concat", "none"] = "concat"
    """what trains the generator: all chunks in one prompt, or nothing"""

    def teaches_generator(self) -> bool:
        """Only as a reader."""
        return self.reader == "concat"

    def subsets(self, k: int) -> list[Subset]:
        """Each chunk alone; with a reader, then all."""
        return [*super().subsets(k), *([tuple(range(k))] if self.reader == "concat" else [])]

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, target_BK); the mask is 1 on answer tokens."""
        k = scores_BK.shape[1]
        measure = per_token if self.answer == "mean" else summed
        judged_BK = measure(logp_BST[:, :k].detach(), mask_BST[:, :k]) / self.temperature
        target_BK = torch.where(scores_BK > -torch.inf, judged_BK, -torch.inf).softmax(-1)
        loss_B = divergence(target_BK, scores_BK)
        if self.reader == "concat":
            loss_B = loss_B + reader_nll(logp_BST, mask_BST, k)
        return loss_B, target_BK

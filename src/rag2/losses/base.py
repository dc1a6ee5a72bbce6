"""What every loss of joint training is: which prompts it reads, and a scalar a question.

Letters: B questions, K retrieved chunks, S prompts a question, T answer tokens.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from rag2.config import Config

Subset = tuple[int, ...]  # the places, among a question's K chunks, of those in one prompt


class JointLoss(Config, ABC):
    """Scores_BK and the answer's logp_BST under S prompts -> (loss_B in nats, posterior_BK)."""

    def subsets(self, k: int) -> list[Subset]:
        """The S prompts of a question with K chunks; by default each chunk is read alone."""
        return [(chunk,) for chunk in range(k)]

    def at(self, step: int) -> "JointLoss":
        """The loss of a training step; only a schedule has another than itself."""
        return self

    def teaches_generator(self) -> bool:
        """Whether the generator gets a gradient."""
        return True

    def priors(self, mask_BST: Tensor) -> Tensor | int:
        """How often p(z|x) is a factor in what a question's loss [B] is the -log of.

        What other candidates take of p(z|x) is lost as often.
        """
        return 1

    @abstractmethod
    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, posterior_BK without gradient); the mask is 1 on answer tokens.

        The scores are the logits of p(z|x). Whatever stands under a false mask is ignored.
        """


def answer_tokens(mask_BST: Tensor) -> Tensor:
    """How many tokens the answers have, [B]."""
    return mask_BST.bool().any(1).sum(-1)


def summed(logp_BST: Tensor, mask_BST: Tensor) -> Tensor:
    """log p(answer | prompt), the sum over its tokens, [B, S]."""
    return torch.where(mask_BST.bool(), logp_BST, 0).sum(-1)


def per_token(logp_BST: Tensor, mask_BST: Tensor) -> Tensor:
    """The mean log p of an answer's tokens [B, S]: comparable across answers of any length."""
    return summed(logp_BST, mask_BST) / mask_BST.sum(-1).clamp_min(1)


def reader_nll(logp_BST: Tensor, mask_BST: Tensor, everything: int) -> Tensor:
    """-log p(y | x, all chunks in prompt `everything`) [B]: what a reader of them all learns by.

    It stands where Fusion-in-Decoder's cross-entropy does (Izacard and Grave 2021); a causal LM
    reads the chunks one after the other instead of fusing their encodings.
    """
    chosen = slice(everything, everything + 1)
    return -summed(logp_BST[:, chosen], mask_BST[:, chosen])[:, 0]


def divergence(target_BK: Tensor, scores_BK: Tensor) -> Tensor:
    """KL(q || p) = sum_k q_k (log q_k - log p_k) [B] in nats, p = softmax_k of the scores.

    A sum over k, so that the mean over questions is torch's `batchmean`; its default `mean` also
    divides by K. Gradient to the scores: p - q. The target carries none.
    """
    q_BK = target_BK.detach()
    logp_BK = scores_BK.log_softmax(-1)
    terms_BK = torch.where(q_BK > 0, q_BK * (q_BK.clamp_min(1e-38).log() - logp_BK), 0)
    return terms_BK.sum(-1)

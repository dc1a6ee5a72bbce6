"""EMDR2: the retriever by the marginal of a fixed reader, the reader by all chunks at once."""

from typing import Literal

from torch import Tensor

import rag2_kernels
from rag2.losses.base import JointLoss, Subset, answer_tokens, reader_nll


class EMDR2(JointLoss):
    """-log sum_k p(z_k|x) sg[p(y|x,z_k)] - log p(y|x,z_1..K), in nats (Singh et al. 2021, eq. 5).

    The first term trains the retriever alone (sg: no gradient), the second the generator alone, on
    one prompt with all K chunks. `level` says how the first is marginalised: over whole answers as
    in the paper's equation, or at each token as in its authors' code.
    Gradient: dloss/ds_k = p_k - r_k as of the marginal (at token level sum_t (p_k - r_kt)); the
    tokens of the prompt with all chunks get -1, those of single chunks nothing.
    Relations: the marginal's retriever with Fusion-in-Decoder's reader; K = 1 is twice the
    cross-entropy in value and once in gradient.
    """

    name: Literal["emdr2"] = "emdr2"
    level: Literal["sequence", "token"] = "sequence"

    def subsets(self, k: int) -> list[Subset]:
        """Each chunk alone, then all."""
        return [*super().subsets(k), tuple(range(k))]

    def priors(self, mask_BST: Tensor) -> Tensor | int:
        """Once, or once a token of the answer."""
        return answer_tokens(mask_BST) if self.level == "token" else 1

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss_B in nats, posterior_BK); the mask is 1 on answer tokens."""
        k = scores_BK.shape[1]
        alone_BKT = logp_BST[:, :k].detach()
        retriever_B, posterior_BK = rag2_kernels.marginal_nll(
            scores_BK, alone_BKT, mask_BST[:, :k], level=self.level
        )
        return retriever_B + reader_nll(logp_BST, mask_BST, k), posterior_BK

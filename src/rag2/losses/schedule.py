"""First one loss, then another: distillation finds the chunks, then the marginal uses them."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from rag2.losses.base import JointLoss
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist


class DistilThenMarginal(JointLoss):
    """PDist for the first `steps` training steps, the marginal from then on.

    Gradient to the scores: p - q, then p - r. The target q does not depend on p, so that a
    retriever that ranks the right chunk last learns of it; the posterior r does, and p - r is the
    exact gradient of the likelihood that is reported.
    Relations: `steps: 0` is the marginal.
    """

    name: Literal["distil_then_marginal"] = "distil_then_marginal"
    steps: int = Field(default=100, ge=0)
    """training steps of the first loss"""
    distil: PDist = PDist()
    marginal: Marginal = Marginal()

    def at(self, step: int) -> JointLoss:
        """Which of the two a step minimises."""
        return self.distil if step < self.steps else self.marginal

    def __call__(
        self, scores_BK: Tensor, logp_BST: Tensor, mask_BST: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Nothing by itself: ask `at(step)` which loss it is."""
        raise AssertionError("a schedule is no loss of its own: loss.at(step)")

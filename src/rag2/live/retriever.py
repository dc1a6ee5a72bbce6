"""The live knowledge base as a retriever of the harness: always the last committed change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag2.live.live import Live
from rag2.types import Question


@dataclass(frozen=True, slots=True)
class LiveDense:
    """A dense retriever over what is live now.

    Relation: over the same chunks, equal to `rag2.retrieval.Dense`.
    """

    live: Live
    scale: float
    """of the encoder: score = scale * cosine, the logits of training"""

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search; fewer than k chunks where fewer are live."""
        found = self.live.search([question.question for question in questions], k)
        return found.scores_BK * self.scale, found.ids_BK

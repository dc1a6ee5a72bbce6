"""The live knowledge base as a retriever of the harness: always the last committed change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag2.live.live import Live
from rag2.types import Question


@dataclass(frozen=True, slots=True)
class LiveDense:
    """A retriever over what is live now, by vectors, or with `weight` < 1 by words too.

    Relations: over the same chunks, equal to `rag2.retrieval.Dense`; with `weight` < 1 to `Fused`
    of it and FTS5's BM25.
    """

    live: Live
    scale: float
    """of the encoder: score = scale * cosine, the logits of training; fused scores have none"""
    weight: float = 1.0
    """of the vectors"""

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search; fewer than k chunks where fewer are live."""
        asked = [question.question for question in questions]
        found = self.live.search(asked, k, weight=self.weight)
        scale = self.scale if self.weight == 1 else 1.0
        return found.scores_BK * scale, found.ids_BK

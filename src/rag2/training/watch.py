"""How good the retriever is while it trains: recall on validation questions."""

from collections.abc import Callable, Sequence

import numpy as np

from rag2.config import Config
from rag2.registry import UserError
from rag2.reindex.collapse import Guard
from rag2.reindex.policy import AdaptiveRefresh
from rag2.retrieval import gold_chunks, recall
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question

Search = Callable[[np.ndarray, int], np.ndarray]  # queries_BD and k -> chunk ids_BK, best first


class Watch:
    """The validation questions that name evidence, and which chunks are theirs."""

    def __init__(self, questions: Sequence[Question], chunks: Sequence[Chunk]) -> None:
        gold = gold_chunks(questions, chunks)
        self.questions = [q for q in questions if q.split == "validation" and gold[q.id]]
        self.gold = [gold[question.id] for question in self.questions]
        self.depth = min(5, len(chunks))

    def needed_by(self, refresh: Config, guard: Guard) -> None:
        """Raise UserError where there are no such questions and something goes by them."""
        adaptive = isinstance(refresh, AdaptiveRefresh)
        if not self.questions and (adaptive or guard.action != "warn"):
            what = "refresh.name=adaptive" if adaptive else f"guard.action={guard.action}"
            raise UserError(
                f"{what} goes by validation questions that name `evidence` or a `gold_chunk` of "
                "this knowledge base; there are none"
            )

    def recall_at_5(self, encoder: DualEncoder, search: Search) -> float:
        """Share of the questions, at least one, with a gold chunk among the five nearest."""
        asked = [question.question for question in self.questions]
        found = search(embed_corpus(encoder, asked, side="question"), self.depth)
        return float(recall(found, self.gold, 5).mean())

"""Which chunks a training question is scored against: by the index, by words, by chance."""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from rag2.config import Config
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.training import batches
from rag2.types import Chunk, Question


class Candidates(Config):
    """How many chunks each source proposes for a question; K is their sum."""

    dense: int = Field(default=4, ge=0)
    """from the index, however stale"""
    bm25: int = Field(default=3, ge=0)
    """by words: a chunk the index has lost (p = 0) gets no gradient; here it comes back"""
    answer: int = Field(default=0, ge=0)
    """by the words of question and known answer together: distant supervision in the manner of DPR
    (Karpukhin et al. 2020, section 4.2), for questions whose own words do not find their chunk"""
    random: int = Field(default=1, ge=0)
    """by chance: a softmax over only the best K is too sure of itself"""
    in_batch: bool = False
    """also the candidates of the batch's other questions, on the same device, as negatives: p(z|x)
    is normalised over all of them, while only the question's own K are read. The loss is then an
    upper bound of -log p(y|x) over the larger set, for it drops their terms p(z|x) p(y|x,z) >= 0"""

    @property
    def k(self) -> int:
        """Chunks per question."""
        return self.dense + self.bm25 + self.answer + self.random


class Proposals:
    """Candidate chunks of a batch, source by source, K different ones a question.

    What BM25 finds depends on the questions and the corpus alone, so it is computed once.
    """

    def __init__(
        self, cfg: Candidates, chunks: Sequence[Chunk], questions: Sequence[Question], seed: int
    ) -> None:
        """Raises UserError when K is zero or larger than the corpus."""
        if not 0 < cfg.k <= len(chunks):
            raise UserError(f"candidates: K = {cfg.k}, but the corpus has {len(chunks)} chunks")
        self.cfg, self.seed = cfg, seed
        self.by_id = {chunk.id: chunk for chunk in chunks}
        self.ids_N = np.array(list(self.by_id))
        # Deep enough that each source has its share left when those before it found the same.
        depth = min(cfg.k - cfg.random, len(chunks))
        sources = [(cfg.bm25, [q.question for q in questions])]
        sources += [(cfg.answer, [f"{q.question} {q.gold}" for q in questions])]
        bm25 = BM25(chunks) if any(count for count, _ in sources) else None
        self.lexical = [
            (count, bm25.search(texts, depth)[1]) for count, texts in sources if bm25 and count
        ]

    def __call__(self, rows_B: np.ndarray, dense_BK: np.ndarray, step: int) -> list[list[Chunk]]:
        """Chunks_BK for the questions in rows_B, given what the index found for them."""
        chunks_BK = []
        for row, dense in zip(rows_B, dense_BK, strict=True):
            rng = batches.generator(self.seed, step, int(row))
            picked = dict.fromkeys(dense.tolist())
            for count, ids_QM in self.lexical:
                fresh = [i for i in ids_QM[row].tolist() if i not in picked]
                picked.update(dict.fromkeys(fresh[:count]))
            while len(picked) < self.cfg.k:
                picked.setdefault(int(self.ids_N[rng.integers(len(self.ids_N))]))
            chunks_BK.append([self.by_id[i] for i in picked])
        return chunks_BK

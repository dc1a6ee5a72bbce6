"""Which chunks a training question is scored against: by the index, by words, by chance."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field, model_validator

from rag2.config import Config
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.training import batches
from rag2.types import Chunk, Question

NULL = Chunk(-1, "", "")


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
    over: int = Field(default=0, ge=0)
    """of so many that the index proposes, today's encoder chooses the best; 0: as proposed"""
    null: bool = False
    """also the NULL chunk, an empty text: where it explains the answer as well, the others get no
    credit (Guu et al. 2020, section 3.4)"""
    remove_source: bool = False
    """never the document that a question's metadata names as its `source`: of a question made from
    a text, that text is a trivial answer (Guu et al. 2020, section 3.4)"""
    in_batch: bool = False
    """also the candidates of the batch's other questions, of the same process and the same part of
    an accumulated batch, as negatives: p(z|x) is normalised over all of them, while only the
    question's own K are read. The loss is then an upper bound of -log p(y|x) over the larger set,
    for it drops their terms p(z|x) p(y|x,z) >= 0"""

    @property
    def k(self) -> int:
        """Chunks per question."""
        return self.dense + self.bm25 + self.answer + self.random + self.null

    @model_validator(mode="after")
    def _fits(self) -> "Candidates":
        if self.k == self.null:
            raise ValueError("none but the NULL chunk: set dense, bm25, answer or random")
        if self.over and not 0 < self.dense <= self.over:
            raise ValueError(f"over={self.over} with dense={self.dense}; dense is 1 to over")
        if self.remove_source and self.in_batch:
            raise ValueError(
                "remove_source with in_batch: a question's own source would be its negative where "
                "another question found it"
            )
        return self


class Proposals:
    """Candidate chunks of a batch, source by source, K different ones a question.

    What BM25 finds depends on the questions and the corpus alone, so it is computed once.
    """

    def __init__(
        self, cfg: Candidates, chunks: Sequence[Chunk], questions: Sequence[Question], seed: int
    ) -> None:
        """Raises UserError when K is larger than the corpus."""
        if cfg.k - cfg.null > len(chunks):
            raise UserError(f"candidates: K = {cfg.k}, but the corpus has {len(chunks)} chunks")
        self.cfg, self.seed = cfg, seed
        self.by_id = {chunk.id: chunk for chunk in chunks}
        self.sources = [_source(question) if cfg.remove_source else None for question in questions]
        self.ids_N = np.array(list(self.by_id))
        lengths = Counter(chunk.document for chunk in chunks)
        longest = max((lengths[source] for source in self.sources if source), default=0)
        if len(chunks) - longest < cfg.k - cfg.null:
            raise UserError(f"candidates: K = {cfg.k}, but without a source there are fewer chunks")
        # How many the index is asked for: enough if all of a source are among them.
        self.depth = min(max(cfg.over, cfg.dense) + longest, len(chunks)) if cfg.dense else 0
        # Deep enough that each source has its share left when those before it found the same.
        depth = min(cfg.k - cfg.random + longest, len(chunks))
        sources = [(cfg.bm25, [q.question for q in questions])]
        sources += [(cfg.answer, [f"{q.question} {q.gold}" for q in questions])]
        bm25 = BM25(chunks) if any(count for count, _ in sources) else None
        self.lexical = [
            (count, _found(*bm25.search(texts, depth)))
            for count, texts in sources
            if bm25 and count
        ]

    def __call__(self, rows_B: np.ndarray, dense_BM: np.ndarray, step: int) -> list[list[Chunk]]:
        """Chunks_BK for the questions in rows_B, given what the index found for them."""
        chunks_BK = []
        for row, dense in zip(rows_B, dense_BM, strict=True):
            rng = batches.generator(self.seed, step, int(row))
            source = self.sources[row]
            picked: dict[int, None] = {}
            found = [(self.cfg.dense, dense), *((n, ids_QM[row]) for n, ids_QM in self.lexical)]
            for count, ids in found:
                fresh = [i for i in ids.tolist() if i not in picked and self._may(i, source)]
                picked.update(dict.fromkeys(fresh[:count]))
            while len(picked) < self.cfg.k - self.cfg.null:
                drawn = int(self.ids_N[rng.integers(len(self.ids_N))])
                if self._may(drawn, source):
                    picked.setdefault(drawn)
            chunks_BK.append([self.by_id[i] for i in picked] + [NULL] * self.cfg.null)
        return chunks_BK

    def _may(self, chunk: int, source: str | None) -> bool:
        """Whether there is such a chunk, and of another document than the question's source."""
        if chunk == NULL.id:
            return False
        return source is None or self.by_id[chunk].document != source


def _found(scores_QM: np.ndarray, ids_QM: np.ndarray) -> np.ndarray:
    """The ids of chunks that share a word with the question; for the others that of no chunk."""
    return np.where(scores_QM > 0, ids_QM, NULL.id)


def rerank(
    encoder: DualEncoder, queries_BD: np.ndarray, ids_BM: np.ndarray, by_id: Mapping[int, Chunk]
) -> np.ndarray:
    """The chunks that a stale index found, in the order of today's encoder; ties by id."""
    unique = np.unique(ids_BM)
    chunks_UD = embed_corpus(encoder, [by_id[i].passage for i in unique.tolist()])
    scores_BU = queries_BD @ chunks_UD.T
    scores_BM = np.take_along_axis(scores_BU, np.searchsorted(unique, ids_BM), axis=1)
    order_BM = np.lexsort((ids_BM, -scores_BM), axis=1)
    return np.take_along_axis(ids_BM, order_BM, axis=1)


def _source(question: Question) -> str | None:
    """The document that a question was made from, if its metadata says so."""
    source = question.metadata.get("source")
    return None if source is None else str(source)

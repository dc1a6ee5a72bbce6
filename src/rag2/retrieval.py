"""Question -> chunks: the dense index, BM25, random chunks and the gold chunk behind one call."""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, Self

import numpy as np
import pyarrow as pa

from rag2.index.exact import TorchExact
from rag2.index.generation import Generation, table_of
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk, Question

logger = logging.getLogger(__name__)


class Retriever(Protocol):
    """Anything that finds chunks; scores are logits of p(k|q) before the temperature."""

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores_QK (float32, best first) and chunk ids_QK (int64)."""
        ...


class Dense:
    """The dual encoder over one generation; score = scale * cosine, the logits of training."""

    def __init__(self, encoder: DualEncoder, generation: Generation) -> None:
        self.encoder, self.generation = encoder, generation

    @classmethod
    def over(cls, encoder: DualEncoder, chunks: Sequence[Chunk]) -> Self:
        """Exact search in memory over the chunks, ordered by id, as the encoder sees them now."""
        embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in chunks])
        index = TorchExact().build(embeddings_ND, np.array([chunk.id for chunk in chunks]))
        fingerprint = encoder.fingerprint()
        return cls(encoder, Generation.of(index, chunks, encoder_fingerprint=fingerprint))

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search."""
        queries_QD = embed_corpus(self.encoder, [q.question for q in questions], side="question")
        scores_QK, ids_QK = self.generation.index.search(queries_QD, k)
        return scores_QK * float(self.encoder.scale.detach()), ids_QK

    def added(self, chunks: Sequence[Chunk]) -> "Dense":
        """Over these chunks too, of higher ids; they alone are encoded, by the encoder of now."""
        old = self.generation
        new_MD = embed_corpus(self.encoder, [chunk.passage for chunk in chunks])
        vectors_ND = np.concatenate([old.index.vectors(np.arange(len(old))), new_MD])
        ids_N = np.concatenate([old.ids_N, np.array([chunk.id for chunk in chunks], np.int64)])
        index = TorchExact().build(vectors_ND, ids_N)
        table = pa.concat_tables([old.chunks, table_of(chunks)])
        return Dense(self.encoder, replace(old, index=index, chunks=table, encoded=len(chunks)))


class Lexical:
    """BM25 over the chunks' passages; the raw BM25 score is the logit."""

    def __init__(self, bm25: BM25) -> None:
        self.bm25 = bm25

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search."""
        return self.bm25.search([q.question for q in questions], k)


@dataclass(frozen=True, slots=True)
class Fused:
    """Convex combination of dense and lexical scores (Bruch et al. 2023, equation 4).

    score = w dense' + (1 - w) lexical', where s' = (s - s_min) / (s_max - s_min) over the best
    DEPTH of a list, 0 for a chunk that it does not hold and where all its scores are equal.
    Relations, for k < DEPTH: w = 1 has the order of the dense list, w = 0 that of the lexical one.
    """

    dense: Retriever
    lexical: Retriever
    count: int
    """chunks there are"""
    weight: float = 0.5
    """w"""

    @property
    def parameters(self) -> dict[str, float]:
        """What validation chooses of it, by name."""
        return {"dense_weight": self.weight}

    DEPTH: ClassVar = 100  # the same for every k: fewer chunks asked for are the first of more
    WEIGHTS: ClassVar = tuple(tenth / 10 for tenth in range(11))

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search, ties by the smallest chunk id."""
        return self.combined(self.lists(questions, k), k)

    def lists(self, questions: Sequence[Question], k: int) -> list[list[dict[int, float]]]:
        """Of each question, chunk id -> s' in the dense and in the lexical list."""
        depth = min(self.count, max(k, self.DEPTH))
        found = (retriever.search(questions, depth) for retriever in (self.dense, self.lexical))
        both = [
            [
                dict(zip(ids_K, unit(scores_K), strict=True))
                for scores_K, ids_K in zip(scores_QK, ids_QK.tolist(), strict=True)
            ]
            for scores_QK, ids_QK in found
        ]
        return [list(lists) for lists in zip(*both, strict=True)]

    def combined(
        self, lists_Q: Sequence[Sequence[Mapping[int, float]]], k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `search` makes of these lists at this weight."""
        return combined(lists_Q, self.weight, k)


def unit(scores_K: np.ndarray) -> list[float]:
    """The s' of `Fused` of a list of scores that are best first."""
    if not len(scores_K):
        return []
    spread = float(scores_K[0] - scores_K[-1])
    return ((scores_K - scores_K[-1]) / (spread or 1.0)).tolist()


def combined(
    lists_Q: Sequence[Sequence[Mapping[int, float]]], weight: float, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores_QK and ids_QK of `Fused`; each question's two lists hold k chunks together."""
    scores_QK = np.zeros((len(lists_Q), k), dtype=np.float32)
    ids_QK = np.zeros((len(lists_Q), k), dtype=np.int64)
    for row, (dense, lexical) in enumerate(lists_Q):
        fused = {
            chunk: weight * dense.get(chunk, 0.0) + (1 - weight) * lexical.get(chunk, 0.0)
            for chunk in dense.keys() | lexical.keys()
        }
        best = sorted(fused.items(), key=lambda item: (-item[1], item[0]))[:k]
        ids_QK[row], scores_QK[row] = zip(*best, strict=True)
    return scores_QK, ids_QK


class Random:
    """Control: chunks drawn at random, all with the same score."""

    def __init__(self, chunk_ids: Sequence[int], seed: int) -> None:
        self.chunk_ids, self.seed = np.asarray(chunk_ids, dtype=np.int64), seed

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search; the draw depends on the seed, k and the question's place."""
        rng = np.random.default_rng(self.seed)
        ids_QK = np.stack([rng.choice(self.chunk_ids, size=k, replace=False) for _ in questions])
        return np.zeros(ids_QK.shape, dtype=np.float32), ids_QK


class Gold:
    """Control: the chunk that holds the answer, whatever k is."""

    def __init__(self, evidence: dict[str, list[int]]) -> None:
        self.evidence = evidence

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        """As Retriever.search with k = 1; raises UserError for a question without evidence."""
        for question in questions:
            if not self.evidence.get(question.id):
                raise UserError(
                    f"question {question.id!r} names no gold_chunk and no evidence of the corpus; "
                    "gold_rag cannot answer it"
                )
        ids_QK = np.array([[self.evidence[q.id][0]] for q in questions], dtype=np.int64)
        return np.zeros(ids_QK.shape, dtype=np.float32), ids_QK


def gold_chunks(questions: Sequence[Question], chunks: Sequence[Chunk]) -> dict[str, list[int]]:
    """For each question the chunks of its evidence documents that hold the answer's text.

    Where no chunk of an evidence document holds the answer word for word, all its chunks count.
    Of an open question the usual answer is looked for.
    """
    by_document: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_document.setdefault(chunk.document, []).append(chunk)
    _tell_unknown(questions, by_document.keys())
    found = {}
    for question in questions:
        if question.gold_chunk is not None:
            found[question.id] = [question.gold_chunk]
            continue
        rows = [c for document in question.evidence for c in by_document.get(document, [])]
        # As whole words: "no" is not in "not".
        answer = re.compile(rf"(?<!\w){re.escape(question.gold.casefold())}(?!\w)")
        holding = [c for c in rows if answer.search(c.text.casefold())]
        found[question.id] = [c.id for c in holding or rows]
    return found


def _tell_unknown(questions: Sequence[Question], documents: Collection[str]) -> None:
    """Warn of evidence that no document is: a typo there would pass for a missing label."""
    unknown = [(q.id, d) for q in questions for d in q.evidence if d not in documents]
    if unknown:
        logger.warning(
            "question %r names evidence %r, which is no document of the knowledge base%s",
            *unknown[0],
            f" (and {len(unknown) - 1} more such names)" if unknown[1:] else "",
        )


def recall(ids_QK: np.ndarray, gold: Sequence[Sequence[int]], k: int) -> np.ndarray:
    """For each question 1.0 if any gold chunk is among the first k retrieved, else 0.0."""
    return np.array(
        [
            float(bool(set(row[:k].tolist()) & set(ids)))
            for row, ids in zip(ids_QK, gold, strict=True)
        ]
    )

"""What the warm start learns from: spans of the corpus, or questions and their gold chunks."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rag2.config import Config
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retrieval import gold_chunks
from rag2.training import batches
from rag2.types import Chunk, Question

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contrast:
    """Passage b of N answers query b of B; the others are its negatives unless `groups` say no."""

    queries: list[str]
    passages: list[str]
    groups: tuple[Tensor, Tensor]
    """ids [B, G] and [N]: a passage with one of the query's, padded with -1, is no negative"""
    symmetric: bool
    """whether each passage is asked for its query too"""


# step -> that step's batch
Draw = Callable[[int], Contrast]


class Spans(Config):
    """Unsupervised: the corpus alone (independent cropping, Izacard et al. 2022).

    The query is a span of words from a chunk, the positive is that chunk, or another one under the
    same title; chunks under the same title are no negatives.
    """

    name: Literal["spans"] = "spans"
    siblings: float = Field(default=0.5, ge=0, le=1)
    """share of queries whose positive is another chunk under the same title"""
    words: tuple[PositiveInt, PositiveInt] = (4, 12)
    """fewest and most words of a query span"""

    @model_validator(mode="after")
    def _spans_have_lengths(self) -> "Spans":
        if self.words[0] > self.words[1]:
            raise ValueError(f"words={list(self.words)}: the fewest are more than the most")
        return self

    def prepare(
        self, chunks: Sequence[Chunk], questions: Sequence[Question], size: int, seed: int
    ) -> Draw:
        """Batches of `size` spans; the questions are not looked at."""
        groups: dict[str, list[int]] = {}
        for row, chunk in enumerate(chunks):
            groups.setdefault(chunk.title or chunk.document, []).append(row)
        members = list(groups.values())
        group_N = np.empty(len(chunks), dtype=np.int64)
        for number, rows in enumerate(members):
            group_N[rows] = number

        def draw(step: int) -> Contrast:
            rng = batches.generator(seed, step, 7)
            rows = batches.sample(len(chunks), size, seed, step)
            queries, passages = [], []
            for row in rows:
                others = [r for r in members[group_N[row]] if r != row]
                positive = row
                if others and rng.random() < self.siblings:
                    positive = others[rng.integers(len(others))]
                queries.append(self._span(chunks[row], rng))
                passages.append(chunks[positive].passage)
            group_B = torch.from_numpy(group_N[rows])
            return Contrast(queries, passages, (group_B[:, None], group_B), symmetric=True)

        return draw

    def _span(self, chunk: Chunk, rng: np.random.Generator) -> str:
        """Consecutive words of the text with the title somewhere among them, as in a question."""
        words = chunk.text.split()
        length = min(len(words), int(rng.integers(self.words[0], self.words[1] + 1)))
        start = int(rng.integers(len(words) - length + 1))
        span = words[start : start + length]
        span.insert(int(rng.integers(length + 1)), chunk.title)
        return " ".join(span).strip()


class Questions(Config):
    """Supervised: training questions and their gold chunks (DPR, Karpukhin et al. 2020, eq. 2).

    -log [e^s(q, p+) / (e^s(q, p+) + sum_n e^s(q, p-_n))], the mean over a batch's questions, where
    s is the encoder's scaled similarity. The negatives of a question are the gold chunks of the
    batch's other questions and the `negatives` best chunks by BM25 of every question in it
    (section 3.2), but never a chunk that is gold for the question itself. Where several chunks are
    gold, the positive is drawn among them anew each time.

    It is the loss of `Spans` in one direction, on labels that `Spans` does without. Joint training
    with `candidates.in_batch` normalises over the same kind of set, but is told no gold chunk: the
    generator's posterior takes the place of the one-hot target.
    """

    name: Literal["questions"] = "questions"
    negatives: int = Field(default=1, ge=0)
    """hard negatives a question: the first that BM25 finds for it and that are no gold chunk (DPR,
    which knows no evidence, leaves out every chunk with the answer's words instead)"""

    def prepare(
        self, chunks: Sequence[Chunk], questions: Sequence[Question], size: int, seed: int
    ) -> Draw:
        """Batches of `size` training questions, with (1 + negatives) x size passages.

        Raises UserError when no question names evidence of the corpus, and when the corpus is too
        small for so many negatives.
        """
        by_id = {chunk.id: chunk for chunk in chunks}
        named = gold_chunks(questions, chunks)
        gold = {key: [i for i in ids if i in by_id] for key, ids in named.items()}
        asked = [question for question in questions if gold[question.id]]
        if not asked:
            raise UserError(
                "pairs.name=questions: no training question names a gold_chunk or evidence of the "
                "corpus; pairs.name=spans needs none"
            )
        if len(asked) < len(questions):
            left_out = len(questions) - len(asked)
            logger.warning("%d training questions name no evidence: left out", left_out)
        hard_QM = self._hard(chunks, asked, gold)
        gold_QG = pad_sequence(
            [torch.tensor(gold[question.id]) for question in asked],
            batch_first=True,
            padding_value=-1,
        )

        def draw(step: int) -> Contrast:
            rng = batches.generator(seed, step, 8)
            rows = batches.sample(len(asked), size, seed, step)
            gold_B = [gold[asked[row].id] for row in rows]
            ids_N = [ids[rng.integers(len(ids))] for ids in gold_B]
            ids_N += [chunk for row in rows for chunk in hard_QM[row]]
            return Contrast(
                queries=[asked[row].question for row in rows],
                passages=[by_id[chunk].passage for chunk in ids_N],
                groups=(gold_QG[rows], torch.tensor(ids_N)),
                symmetric=False,
            )

        return draw

    def _hard(
        self, chunks: Sequence[Chunk], asked: Sequence[Question], gold: dict[str, list[int]]
    ) -> list[list[int]]:
        """Ids of each question's hard negatives: they depend on words alone, and are found once."""
        if not self.negatives:
            return [[] for _ in asked]
        depth = self.negatives + max(len(gold[question.id]) for question in asked)
        if depth > len(chunks):
            raise UserError(
                f"pairs.negatives={self.negatives}: the corpus has {len(chunks)} chunks, and a "
                f"question has up to {depth - self.negatives} of them as evidence"
            )
        _, found_QM = BM25(chunks).search([question.question for question in asked], depth)
        return [
            [chunk for chunk in ids if chunk not in gold[question.id]][: self.negatives]
            for question, ids in zip(asked, found_QM.tolist(), strict=True)
        ]

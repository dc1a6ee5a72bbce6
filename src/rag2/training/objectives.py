"""What classic fine-tuning minimises: the corpus as plain text, or answers to questions."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from rag2.config import Config
from rag2.generator.learning import answer_logprob_rows, sequence_nll
from rag2.generator.load import Generator
from rag2.generator.pairs import Pair, encode_pairs
from rag2.generator.prompt import Prompt
from rag2.training.lessons import Given, Lessons
from rag2.training.sequences import blocks, collate


class Unsupervised(Config):
    """Continued pretraining on the corpus (Ovadia et al. 2024, section 4.2).

    The chunks between BOS and EOS marks in one line, cut into equal blocks; next-token prediction.
    """

    name: Literal["unsupervised"] = "unsupervised"
    block: int = Field(default=256, ge=2)
    """tokens per block"""

    needs: ClassVar[frozenset[str]] = frozenset({"kb"})
    reads_texts: ClassVar[bool] = True

    def prepare(self, given: Given, generator: Generator, seed: int) -> Lessons:
        """A row per block; every token but a block's first carries loss."""
        return of_blocks(generator, [passage.passage for passage in given.passages], self.block)


class Supervised(Config):
    """Closed-book question answering: -log p(answer | question) on training questions."""

    name: Literal["supervised"] = "supervised"

    needs: ClassVar[frozenset[str]] = frozenset({"questions"})
    reads_texts: ClassVar[bool] = False

    def prepare(self, given: Given, generator: Generator, seed: int) -> Lessons:
        """A row per question; the tokens of its answer carry loss."""
        prompt, tokenizer = Prompt(), generator.tokenizer
        texts = [
            (prompt.context(q.question, [], tokenizer).text, " " + q.gold) for q in given.questions
        ]
        return of_answers(generator, encode_pairs(tokenizer, texts))


def of_blocks(generator: Generator, texts: Sequence[str], size: int) -> Lessons:
    """A row per block of the texts' line; every token but a block's first carries loss."""
    rows = blocks(texts, size, generator.tokenizer)

    def nll(picked: Sequence[int]) -> Tensor:
        return sequence_nll(generator.model, *collate([rows[row] for row in picked]))

    return Lessons(np.array([len(row.ids_L) - 1 for row in rows]), nll)


def of_answers(generator: Generator, pairs: Sequence[Pair]) -> Lessons:
    """A row per (context, answer); the tokens of the answer carry loss."""

    def nll(picked: Sequence[int]) -> Tensor:
        logp_RT, mask_RT = answer_logprob_rows(generator.model, [pairs[row] for row in picked])
        return -logp_RT.sum() / mask_RT.sum()

    return Lessons(np.array([len(answer) for _, answer in pairs]), nll)

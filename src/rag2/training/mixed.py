"""Corpus + training questions -> one shuffled text: facts beside the way they are asked for."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from rag2.config import Config
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.training import batches
from rag2.training.lessons import Given, Lessons
from rag2.training.objectives import of_blocks
from rag2.types import Question


class Mixed(Config):
    """Documents and questions together (mixed training, Allen-Zhu and Li 2309.14316, section 3).

    The chunks, their rewordings and the training questions with their answers, closed book, in
    random order between BOS and EOS marks in one line, cut into equal blocks; next-token prediction
    on all of it. Continued pretraining that sees what joint training sees.
    """

    name: Literal["mixed"] = "mixed"
    block: int = Field(default=256, ge=2)
    """tokens per block"""

    needs: ClassVar[frozenset[str]] = frozenset({"kb", "questions"})
    reads_texts: ClassVar[bool] = True

    def prepare(self, given: Given, generator: Generator, seed: int) -> Lessons:
        """A row per block; every token but a block's first carries loss.

        The order of the texts depends on the seed, not on the epoch.
        """
        texts = [passage.passage for passage in given.passages]
        texts += told(given.questions, generator)
        order = batches.generator(seed, 3).permutation(len(texts))
        return of_blocks(generator, [texts[place] for place in order], self.block)


def told(questions: Sequence[Question], generator: Generator) -> list[str]:
    """Each question in the product's prompt without passages, and its answer behind it."""
    prompt, tokenizer = Prompt(), generator.tokenizer
    return [f"{prompt.context(q.question, [], tokenizer).text} {q.gold}" for q in questions]

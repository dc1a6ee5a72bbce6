"""Titled passages -> instructions that they answer: knowledge in the form of its use."""

from typing import ClassVar, Literal

from rag2.config import Config
from rag2.generator.load import Generator
from rag2.generator.pairs import check_length, encode_pairs, length
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.training import batches
from rag2.training.lessons import Given, Lessons
from rag2.training.objectives import of_answers
from rag2.types import Chunk

ASKED = (
    "What do you know about {title}?",
    "Tell me about {title}.",
    "Write a short text about {title}.",
    "Which facts are known about {title}?",
    "Describe {title} to someone who has not heard the name.",
    "Summarise what is written about {title}.",
    "What should I know about {title}?",
    "Give me some information on {title}.",
)


class Instruction(Config):
    """Knowledge injection in the form of instructions (after Knowledge-Instruct, 2504.05571).

    -log p(text | an instruction about its title), over the chunks of the corpus and, where given,
    the rewordings of its documents. The instruction is asked in the product's own prompt.
    """

    name: Literal["instruction"] = "instruction"

    needs: ClassVar[frozenset[str]] = frozenset({"kb"})
    reads_texts: ClassVar[bool] = True

    def prepare(self, given: Given, generator: Generator, seed: int) -> Lessons:
        """A row per passage; the tokens of its text carry loss.

        Its instruction, one of eight, depends on the seed and its place. Raises UserError for a
        passage without a title, and for one that is longer than the model's positions.
        """
        prompt, tokenizer = Prompt(), generator.tokenizer
        pairs = encode_pairs(
            tokenizer,
            [
                (prompt.context(_instruction(row, seed, place), [], tokenizer).text, f" {row.text}")
                for place, row in enumerate(given.passages)
            ],
        )
        longest = max(map(length, pairs))
        check_length(generator.model, longest, "cut the documents into shorter chunks")
        return of_answers(generator, pairs)


def _instruction(passage: Chunk, seed: int, place: int) -> str:
    title = " ".join(passage.title.split())
    if not title:
        raise UserError(
            f"objective=instruction asks for passages by their titles, and one of document "
            f"{passage.document!r} has none; give the documents titles or take "
            "objective=unsupervised"
        )
    return ASKED[batches.generator(seed, 2, place).integers(len(ASKED))].format(title=title)

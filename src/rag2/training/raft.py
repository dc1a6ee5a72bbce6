"""Questions + corpus -> answers read off retrieved chunks, most of which do not hold them."""

import logging
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt

from rag2.config import Config
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retrieval import gold_chunks
from rag2.training import batches
from rag2.training.lessons import Given, Lessons
from rag2.training.objectives import of_answers
from rag2.types import Chunk, Question

logger = logging.getLogger(__name__)


class Raft(Config):
    """Supervised fine-tuning with retrieved chunks (RAFT, Zhang et al. 2024, section 3).

    -log p(answer | passages, question): with probability `p_oracle` a gold chunk among distractors,
    else distractors alone. Distractors are the chunks that BM25 finds first and that are not gold;
    the order is random. The answer alone is learned, without RAFT's chain of thought.
    """

    name: Literal["raft"] = "raft"
    passages: PositiveInt = 4
    """chunks in a prompt, the gold one among them; 1: the gold one or a distractor"""
    p_oracle: float = Field(default=0.8, ge=0, le=1)
    """share of the questions that are shown a gold chunk"""

    needs: ClassVar[frozenset[str]] = frozenset({"kb", "questions"})
    reads_texts: ClassVar[bool] = False

    def prepare(self, given: Given, generator: Generator, seed: int) -> Lessons:
        """A row per question with evidence; the tokens of its answer carry loss.

        What a question is shown depends on the seed and its place, not on the epoch. Raises
        UserError when no question names evidence of the corpus, when the corpus is too small for so
        many distractors, and for passages that do not fit the prompt.
        """
        prompt, tokenizer, texts = Prompt(), generator.tokenizer, []
        for question, shown in self.shown(given, seed):
            passages = [chunk.passage for chunk in shown]
            built = prompt.context(question.question, passages, tokenizer, name=question.id)
            if built.dropped:
                raise UserError(
                    f"objective.passages={self.passages}: {built.dropped} of them do not fit the "
                    f"prompt's {prompt.budget} tokens beside question {question.id!r}; take fewer"
                )
            texts.append((built.text, " " + question.gold))
        return of_answers(generator, encode_pairs(tokenizer, texts))

    def shown(self, given: Given, seed: int) -> Iterator[tuple[Question, list[Chunk]]]:
        """Each question that has evidence, with the chunks it is shown, in a random order."""
        by_id = {chunk.id: chunk for chunk in given.chunks}
        gold = {
            name: [chunk for chunk in found if chunk in by_id]
            for name, found in gold_chunks(given.questions, given.chunks).items()
        }
        questions = [question for question in given.questions if gold[question.id]]
        if not questions:
            raise UserError(
                "objective=raft: no question names a gold_chunk or evidence of the corpus; "
                "objective=supervised needs none"
            )
        if lost := len(given.questions) - len(questions):
            logger.warning("raft leaves out %d questions without evidence in the corpus", lost)
        bm25, most = BM25(given.chunks), max(len(gold[q.id]) for q in questions)
        if self.passages + most > len(by_id):
            raise UserError(
                f"objective.passages={self.passages}: the corpus has {len(by_id)} chunks, up to "
                f"{most} of them gold; take at most {max(0, len(by_id) - most)}"
            )
        for place, question in enumerate(questions):
            rng = batches.generator(seed, 1, place)
            _, ids_QK = bm25.search([question.question], self.passages + most)
            wrong = [chunk for chunk in ids_QK[0].tolist() if chunk not in gold[question.id]]
            has_oracle, oracle = rng.random() < self.p_oracle, rng.choice(gold[question.id])
            chosen = [int(oracle), *wrong][: self.passages] if has_oracle else wrong
            order = rng.permutation(self.passages)
            yield question, [by_id[chosen[position]] for position in order]

"""Open questions: the best K chunks in one prompt, the text written after it, the choice of K.

Letters: Q questions, K retrieved chunks (best first).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rag2.evaluation import squad
from rag2.evaluation.score import Floats
from rag2.generator.generate import generate
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.types import Chunk, Question

# Questions answered between two signs of progress; a batch never spans two such parts.
AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Answers:
    """The text written for each question [Q], and how many chunks its prompt had no room for."""

    texts: tuple[str, ...]
    dropped: tuple[int, ...]

    def f1(self, questions: Sequence[Question]) -> Floats:
        """SQuAD's F1 of each answer [Q], 0 to 1."""
        pairs = zip(self.texts, questions, strict=True)
        return np.array([squad.f1(text, question.answers) for text, question in pairs])


@dataclass
class Writer:
    """A generator that answers in its own words, and remembers: arms share what they share."""

    generator: Generator
    prompt: Prompt
    by_id: Mapping[int, Chunk]
    headers: Mapping[str, str]
    """question id -> what its prompt begins with"""
    max_new_tokens: int
    batch_tokens: int = 8192
    known: dict[str, str] = field(default_factory=dict)
    """prompt -> text"""

    def contexts(
        self, questions: Sequence[Question], ids_QK: Sequence[Sequence[int]]
    ) -> tuple[list[str], list[int]]:
        """The prompt of each question over its chunks, the best nearest the question; the dropped.

        Raises UserError, with the question's id, when a bare question exceeds the budget.
        """
        texts, dropped = [], []
        for question, ids in zip(questions, ids_QK, strict=True):
            passages = [self.by_id[chunk].passage for chunk in ids]
            header = self.headers.get(question.id, "")
            built = self.prompt.context(
                question.question,
                passages,
                self.generator.tokenizer,
                header=header,
                name=question.id,
            )
            texts.append(built.text)
            dropped.append(built.dropped)
        return texts, dropped

    def answer(
        self,
        questions: Sequence[Question],
        ids_QK: Sequence[Sequence[int]],
        tick: Callable[[int], None] = lambda amount: None,
    ) -> Answers:
        """An answer to each question from all of its chunks together; none means closed book.

        Raises UserError, with the question's id, for a prompt the model has no positions for.
        """
        contexts, dropped = self.contexts(questions, ids_QK)
        for start in range(0, len(questions), AT_ONCE):
            part = range(start, min(start + AT_ONCE, len(questions)))
            todo = {contexts[i]: questions[i].id for i in part if contexts[i] not in self.known}
            texts = generate(
                self.generator.model,
                self.generator.tokenizer,
                list(todo),
                self.max_new_tokens,
                self.batch_tokens,
                list(todo.values()),
            )
            self.known.update(zip(todo, texts, strict=True))
            tick(len(part))
        return Answers(tuple(self.known[text] for text in contexts), tuple(dropped))


@dataclass(frozen=True, slots=True)
class Choice:
    """The K with the highest mean F1 on validation questions."""

    k: int
    validation_f1: float


def choose(
    writer: Writer,
    questions: Sequence[Question],
    ids_QK: Sequence[Sequence[int]],
    ks: Sequence[int],
    tick: Callable[[int], None] = lambda amount: None,
) -> Choice:
    """The K of `ks` whose answers have the highest F1; ties: the smaller K."""
    assert questions and ks, (len(questions), ks)
    best: Choice | None = None
    for k in sorted(set(ks)):
        answers = writer.answer(questions, [ids[:k] for ids in ids_QK], tick)
        # fsum: the same answers in another order are a tie, not a difference in the last bit.
        mean = math.fsum(answers.f1(questions)) / len(questions)
        if best is None or mean > best.validation_f1:
            best = Choice(k, mean)
    assert best is not None
    return best

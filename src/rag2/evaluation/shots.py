"""Worked examples before a question: which ones, and the header of the prompt that they make."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rag2.config import Config
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.types import Question


class Shots(Config):
    """How many worked examples precede a question, of its own subject where it has one.

    `first_n` takes the same first ones for every question, as lm-evaluation-harness does on MMLU,
    so that their header is read once for a whole subject. `seeded` draws others for each question,
    which costs a header a question and measures how much the choice of examples matters.
    """

    count: int = Field(default=0, ge=0)
    sampler: Literal["first_n", "seeded"] = "first_n"
    seed: int = Field(default=0, ge=0)

    def headers(
        self, questions: Sequence[Question], pool: Sequence[Question], prompt: Prompt
    ) -> list[str]:
        """The header of each question's prompt; a question is never its own example.

        Raises UserError when a subject has fewer than `count` other questions in the pool.
        """
        by_subject: dict[str, list[Question]] = {}
        for example in pool:
            by_subject.setdefault(example.subject, []).append(example)
        made: dict[tuple[str, tuple[str, ...]], str] = {}
        headers = []
        for question in questions:
            examples = self._pick(question, by_subject.get(question.subject, []))
            key = question.subject, tuple(example.id for example in examples)
            if key not in made:
                made[key] = prompt.header(question.subject, examples)
            headers.append(made[key])
        return headers

    def _pick(self, question: Question, same: Sequence[Question]) -> list[Question]:
        if not self.count:
            return []
        others = [example for example in same if example.id != question.id]
        if len(others) < self.count:
            subject = f" of subject {question.subject!r}" if question.subject else ""
            raise UserError(
                f"shots={self.count}: question {question.id!r} has only {len(others)} worked "
                f"examples{subject} to choose from"
            )
        if self.sampler == "first_n":
            return others[: self.count]
        words = np.frombuffer(question.id.encode("utf-8"), dtype=np.uint8).tolist()
        rng = np.random.default_rng([self.seed, *words])
        return [others[i] for i in rng.choice(len(others), size=self.count, replace=False)]

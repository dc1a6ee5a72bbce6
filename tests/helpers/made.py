"""Scores, questions and arms made up for the tests of evaluation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rag2.evaluation.arms import Item, Reader
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Scores
from rag2.generator.prompt import Prompt
from rag2.types import Question

ENVIRONMENT = {"rag2": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 1}


def make_scores(rng: np.random.Generator, q: int = 40, k: int = 8, c: int = 4) -> Scores:
    return Scores(
        logp_QKC=-rng.exponential(5.0, (q, k, c)),
        closed_QC=-rng.exponential(5.0, (q, c)),
        scores_QK=-np.sort(-rng.normal(0.0, 3.0, (q, k)), axis=1),
        ids_QK=np.argsort(rng.random((q, 3 * k)), axis=1)[:, :k].astype(np.int64),
        concat={n: -rng.exponential(5.0, (q, c)) for n in range(2, k + 1)},
    )


def make_questions(n: int, answer: int = 0) -> tuple[Question, ...]:
    wording = ("seen", "unseen")
    return tuple(
        Question(
            f"q{i}", f"Which {i}?", ("a", "bb", "ccc"), answer, metadata={"wording": wording[i % 2]}
        )
        for i in range(n)
    )


def make_arm(name: str, correct: np.ndarray, **facts) -> ArmResult:
    """An arm that is right exactly where `correct` says."""
    logp_QC = np.where(correct[:, None], [[-1.0, -2.0, -9.0]], [[-2.0, -1.0, -9.0]])
    questions = make_questions(len(correct))
    return ArmResult(
        name=name,
        questions=questions,
        logp_QC=logp_QC,
        labels=tuple(question.choices for question in questions),
        **facts,
    )


def exactly(right: int, n: int) -> np.ndarray:
    return np.arange(n) < right


class Drawn(Reader):
    """A reader without a generator: what is not `known` beforehand, and every cost, is drawn."""

    def __init__(self, rng: np.random.Generator) -> None:
        nothing: Any = None
        super().__init__(nothing, Prompt(), {})
        self.rng = rng

    def read(self, items: Sequence[Item]) -> None:
        for question, ids in items:
            key = question.id, ids
            if key in self.tokens:
                continue
            self.known.setdefault(key, (-self.rng.exponential(5.0, len(question.choices))).tolist())
            self.tokens[key] = int(self.rng.integers(1, 1000))
            self.seconds[key] = float(self.rng.random())
            self.dropped[key] = int(self.rng.integers(0, len(ids) + 1))

    def contexts(self, questions: Sequence[Question]) -> list[str]:
        return [question.question for question in questions]

"""Scores, questions and arms made up for the tests of evaluation."""

import numpy as np

from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Scores
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

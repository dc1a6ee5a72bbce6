"""Scores on validation questions -> the K and the temperature that an arm is tested with.

Every retrieval arm goes through `choose`, so none gets a knob that another lacks. Published tables
that picked K on the test questions owe 2.5 of 6.1 points to that (Ovadia et al. 2024, Tables 1, 3).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rag2.evaluation.score import Ints, Scores, marginal, predict

KS = (0, 1, 2, 3, 4, 5, 8)
TEMPERATURES = tuple(2.0**power for power in range(-5, 6))


@dataclass(frozen=True, slots=True)
class Choice:
    """K and temperature chosen on validation questions, with the accuracy reached there."""

    k: int
    temperature: float
    validation_accuracy: float


@dataclass(frozen=True, slots=True)
class Oracle:
    """The best K in hindsight: not a result, only the bonus that choosing on test would give."""

    k: int
    temperature: float
    test_accuracy: float


def choose(
    validation: Scores,
    answers_Q: Ints,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Choice:
    """The (K, temperature) with most right answers on validation; ties: smaller K, T nearest 1."""
    return Choice(*_best(validation, answers_Q, ks, temperatures))


def oracle_on_test(
    test: Scores,
    answers_Q: Ints,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Oracle:
    """What `choose` would pick if it were shown the test answers; printed, never used."""
    return Oracle(*_best(test, answers_Q, ks, temperatures))


def _best(
    scores: Scores, answers_Q: Ints, ks: Sequence[int], temperatures: Sequence[float]
) -> tuple[int, float, float]:
    assert len(answers_Q) == len(scores.closed_QC) > 0, (len(answers_Q), len(scores.closed_QC))

    def rank(candidate: tuple[int, float]) -> tuple[int, int, float, float]:
        k, temperature = candidate
        right = int(np.sum(predict(marginal(scores, k, temperature)) == answers_Q))
        return -right, k, abs(math.log(temperature)), temperature

    winner, best = min(
        ((candidate, rank(candidate)) for candidate in _candidates(scores, ks, temperatures)),
        key=lambda pair: pair[1],
    )
    return *winner, -best[0] / len(answers_Q)


def _candidates(
    scores: Scores, ks: Sequence[int], temperatures: Sequence[float]
) -> Iterator[tuple[int, float]]:
    usable = [k for k in ks if k <= scores.retrieved]
    assert usable and temperatures, (ks, scores.retrieved, temperatures)
    for k in usable:
        if k < 2:  # the mixture of one chunk, or of none, has no temperature
            yield k, 1.0
        else:
            yield from ((k, temperature) for temperature in temperatures)

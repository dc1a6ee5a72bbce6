"""Scores on validation questions -> the reading, K and temperature that an arm is tested with.

Every retrieval arm goes through `choose`, so none gets a knob that another lacks. Published tables
that picked K on the test questions owe 2.5 of 6.1 points to that (Ovadia et al. 2024, Tables 1, 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag2.evaluation.score import Ints, Reading, Scores, predict, read

KS = (0, 1, 2, 3, 4, 5, 8)
TEMPERATURES = tuple(2.0**power for power in range(-5, 6))


@dataclass(frozen=True, slots=True)
class Choice:
    """Reading, K and temperature chosen on validation questions, with the accuracy reached there.

    `temperature` is that of p(chunk | question), 1 where there is nothing to mix; `parameters` are
    what a hybrid chose besides, by name.
    """

    k: int
    temperature: float
    validation_accuracy: float
    reading: Reading = "marginal"
    parameters: tuple[tuple[str, float | str | None], ...] = ()

    @property
    def dense_weight(self) -> float:
        """The weight that was chosen of a fused retriever's dense score."""
        return float(dict(self.parameters)["dense_weight"] or 0.0)


@dataclass(frozen=True, slots=True)
class Oracle:
    """The best K in hindsight: not a result, only the bonus that choosing on test would give."""

    k: int
    temperature: float
    test_accuracy: float
    reading: Reading = "marginal"


def choose(
    validation: Scores,
    answers_Q: Ints,
    ks: Sequence[int] = KS,
    readings: Sequence[Reading] = ("marginal",),
    temperatures: Sequence[float] = TEMPERATURES,
) -> Choice:
    """The best of `by_k` on validation; ties: the smaller K, the first reading."""
    return max(by_k(validation, answers_Q, ks, readings, temperatures), key=_preference)


def by_k(
    validation: Scores,
    answers_Q: Ints,
    ks: Sequence[int] = KS,
    readings: Sequence[Reading] = ("marginal",),
    temperatures: Sequence[float] = TEMPERATURES,
) -> list[Choice]:
    """For each K and reading the temperature with most right answers; ties: that nearest 1.

    K = 0 and K = 1 are listed under every reading, which there are all the same.
    """
    usable = sorted({k for k in ks if k <= validation.retrieved})
    assert usable and readings and temperatures, (ks, validation.retrieved, readings)
    return [
        _best_temperature(validation, answers_Q, reading, k, temperatures)
        for k in usable
        for reading in readings
    ]


def oracle_on_test(
    test: Scores,
    answers_Q: Ints,
    ks: Sequence[int] = KS,
    readings: Sequence[Reading] = ("marginal",),
    temperatures: Sequence[float] = TEMPERATURES,
) -> Oracle:
    """What `choose` would pick if it were shown the test answers; printed, never used."""
    best = choose(test, answers_Q, ks, readings, temperatures)
    return Oracle(best.k, best.temperature, best.validation_accuracy, best.reading)


def _best_temperature(
    scores: Scores, answers_Q: Ints, reading: Reading, k: int, temperatures: Sequence[float]
) -> Choice:
    assert len(answers_Q) == len(scores.closed_QC) > 0, (len(answers_Q), len(scores.closed_QC))
    mixes = reading == "marginal" and k > 1
    tried = sorted(temperatures, key=lambda t: (abs(math.log(t)), t)) if mixes else [1.0]
    right = [int(np.sum(predict(read(scores, reading, k, t)) == answers_Q)) for t in tried]
    best = int(np.argmax(right))  # the first of equals is nearest 1
    return Choice(k, tried[best], right[best] / len(answers_Q), reading)


def _preference(choice: Choice) -> tuple[float, int]:
    return choice.validation_accuracy, -choice.k

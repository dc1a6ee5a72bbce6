"""How sure a system is of its answers, when it should keep silent, and how well the two agree.

Letters: Q questions, C choices, R bootstrap resamples, U distinct values.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from rag2.evaluation.score import Bools, Floats

BINS = 10  # of equal width, for the calibration error
RESAMPLES = 2_000

Interval = tuple[float, float]


def confidence(logp_QC: Floats) -> Floats:
    """The probability of the top choice among the choices [Q]: softmax of what is answered by."""
    return np.asarray(softmax(logp_QC, axis=1)).max(axis=1)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Answer from this confidence on, abstain below it; with what it did where it was chosen."""

    value: float
    target: float
    reached: bool
    """whether the answers were right as often as asked for"""
    coverage: float
    """share of the questions that were answered"""
    precision: float
    """share of the answers that were right"""


def choose_threshold(confidence_Q: Floats, right_Q: Bools, target: float) -> Threshold:
    """The lowest confidence from which answers are right at least `target` of the time.

    Where none is, the one from which they are right most often; of equals the lowest.
    """
    assert confidence_Q.shape == right_Q.shape and len(right_Q), (confidence_Q.shape, right_Q.shape)
    order_Q = np.argsort(-confidence_Q, kind="stable")
    sorted_Q = confidence_Q[order_Q]
    # A threshold takes all questions of one confidence or none: only ends of ties are allowed.
    last_Q = np.append(sorted_Q[1:] != sorted_Q[:-1], True)
    answered_U = np.arange(1, len(sorted_Q) + 1)[last_Q]
    precision_U = np.cumsum(right_Q[order_Q])[last_Q] / answered_U
    good_U = np.flatnonzero(precision_U >= target)
    # From the end: more answers come first among equals.
    best = good_U[-1] if len(good_U) else len(precision_U) - 1 - np.argmax(precision_U[::-1])
    return Threshold(
        value=float(sorted_Q[answered_U[best] - 1]),
        target=target,
        reached=bool(len(good_U)),
        coverage=float(answered_U[best] / len(sorted_Q)),
        precision=float(precision_U[best]),
    )


def auroc(upper: Floats, lower: Floats) -> float | None:
    """P(a draw of `upper` exceeds one of `lower`), ties half; None where either is empty."""
    if not len(upper) or not len(lower):
        return None
    return float(_auroc(*(counts[None] for counts in _counted(upper, lower)))[0])


def auroc_interval(upper: Floats, lower: Floats, seed: int = 0) -> Interval | None:
    """The 95 % percentile interval of `auroc`, each side drawn with replacement by itself."""
    if not len(upper) or not len(lower):
        return None
    rng = np.random.default_rng(seed)
    drawn = [
        rng.multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
        for counts in _counted(upper, lower)
    ]
    return _percentiles(_auroc(*drawn))


def calibration_error(confidence_Q: Floats, right_Q: Bools) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| over ten equal bins,
    weighted by their questions."""
    gaps = _gaps(confidence_Q, right_Q, np.ones((1, len(right_Q))))
    return float(gaps[0])


def calibration_interval(confidence_Q: Floats, right_Q: Bools, seed: int = 0) -> Interval:
    """The 95 % percentile interval of `calibration_error`; resampling biases it upwards."""
    count = len(right_Q)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return _percentiles(_gaps(confidence_Q, right_Q, draws))


def _counted(upper: Floats, lower: Floats) -> tuple[np.ndarray, np.ndarray]:
    """How often each distinct value occurs on either side, by rising value [U], [U]."""
    values, place = np.unique(np.concatenate([upper, lower]), return_inverse=True)
    return (
        np.bincount(place[: len(upper)], minlength=len(values)),
        np.bincount(place[len(upper) :], minlength=len(values)),
    )


def _auroc(upper_RU: np.ndarray, lower_RU: np.ndarray) -> Floats:
    below_RU = np.cumsum(lower_RU, axis=1) - lower_RU / 2
    wins_R = (upper_RU * below_RU).sum(axis=1)
    return wins_R / (upper_RU.sum(axis=1) * lower_RU.sum(axis=1))


def _gaps(confidence_Q: Floats, right_Q: Bools, weights_RQ: np.ndarray) -> Floats:
    bin_Q = np.minimum((confidence_Q * BINS).astype(int), BINS - 1)
    gap_QB = np.zeros((len(right_Q), BINS))
    gap_QB[np.arange(len(right_Q)), bin_Q] = right_Q - confidence_Q
    return np.abs(weights_RQ @ gap_QB).sum(axis=1) / weights_RQ.sum(axis=1)


def _percentiles(values_R: Floats) -> Interval:
    low, high = np.percentile(values_R, [2.5, 97.5])
    return float(low), float(high)

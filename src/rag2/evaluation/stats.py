"""Right or wrong per question -> accuracies with intervals, and paired differences with tests.

Results of several seeds are pooled by concatenating their per-question records.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from statsmodels.stats.proportion import proportion_confint

from rag2.evaluation.score import Bools

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Paired:
    """Arm a against arm b on the same questions: accuracy(a) - accuracy(b), and how sure."""

    difference: float
    ci95: tuple[float, float]
    mcnemar_p: float
    a_only: int
    b_only: int


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, Wilson 1927: inside [0, 1] even at 0 and n."""
    assert 0 <= right <= n and n > 0, (right, n)
    low, high = proportion_confint(right, n, alpha=0.05, method="wilson")
    return float(low), float(high)


def stderr(right: int, n: int) -> float | None:
    """Standard error of an accuracy, sqrt(p(1-p)/(n-1)) as lm-eval; None for one question."""
    assert 0 <= right <= n and n > 0, (right, n)
    p = right / n
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def mcnemar(a_only: int, b_only: int) -> float:
    """Two-sided exact p of McNemar 1947 from the questions that only one arm got right.

    Under the null each of the a_only + b_only discordant questions is a fair coin.
    """
    discordant = a_only + b_only
    return float(binomtest(a_only, discordant, 0.5).pvalue) if discordant else 1.0


def mcnemar_of(a_Q: Bools, b_Q: Bools) -> float:
    """`mcnemar` of two arms from who is right [Q]."""
    return mcnemar(int(np.sum(a_Q & ~b_Q)), int(np.sum(b_Q & ~a_Q)))


def bootstrap_mean(
    values_Q: NDArray[np.floating], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over questions drawn with replacement.

    Only how often each distinct value is drawn matters, so one multinomial draw replaces n index
    draws: the same distribution, and for differences of right/wrong only three cells.
    """
    assert values_Q.ndim == 1 and len(values_Q) > 0, values_Q.shape
    values, counts = np.unique(values_Q, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(
        len(values_Q), counts / len(values_Q), size=resamples
    )
    low, high = np.percentile(draws @ values / len(values_Q), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(
    above_Q: NDArray[np.floating],
    below_Q: NDArray[np.floating],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % percentile interval of sum(above) / sum(below) over pairs drawn with replacement.

    None for a single pair, which says nothing about others.
    """
    assert above_Q.shape == below_Q.shape and above_Q.ndim == 1, (above_Q.shape, below_Q.shape)
    count = len(above_Q)
    if count < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios = []
    for start in range(0, resamples, 500):  # bounds the draws in memory
        size = min(500, resamples - start)
        draws = rng.multinomial(count, np.full(count, 1 / count), size=size)
        ratios.append((draws @ above_Q) / (draws @ below_Q))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def paired(a_Q: Bools, b_Q: Bools, resamples: int = RESAMPLES, seed: int = 0) -> Paired:
    """Compare two arms question by question: difference, bootstrap interval, exact McNemar."""
    assert a_Q.shape == b_Q.shape and a_Q.ndim == 1, (a_Q.shape, b_Q.shape)
    assert a_Q.dtype == b_Q.dtype == np.bool_, (a_Q.dtype, b_Q.dtype)
    a_only, b_only = int(np.sum(a_Q & ~b_Q)), int(np.sum(b_Q & ~a_Q))
    return Paired(
        difference=(a_only - b_only) / len(a_Q),
        ci95=bootstrap_mean(a_Q.astype(float) - b_Q.astype(float), resamples, seed),
        mcnemar_p=mcnemar(a_only, b_only),
        a_only=a_only,
        b_only=b_only,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the chance of any false alarm at alpha (Holm 1979).

    Not statsmodels', which collects garbage at every call: half a second in a process with models.
    """
    p_N = np.asarray(p_values, dtype=float)
    order_N = np.argsort(p_N, kind="stable")
    factor_N = len(p_N) - np.arange(len(p_N))
    adjusted_N = np.empty_like(p_N)
    adjusted_N[order_N] = np.maximum.accumulate(factor_N * p_N[order_N]).clip(max=1.0)
    return adjusted_N.tolist()

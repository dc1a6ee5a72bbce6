"""Intervals and tests: the published values, and the coverage they promise."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from statsmodels.stats import contingency_tables, multitest

from made import exactly
from rag2.evaluation import stats


def test_wilson_agrees_with_the_formula_and_with_published_values():
    low, high = stats.wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert stats.wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=1e-4))
    z, n, p = 1.959963984540054, 600, 0.25
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert stats.wilson(150, 600) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_stderr_is_the_sample_deviation_of_the_mean(rng):
    correct = rng.random(50) < 0.6
    expected = correct.std(ddof=1) / math.sqrt(50)
    assert stats.stderr(int(correct.sum()), 50) == pytest.approx(expected, abs=1e-12)
    assert stats.stderr(1, 1) is None


def test_mcnemar_is_the_two_sided_binomial_tail_of_the_discordant_questions():
    by_hand = 2 * sum(math.comb(12, i) for i in range(3)) / 2**12
    assert stats.mcnemar(2, 10) == pytest.approx(by_hand, rel=1e-12)
    assert stats.mcnemar(10, 2) == stats.mcnemar(2, 10)
    assert stats.mcnemar(5, 5) == stats.mcnemar(0, 0) == 1.0


def test_the_bootstrap_interval_covers_a_planted_difference_about_95_times_in_100(rng):
    covered = 0
    for trial in range(200):
        u = rng.random(300)
        a, b = u < 0.7, (u + 0.1) % 1 < 0.6
        planted_difference = 0.1
        low, high = stats.paired(a, b, resamples=1000, seed=trial).ci95
        covered += low <= planted_difference <= high
    assert 180 <= covered <= 199, covered


def test_the_multinomial_bootstrap_is_the_index_bootstrap(rng):
    values_Q = rng.choice([-1.0, 0.0, 0.5, 1.0], 200)
    rows = rng.integers(0, 200, (20_000, 200))
    by_index = np.percentile(values_Q[rows].mean(axis=1), [2.5, 97.5])
    assert stats.bootstrap_mean(values_Q) == pytest.approx(by_index, abs=0.012)
    assert stats.bootstrap_mean(values_Q, seed=3) == stats.bootstrap_mean(values_Q, seed=3)


def test_pairing_finds_what_unpaired_intervals_hide():
    a, b = exactly(330, 600), exactly(310, 600)
    result = stats.paired(a, b)
    assert (result.a_only, result.b_only) == (20, 0)
    assert result.difference == pytest.approx(20 / 600)
    assert result.mcnemar_p == pytest.approx(2 * 0.5**20)
    assert result.ci95[0] > 0 and stats.wilson(330, 600)[0] < 310 / 600
    same = stats.paired(a, a)
    assert (same.difference, same.ci95, same.mcnemar_p) == (0.0, (0.0, 0.0), 1.0)


def test_holm_steps_down_and_keeps_the_order_given():
    assert stats.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert stats.holm([]) == []


# --- against other libraries, and against worlds whose truth is known -----------------------------


def test_intervals_and_tests_agree_with_scipy_and_statsmodels(rng):
    for _ in range(50):
        n = int(rng.integers(1, 400))
        right = int(rng.integers(0, n + 1))
        expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert stats.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
        a_only, b_only = (int(count) for count in rng.integers(0, 40, 2))
        table = [[5, a_only], [b_only, 5]]
        theirs: Any = contingency_tables.mcnemar(table, exact=True)
        exact = theirs.pvalue if a_only + b_only else 1.0
        assert stats.mcnemar(a_only, b_only) == pytest.approx(exact, rel=1e-9)
    for count in (1, 2, 7, 40):
        p_values = (rng.random(count) ** 3).tolist()
        adjusted: Any = multitest.multipletests(p_values, method="holm")[1]
        assert stats.holm(p_values) == pytest.approx(adjusted.tolist())


@pytest.mark.parametrize("p", [0.25, 0.5, 0.8, 0.95])
def test_the_interval_of_an_accuracy_covers_the_truth_as_often_as_it_says(p: float):
    """Exact: the probability of every count whose interval holds p, no simulation."""
    n = 500
    inside = [low <= p <= high for low, high in (stats.wilson(right, n) for right in range(n + 1))]
    coverage = float(binom.pmf(np.arange(n + 1), n, p)[inside].sum())
    assert 0.93 <= coverage <= 0.97


def simulated(rng: np.random.Generator, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Two arms of equal accuracy on 200 questions, alike on a share of them."""
    a = rng.random(200) < 0.6
    b = np.where(rng.random(200) < shared, a, rng.random(200) < 0.6)
    return a, b


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_equal_arms_are_told_apart_in_at_most_6_of_100_simulations(rng, shared: float):
    pairs = [simulated(rng, shared) for _ in range(2000)]
    mcnemar = [stats.mcnemar_of(a, b) < 0.05 for a, b in pairs]
    assert np.mean(mcnemar) <= 0.06
    intervals = [
        stats.bootstrap_mean(a.astype(float) - b.astype(float), resamples=400, seed=i)
        for i, (a, b) in enumerate(pairs)
    ]
    excluded = [not low <= 0 <= high for low, high in intervals]
    # Six other runs: .045 to .058. The bound is 3 standard errors (.005) above what is promised.
    assert np.mean(excluded) <= 0.065
    # Pairing is what sees a small gain: shuffled, the same answers show it far less often.
    better = [(a | (rng.random(200) < 0.15), b) for a, b in pairs]
    found = np.mean([stats.mcnemar_of(a, b) < 0.05 for a, b in better])
    shuffled = np.mean([stats.mcnemar_of(a, rng.permutation(b)) < 0.05 for a, b in better])
    assert shared == 0.0 or found > shuffled + 0.2

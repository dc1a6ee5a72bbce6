"""Intervals and tests: the published values, and the coverage they promise."""

import math

import numpy as np
import pytest

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

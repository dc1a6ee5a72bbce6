"""Numbers of results.json from who is right, all computed by hand."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from made import exactly, make_arm, make_questions, make_scores
from rag2.evaluation import report, score, stats
from rag2.evaluation.contrasts import EQUAL
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.results import summarize
from rag2.evaluation.score import Scores
from rag2.evaluation.select import Choice
from rag2.types import Question


def results(right: Mapping[str, int], equal: bool = False) -> dict[str, Any]:
    """Arms that answer the first so many of 60 questions, so that one's are another's too."""
    arms = [make_arm(name, exactly(count, 60)) for name, count in right.items()]
    return summarize("made up", arms, seed=0, environment={}, equal=equal)


# With d questions that one arm of two alone got right, p = 2 / 2^d; Holm takes the smallest of
# three times 3, the next times 2.
HOLM = {("joint", "ft"): 3 * 2**-15, ("joint", "base"): 2 * 2**-9, ("ft", "base"): 2**-5}


def test_p_values_of_contrasts_are_adjusted_for_all_contrasts():
    rows = results({"joint": 30, "base": 20, "ft": 14})["paired"]
    assert {(row["a"], row["b"]): row["holm_p"] for row in rows} == pytest.approx(HOLM, rel=1e-5)
    assert [row["a_only"] for row in rows] == [10, 16, 0]


def test_p_values_inside_a_contrast_are_adjusted_for_all_groups_of_a_key():
    first, *_ = results({"joint": 31, "base": 20})["paired"]
    seen, unseen = (first["groups"]["wording"][label] for label in ("seen", "unseen"))
    assert (seen["mcnemar_p"], unseen["mcnemar_p"]) == (2**-5, 2**-4)  # six and five questions
    assert (seen["holm_p"], unseen["holm_p"]) == (2 * 2**-5, 2**-4)


def test_every_pair_of_arms_has_its_difference_with_its_sign_and_a_p_adjusted_for_all_pairs():
    right = {"joint": 30, "base": 20, "ft": 14}
    pairwise = results(right)["pairwise"]
    assert pairwise["arms"] == list(right)
    for i, a in enumerate(right):
        for j, b in enumerate(right):
            if i == j:
                assert pairwise["difference"][i][j] is pairwise["holm_p"][i][j] is None
                continue
            expected = HOLM.get((a, b), HOLM.get((b, a)))
            assert pairwise["difference"][i][j] == pytest.approx((right[a] - right[b]) / 60, 1e-5)
            assert pairwise["holm_p"][i][j] == pytest.approx(expected, rel=1e-5)


def test_a_relative_gain_is_a_share_of_what_the_base_gets_right():
    arms = results({"joint": 30, "base": 20, "ft": 14})["arms"]
    gains = {name: arm["relative_gain"] for name, arm in arms.items()}
    assert gains == pytest.approx({"joint": 0.5, "base": 0.0, "ft": -0.3})
    assert results({"joint": 30})["arms"]["joint"]["relative_gain"] is None


def test_contrasts_are_called_equal_only_where_the_arms_were_trained_alike():
    right = {"joint": 30, "sft_rag": 25, "frozen_rag": 22, "ft": 21, "base": 20}
    called = {(row["a"], row["b"]): row["equal"] for row in results(right, equal=True)["paired"]}
    assert {pair: says for pair, says in called.items() if says} == EQUAL and len(called) > 2
    assert {row["equal"] for row in results(right)["paired"]} == {None}


def test_every_share_has_wilsons_interval_over_the_questions_that_it_is_of(rng):
    correct = rng.random(60) < 0.7
    shares = {"control_accuracy": 0.75, "two_hop_accuracy": 0.25}
    recall = {"recall_at_1": 0.5, "recall_at_k": 0.9}
    arm = make_arm(
        "joint",
        correct,
        debiased_Q=exactly(24, 60),
        asked_beside={"control": 8, "two_hop": 16},
        readings={"concat": {"right": 33, "k": 2}},
        **shares,
        **recall,
    )
    told = summarize("made up", [arm], seed=0, environment={})["arms"]["joint"]
    expected = {
        "acc_norm": stats.wilson(int(arm.correct_norm.sum()), 60),
        "acc_bytes": stats.wilson(int(arm.correct_bytes.sum()), 60),
        "debiased_accuracy": stats.wilson(24, 60),
        "recall_at_1": stats.wilson(30, 60),
        "recall_at_k": stats.wilson(54, 60),
        "control_accuracy": stats.wilson(6, 8),
        "two_hop_accuracy": stats.wilson(4, 16),
    }
    assert told["intervals"].keys() == expected.keys()
    for key, ends in expected.items():
        assert told["intervals"][key] == pytest.approx(ends, rel=1e-5), key
    read = told["readings"]["concat"]
    assert read["accuracy"] == 0.55 and read["ci95"] == pytest.approx(stats.wilson(33, 60), 1e-5)


def test_the_verdict_goes_by_the_adjusted_p_value():
    told = results({"joint": 26, "sft_rag": 20, "frozen_rag": 20})
    row = next(row for row in told["paired"] if (row["a"], row["b"]) == ("joint", "sft_rag"))
    assert row["mcnemar_p"] < 0.05 < row["holm_p"] == pytest.approx(3 * 2**-5)
    assert "joint is ahead, perhaps by chance, of sft_rag" in report.verdict(told)
    assert "Holm-adjusted p = 0.094" in report.verdict(told)


def test_per_byte_a_choice_of_long_characters_is_longer_than_per_character():
    asked = [Question("q", "?", ("\u65e5\u672c", "abcd"), 0)]
    arm = ArmResult.of("base", asked, Scores.closed_book(np.array([[-3.0, -4.0]])))
    assert arm.correct_norm.tolist() == [False]  # -3 / 2 against -4 / 4
    assert arm.correct_bytes.tolist() == [True]  # -3 / 6 against -4 / 4


def test_passages_are_shown_with_how_much_they_support_the_choice_picked(rng):
    scores = make_scores(rng, c=3)
    picked_Q = score.predict(score.marginal(scores, 4, 2.0))
    questions = [make_questions(40, answer=int(pick + 1) % 3)[i] for i, pick in enumerate(picked_Q)]
    arm = ArmResult.of("joint", questions, scores, Choice(4, 2.0, 0.5))
    assert not arm.correct.any(), "the picked choice is not the right one anywhere"
    weight_QK = np.exp(scores.scores_QK[:, :4] / 2.0)
    joint_QK = weight_QK * np.exp(scores.logp_QKC[np.arange(40), :4, picked_Q])
    shown_QK = np.array([[item.posterior for item in row] for row in arm.retrieved])
    np.testing.assert_allclose(shown_QK, joint_QK / joint_QK.sum(1, keepdims=True), rtol=1e-9)

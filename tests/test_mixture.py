"""The mixture over chunks, and the choice of K and temperature on validation questions."""

from dataclasses import replace

import numpy as np
import pytest

from made import make_questions, make_scores
from rag2.evaluation import score, select
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Scores
from rag2.types import Question

# --- mixture -------------------------------------------------------------------------------------


def test_the_mixture_of_one_chunk_is_that_chunk_at_any_temperature(rng):
    scores = make_scores(rng)
    for temperature in (0.01, 1.0, 100.0):
        np.testing.assert_allclose(
            score.marginal(scores, 1, temperature), scores.logp_QKC[:, 0], atol=1e-12
        )


def test_no_chunk_is_the_closed_book(rng):
    scores = make_scores(rng)
    np.testing.assert_array_equal(score.marginal(scores, 0, 3.0), scores.closed_QC)


def test_the_mixture_equals_its_definition_in_probabilities(rng):
    scores = make_scores(rng, k=5)
    weight_QK = np.exp(scores.scores_QK[:, :3] / 0.7)
    weight_QK /= weight_QK.sum(1, keepdims=True)
    expected_QC = np.log((weight_QK[..., None] * np.exp(scores.logp_QKC[:, :3])).sum(1))
    np.testing.assert_allclose(score.marginal(scores, 3, 0.7), expected_QC, rtol=1e-10)


def test_the_order_of_chunks_does_not_matter_to_the_mixture_of_all(rng):
    scores = make_scores(rng)
    order = rng.permutation(scores.retrieved)
    shuffled = replace(
        scores,
        logp_QKC=scores.logp_QKC[:, order],
        scores_QK=scores.scores_QK[:, order],
        ids_QK=scores.ids_QK[:, order],
    )
    k = scores.retrieved
    np.testing.assert_allclose(
        score.marginal(shuffled, k), score.marginal(scores, k), rtol=0, atol=1e-10
    )


def test_duplicates_of_every_chunk_change_nothing(rng):
    scores = make_scores(rng, k=4)
    twice = replace(
        scores,
        logp_QKC=np.repeat(scores.logp_QKC, 2, axis=1),
        scores_QK=np.repeat(scores.scores_QK, 2, axis=1),
        ids_QK=np.repeat(scores.ids_QK, 2, axis=1),
    )
    for k in (1, 4):
        np.testing.assert_allclose(
            score.marginal(twice, 2 * k, 0.5), score.marginal(scores, k, 0.5), atol=1e-10
        )


def test_an_infinite_temperature_weighs_chunks_alike_and_a_tiny_one_reads_the_best(rng):
    scores = make_scores(rng)
    mean_QC = np.log(np.exp(scores.logp_QKC).mean(axis=1))
    np.testing.assert_allclose(score.marginal(scores, 8, 1e12), mean_QC, atol=1e-8)
    apart = replace(scores, scores_QK=np.tile(-np.arange(8.0), (40, 1)))
    np.testing.assert_allclose(
        score.marginal(apart, 8, 1e-4), scores.logp_QKC[:, 0], rtol=0, atol=1e-8
    )


def test_a_missing_chunk_weighs_nothing(rng):
    scores = make_scores(rng, k=3)
    short = replace(scores, scores_QK=np.where(np.arange(3) == 2, -np.inf, scores.scores_QK))
    np.testing.assert_allclose(score.marginal(short, 3), score.marginal(scores, 2), atol=1e-10)
    cited = score.retrieved(short, "marginal", 3, 1.0, score.predict(score.marginal(short, 3)))
    assert {len(passages) for passages in cited} == {2}


def test_the_posterior_is_bayes_rule_for_the_choice_given(rng):
    scores = make_scores(rng)
    choice_Q = score.predict(score.marginal(scores, 4, 2.0))
    posterior_QK = score.posterior(scores, 4, 2.0, choice_Q)
    np.testing.assert_allclose(posterior_QK.sum(1), 1.0)
    prior_QK = np.exp(scores.scores_QK[:, :4] / 2.0)
    joint_QK = prior_QK * np.exp(scores.logp_QKC[np.arange(40), :4, choice_Q])
    np.testing.assert_allclose(posterior_QK, joint_QK / joint_QK.sum(1, keepdims=True), rtol=1e-9)
    assert score.posterior(scores, 0, 1.0, choice_Q).shape == (40, 0)


def test_ties_go_to_the_lowest_index_and_absent_choices_are_never_picked():
    logp_QC = np.array([[-2.0, -1.0, -1.0], [-3.0, -4.0, -np.inf]])
    assert score.predict(logp_QC).tolist() == [1, 0]
    assert score.predict_norm(logp_QC, np.array([[1, 1, 4], [1, 2, 0]])).tolist() == [2, 1]


def test_lengths_count_characters_or_utf8_bytes_of_what_is_scored():
    labels = [["\u00fcber", "x"], ["ab", "cd", "efg"]]
    assert score.lengths(labels).tolist() == [[4, 1, 0], [2, 2, 3]]
    assert score.lengths(labels, bytewise=True).tolist() == [[5, 1, 0], [2, 2, 3]]


def test_mutual_information_takes_off_what_a_choice_is_worth_without_any_context():
    logp_QC = np.array([[-5.0, -1.0], [-5.0, -np.inf]])
    unconditional_QC = np.array([[-9.0, -1.0], [-1.0, -np.inf]])
    assert score.predict_mutual(logp_QC, unconditional_QC).tolist() == [0, 0]


def test_concat_reads_the_joint_prompt_and_equals_the_mixture_below_two_chunks(rng):
    scores = make_scores(rng)
    for k in (0, 1):
        mixed, joint = (score.read(scores, reading, k, 3.0) for reading in score.READINGS)
        np.testing.assert_array_equal(mixed, joint)
    np.testing.assert_array_equal(score.read(scores, "concat", 3), scores.concat[3])
    picks_Q = score.predict(scores.concat[3])
    (first, *_) = score.retrieved(scores, "concat", 3, 1.0, picks_Q)
    assert [item.chunk for item in first] == scores.ids_QK[0, :3].tolist()
    assert all(item.posterior is None for item in first)


def test_scores_refuse_arrays_that_do_not_fit(rng):
    scores = make_scores(rng)
    with pytest.raises(AssertionError):
        replace(scores, scores_QK=scores.scores_QK[:, :3])
    with pytest.raises(AssertionError):
        replace(scores, closed_QC=np.full_like(scores.closed_QC, np.nan))


def test_the_majority_control_answers_the_most_frequent_training_position():
    train = [*make_questions(3, answer=2), *make_questions(3, answer=1), *make_questions(1)]
    position = score.majority_position(train)
    assert position == 1  # a tie with 2: the lowest index
    test = make_questions(5, answer=1)
    assert ArmResult.of("majority", test, score.constant(test, position)).accuracy == 1.0
    assert ArmResult.of("majority", test, score.constant(test, 0)).accuracy == 0.0


def test_recall_counts_questions_that_have_a_gold_chunk():
    ids_QK = np.array([[5, 1], [2, 7], [3, 4]])
    gold = [frozenset({1}), frozenset({2, 9}), frozenset()]
    assert [score.recall_at(ids_QK, gold, k) for k in (0, 1, 2)] == [None, 0.5, 1.0]


# --- choice of K ---------------------------------------------------------------------------------


def planted(rng: np.random.Generator, rank: int, k: int = 8) -> tuple[Scores, np.ndarray]:
    """Scores where the right answer is known only from the chunk at `rank` (0 = best)."""
    scores = make_scores(rng, q=60, k=k)
    answers_Q = rng.integers(0, 4, 60)
    logp_QKC = np.full_like(scores.logp_QKC, -8.0)
    logp_QKC[:, :, 0] = -7.9  # without the chunk: always the first choice
    logp_QKC[np.arange(60), rank, answers_Q] = -0.01
    flat_QK = np.tile(-np.arange(k) / 100, (60, 1))
    return replace(
        scores, logp_QKC=logp_QKC, closed_QC=logp_QKC[:, 7 - rank], scores_QK=flat_QK
    ), answers_Q


def test_the_smallest_k_that_reaches_the_planted_chunk_is_chosen(rng):
    for rank, k in ((0, 1), (1, 2), (4, 5), (6, 8)):
        scores, answers_Q = planted(rng, rank)
        choice = select.choose(scores, answers_Q)
        assert (choice.k, choice.temperature, choice.validation_accuracy) == (k, 1.0, 1.0)


def test_ties_go_to_the_smaller_k_and_the_temperature_nearest_one(rng):
    scores = make_scores(rng)
    same = np.broadcast_to(scores.closed_QC[:, None], scores.logp_QKC.shape).copy()
    answers_Q = score.predict(scores.closed_QC)
    assert select.choose(replace(scores, logp_QKC=same), answers_Q).k == 0
    no_closed = select.choose(replace(scores, logp_QKC=same), answers_Q, ks=(8, 3, 2))
    assert (no_closed.k, no_closed.temperature) == (2, 1.0)
    off_one = select.choose(
        replace(scores, logp_QKC=same), answers_Q, ks=(2,), temperatures=(8.0, 0.25, 2.0)
    )
    assert off_one.temperature == 2.0


def test_the_choice_never_exceeds_what_was_retrieved(rng):
    scores = make_scores(rng, k=3)
    assert select.choose(scores, rng.integers(0, 4, 40)).k <= 3
    closed = Scores.closed_book(scores.closed_QC)
    assert select.choose(closed, rng.integers(0, 4, 40)).k == 0


def test_validation_chooses_the_reading_too_and_by_k_lists_what_it_chose_from(rng):
    scores = make_scores(rng)
    answers_Q = rng.integers(0, 4, 40)
    logp_QC = np.full((40, 4), -8.0)
    logp_QC[np.arange(40), answers_Q] = -0.01
    helped = replace(scores, concat={**scores.concat, 3: logp_QC})
    choice = select.choose(helped, answers_Q, readings=score.READINGS)
    assert (choice.reading, choice.k, choice.validation_accuracy) == ("concat", 3, 1.0)
    assert select.choose(helped, answers_Q).reading == "marginal"
    rows = select.by_k(helped, answers_Q, ks=(0, 1, 3), readings=score.READINGS)
    assert [(row.k, row.reading) for row in rows] == [
        (k, reading) for k in (0, 1, 3) for reading in score.READINGS
    ]
    for row in rows:
        logp_QC = score.read(helped, row.reading, row.k, row.temperature)
        assert row.validation_accuracy == np.mean(score.predict(logp_QC) == answers_Q)
    closed, _, one, *_ = rows
    assert closed == replace(rows[1], reading="marginal") and one.temperature == 1.0


def test_the_choice_is_the_same_whatever_the_test_labels_are(rng):
    validation, answers_Q = planted(rng, 2)
    test, test_answers_Q = planted(rng, 4)
    choice = select.choose(validation, answers_Q)
    assert choice.k == 3  # what validation needs, though test needs 5
    questions = [Question(str(i), "?", tuple("abcd"), int(a)) for i, a in enumerate(test_answers_Q)]
    moved = [replace(question, answer=(question.answer + 1) % 4) for question in questions]
    arm, arm_moved = (ArmResult.of("joint", asked, test, choice) for asked in (questions, moved))
    assert arm.k == arm_moved.k == 3 and arm.retrieved == arm_moved.retrieved
    np.testing.assert_array_equal(arm.predictions, arm_moved.predictions)
    # The oracle is the one that looks, and never scores lower than what was chosen.
    oracle = select.oracle_on_test(test, test_answers_Q)
    assert oracle.k == 5 and oracle.test_accuracy == 1.0 > arm.accuracy
    assert select.oracle_on_test(test, score.answers(moved)).test_accuracy < 1.0

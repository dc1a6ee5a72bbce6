"""Evaluation: mixture scores, choice of K on validation, statistics, questions, reports."""

import hashlib
import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rag2.evaluation import report, samples, score, select, stats
from rag2.evaluation.outcome import ArmResult, pool
from rag2.evaluation.questions import load_questions, split, to_row
from rag2.evaluation.score import Scores
from rag2.registry import UserError
from rag2.types import Question

ENVIRONMENT = {"rag2": "0.1.0", "torch": "2.13.0", "device": "cpu", "threads": 1}


@pytest.fixture
def rng() -> np.random.Generator:
    seed = time.time_ns() % 2**32
    print(f"seed {seed}")  # noqa: T201
    return np.random.default_rng(seed)


def make_scores(rng: np.random.Generator, q: int = 40, k: int = 8, c: int = 4) -> Scores:
    return Scores(
        logp_QKC=-rng.exponential(5.0, (q, k, c)),
        closed_QC=-rng.exponential(5.0, (q, c)),
        scores_QK=-np.sort(-rng.normal(0.0, 3.0, (q, k)), axis=1),
        ids_QK=np.argsort(rng.random((q, 3 * k)), axis=1)[:, :k].astype(np.int64),
        lengths_QC=rng.integers(1, 20, (q, c)),
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
    lengths_QC = np.tile([1, 2, 3], (len(correct), 1))
    return ArmResult(
        name=name,
        questions=make_questions(len(correct)),
        logp_QC=logp_QC,
        lengths_QC=lengths_QC,
        **facts,
    )


def exactly(right: int, n: int) -> np.ndarray:
    return np.arange(n) < right


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
    cited = score.retrieved(short, 3, 1.0, score.predict(score.marginal(short, 3)))
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


def test_lengths_count_characters_and_not_bytes():
    question = Question("q", "?", ("\u00fcber", "x"), 0)
    short = Question("r", "?", ("ab", "cd", "efg"), 0)
    assert score.choice_lengths([question, short]).tolist() == [[4, 1, 0], [2, 2, 3]]


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
    closed = Scores.closed_book(scores.closed_QC, scores.lengths_QC)
    assert select.choose(closed, rng.integers(0, 4, 40)).k == 0


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


# --- statistics ----------------------------------------------------------------------------------


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


# --- questions -----------------------------------------------------------------------------------

GOOD = {"id": "q1", "question": "Who?", "choices": ["a", "b"], "answer": 1}


def write_rows(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_questions_round_trip_and_split(tmp_path):
    full = GOOD | {
        "id": 7,
        "split": "train",
        "gold_chunk": 3,
        "evidence": "doc",
        "metadata": {"wording": "seen"},
    }
    path = write_rows(tmp_path / "q.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b" ", full)
    first, second = load_questions(path)
    assert first == Question("q1", "Who?", ("a", "b"), 1) and first.gold == "b"
    assert (second.id, second.evidence, second.gold_chunk) == ("7", ("doc",), 3)
    again = load_questions(write_rows(tmp_path / "r.jsonl", to_row(first), to_row(second)))
    assert again == [first, second]
    assert split(again, "train") == [second]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8 (byte 9 of the line)"),
        (b"[" * 100_000, "not JSON"),
        ([1], "expected a JSON object, got list"),
        ({k: v for k, v in GOOD.items() if k != "choices"} | {"choises": []}, "'choices' is miss"),
        ({"id": "x", "question": "?", "answers": ["a"]}, "free-text 'answers'"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "'id' is missing"),
        (GOOD | {"id": "x", "question": " "}, "'question' must be a non-empty string"),
        (GOOD | {"id": "x", "choices": ["a"]}, "at least 2 entries, got 1"),
        (GOOD | {"id": "x", "choices": ["a", ""]}, "empty entry"),
        (GOOD | {"id": "x", "choices": ["a", 2]}, "list of strings"),
        (GOOD | {"id": "x", "answer": 2}, "index from 0 to 1, got 2"),
        (GOOD | {"id": "x", "answer": -1}, "index from 0 to 1, got -1"),
        (GOOD | {"id": "x", "answer": True}, "index from 0 to 1, got true"),
        (GOOD | {"id": "x", "answer": "B"}, 'got "B"'),
        (GOOD, "id 'q1' is already used on line 1"),
        (GOOD | {"id": "x", "split": "tests"}, "Did you mean 'test'?"),
        (GOOD | {"id": "x", "split": 3}, "unknown split 3"),
        (GOOD | {"id": "x", "gold_chunk": "3"}, "'gold_chunk' must be a chunk id"),
        (GOOD | {"id": "x", "evidence": [3]}, "'evidence' must be document ids"),
        (GOOD | {"id": "x", "metadata": "m"}, "'metadata' must be a JSON object"),
    ],
)
def test_a_bad_row_is_one_line_with_its_place(tmp_path, row, message):
    path = write_rows(tmp_path / "q.jsonl", GOOD, row)
    with pytest.raises(UserError) as error:
        load_questions(path)
    text = str(error.value)
    assert text.startswith(f"{path}:2: ") and message in text and "\n" not in text


def test_a_file_that_is_missing_or_empty_is_one_line(tmp_path):
    write_rows(tmp_path / "questions.jsonl", GOOD)
    with pytest.raises(UserError, match=r"Did you mean 'questions.jsonl'\?"):
        load_questions(tmp_path / "question.jsonl")
    with pytest.raises(UserError, match="no questions in this file"):
        load_questions(write_rows(tmp_path / "empty.jsonl", b"\n"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_questions(tmp_path)
    questions = load_questions(tmp_path / "questions.jsonl")
    with pytest.raises(UserError, match=r"no question has split 'train'; present: test \(1\)"):
        split(questions, "train")
    with pytest.raises(UserError, match="Did you mean 'validation'"):
        split(questions, "valid")


# --- report --------------------------------------------------------------------------------------


def make_results(joint: int, rival: int, n: int = 400) -> tuple[dict, list[ArmResult]]:
    choice = select.Choice(k=4, temperature=2.0, validation_accuracy=0.8)
    rag = {"reading": "marginal", "k": 4, "temperature": 2.0, "choice": choice}
    arms = [
        make_arm("majority", exactly(100, n), generator="none"),
        make_arm("base", exactly(110, n), eval_seconds=1.5, control_accuracy=0.9),
        make_arm(
            "frozen_rag",
            exactly(200, n),
            retriever="warm",
            oracle=select.Oracle(k=5, temperature=1.0, test_accuracy=0.51),
            **rag,
        ),
        make_arm("sft_rag", exactly(rival, n), retriever="warm", generator="sft", **rag),
        make_arm("gold_rag", exactly(n, n), retriever="gold", generator="sft"),
        make_arm("warm_joint", exactly(240, n), retriever="warm", generator="joint", **rag),
        make_arm("joint_sft", exactly(230, n), retriever="joint", generator="sft", **rag),
        make_arm(
            "joint",
            exactly(joint, n),
            retriever="joint",
            generator="joint",
            recall_at_1=0.75,
            recall_at_k=0.95,
            two_hop_accuracy=0.4,
            train_seconds=30.0,
            trained_parameters=1_234_567,
            **rag,
        ),
    ]
    return report.summarize("almanac", arms, seed=0, environment=ENVIRONMENT), arms


def test_results_have_the_documented_keys_and_round_trip(tmp_path):
    results, arms = make_results(joint=300, rival=250)
    assert json.loads(report.write(tmp_path, results, arms).read_text()) == results
    assert results["format"] == "rag2.results/1" and results["interval"] == "wilson"
    documented = ["format", "task", "n", "seed", "interval", "arms", "paired", "k_selection"]
    assert set(documented) | {"environment"} <= set(results)
    joint = results["arms"]["joint"]
    assert set("accuracy stderr ci95 k acc_norm recall_at_k train_seconds eval_seconds".split()) | {
        "trained_parameters"
    } <= set(joint)
    assert (joint["accuracy"], joint["k"], joint["recall_at_k"]) == (0.75, 4, 0.95)
    assert joint["groups"]["wording"]["seen"] == {"accuracy": 0.75, "n": 200}
    first = results["paired"][0]
    assert (first["a"], first["b"], first["difference"]) == ("joint", "base", 0.475)
    assert set(first) >= {"ci95", "mcnemar_p"} and first["holm_p"] >= first["mcnemar_p"]
    assert not {row["b"] for row in results["paired"]} & {"majority", "gold_rag"}
    assert results["k_selection"]["split"] == "validation"
    assert results["k_selection"]["chosen"]["frozen_rag"] == 4
    assert results["k_selection"]["oracle_test"] == {"frozen_rag": 5}


def test_two_runs_are_equal_but_for_their_times():
    results, arms = make_results(joint=300, rival=250)
    slow = [replace(arm, train_seconds=arm.train_seconds + 9, eval_seconds=99.0) for arm in arms]
    slower = report.summarize("almanac", slow, seed=0, environment=ENVIRONMENT)
    assert slower != results and report.strip_times(slower) == report.strip_times(results)
    assert "seconds" not in json.dumps(report.strip_times(results))
    other, _ = make_results(joint=301, rival=250)
    assert report.strip_times(other) != report.strip_times(results)


def test_the_grid_says_which_half_earned_the_gain():
    results, _ = make_results(joint=300, rival=200)
    grid = results["grid_2x2"]
    assert grid["accuracy"] == [[0.5, 0.6], [0.575, 0.75]]
    assert grid["arms"] == [["sft_rag", "warm_joint"], ["joint_sft", "joint"]]
    effects = {name: effect["difference"] for name, effect in grid["effects"].items()}
    assert effects == {"retriever": 0.1125, "generator": 0.1375, "interaction": 0.075}


@pytest.mark.parametrize(
    ("joint", "rival", "says"),
    [
        (
            300,
            250,
            "joint beats sft_rag, the strongest arm without a jointly trained half (75.0 % ",
        ),
        (252, 250, "joint is ahead, perhaps by chance, of sft_rag"),
        (250, 250, "joint does not win: sft_rag answers as many questions right"),
        (248, 250, "joint does not win: sft_rag is ahead, perhaps by chance (62.0 %"),
        (220, 250, "joint does not win: sft_rag beats it (55.0 % against 62.5 %, difference -7.5"),
        (220, 250, "score higher still: warm_joint 60.0 %, joint_sft 57.5 %."),
        (235, 180, "without a jointly trained half (58.8 % against 50.0 %"),
        (235, 180, "score higher still: warm_joint 60.0 %."),
    ],
)
def test_the_verdict_is_honest_also_when_joint_loses(joint, rival, says):
    results, _ = make_results(joint, rival)
    assert says in report.verdict(results)
    assert report.verdict(results) in report.markdown(results)


def test_without_a_joint_arm_the_verdict_names_the_best():
    arms = [make_arm("base", exactly(20, 40)), make_arm("ft", exactly(25, 40))]
    results = report.summarize("mmlu", arms, seed=1, environment={})
    assert report.verdict(results).startswith("ft scores highest with 62.5 % of 40 questions")
    assert "Choice of K" not in report.markdown(results) and "grid_2x2" not in results


def test_the_report_shows_every_arm_and_labels_the_oracle():
    results, arms = make_results(joint=300, rival=250)
    text = report.markdown(results)
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(report.terminal_table(results))
    terminal = console.export_text()
    for arm in arms:
        assert f"| {arm.name} |" in text and arm.name in terminal
    assert "| joint | joint | joint | 75.0 % | [70.5, 79.0] | 4 | 75.0 % | 95.0 % |" in text
    assert "Oracle, chosen on the test answers and therefore no result: frozen_rag K = 5" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_samples_have_the_harness_shape_and_the_passages(tmp_path, rng):
    scores = make_scores(rng, q=6, k=3, c=3)
    questions = make_questions(6)
    choice = select.Choice(k=2, temperature=1.0, validation_accuracy=0.5)
    arm = ArmResult.of("frozen_rag", questions, scores, choice, retriever="warm")
    contexts = [f"Question: {question.question}\nAnswer:" for question in questions]
    path = samples.write_samples(tmp_path, arm, contexts)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "samples_frozen_rag.jsonl" and len(rows) == 6
    for index, row in enumerate(rows):
        assert row["doc_id"] == index and row["doc"]["id"] == f"q{index}" and row["target"] == "0"
        assert row["arguments"]["gen_args_1"] == {"arg_0": contexts[index], "arg_1": " bb"}
        assert [float(value) for value, _ in row["filtered_resps"]] == arm.logp_QC[index].tolist()
        assert row["resps"] == [[answer] for answer in row["filtered_resps"]]
        assert row["prompt_hash"] == hashlib.sha256(contexts[index].encode()).hexdigest()
        assert row["acc"] == float(arm.correct[index])
        assert [item["chunk"] for item in row["retrieved"]] == scores.ids_QK[index, :2].tolist()
        assert sum(item["posterior"] for item in row["retrieved"]) == pytest.approx(1.0)


def test_arms_that_answered_other_questions_cannot_be_compared():
    arms = [make_arm("base", exactly(20, 40)), make_arm("ft", exactly(25, 41))]
    with pytest.raises(AssertionError, match="ft is not paired"):
        report.summarize("mmlu", arms, seed=1, environment={})


def test_seeds_are_pooled_by_joining_their_records():
    runs = {
        seed: [
            make_arm("base", exactly(20, 40), train_seconds=1.0),
            make_arm("joint", exactly(right, 40), k=k, retriever="joint", train_seconds=1.0 * seed),
        ]
        for seed, right, k in ((1, 24, 2), (3, 34, 4))
    }
    pooled = [pool([run[i] for run in runs.values()]) for i in range(2)]
    results = report.summarize("almanac", pooled, seed=1, environment={}, by_seed=runs)
    joint = results["arms"]["joint"]
    assert (results["n"], joint["accuracy"], joint["k"]) == (80, 58 / 80, None)
    assert (joint["train_seconds"], results["arms"]["base"]["k"]) == (2.0, 0)
    assert joint["ci95"] == pytest.approx(stats.wilson(58, 80), abs=1e-6)
    assert results["paired"][0]["a_only"] == 18
    assert "| joint | 60.0 % | 85.0 % |" in report.markdown(results)
    assert results["seeds"]["3"]["joint"] == {"accuracy": 0.85, "k": 4}

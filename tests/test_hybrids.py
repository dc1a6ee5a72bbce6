"""Hybrids: two arms that answer as one, lists of chunks fused, the log that frozen RAG leaves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from scipy.special import log_softmax

from made import Drawn, exactly, make_arm
from rag2.evaluation import arms, combined, contrasts, report, score, trial
from rag2.evaluation.arms import Arm, Found
from rag2.evaluation.hybrids import Ensemble, Hybrid, Router, Said
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Scores
from rag2.evaluation.select import Choice
from rag2.evaluation.trial import QuestionSets, Rules, Trial
from rag2.retrieval import Fused
from rag2.types import Question

ENSEMBLE, ROUTER = Ensemble("ft", "frozen_rag"), Router("base", "frozen_rag")


def said(p_QC: Sequence[Sequence[float]], scores_QK: Any = None) -> Said:
    """What a member says, by its probabilities."""
    logp_QC = np.log(np.array(p_QC))
    empty = np.zeros((len(logp_QC), 2))
    return Said(logp_QC, empty if scores_QK is None else np.array(scores_QK, dtype=float))


def drawn(rng: np.random.Generator, count: int) -> Said:
    """Answers to questions of four choices, and three scores each, of which some are equal."""
    scores_QK = -np.sort(-np.round(rng.normal(size=(count, 3))), axis=1)
    return Said(-np.round(rng.exponential(2.0, (count, 4))), scores_QK)


# --- ensemble ------------------------------------------------------------------------------------


def test_the_ensemble_mixes_probabilities_over_the_choices(rng):
    closed, retrieving = drawn(rng, 9), drawn(rng, 9)
    closed.logp_QC[4, 3] = retrieving.logp_QC[4, 3] = -np.inf  # a question of three choices
    p_closed, p_retrieving = (
        np.exp(member.logp_QC) / np.exp(member.logp_QC).sum(1, keepdims=True)
        for member in (closed, retrieving)
    )
    found = ENSEMBLE.apply(closed, retrieving, {"weight": 0.3})
    np.testing.assert_allclose(np.exp(found.logp_QC), 0.3 * p_closed + 0.7 * p_retrieving)
    assert found.logp_QC[4, 3] == -np.inf and found.read_QM.all()


@pytest.mark.parametrize(("weight", "member"), [(0.0, 1), (1.0, 0)])
def test_a_member_of_weight_zero_changes_nothing_and_is_not_read(rng, weight: float, member: int):
    members = drawn(rng, 9), drawn(rng, 9)
    found = ENSEMBLE.apply(*members, {"weight": weight})
    np.testing.assert_allclose(found.logp_QC, log_softmax(members[member].logp_QC, axis=1))
    assert found.read_QM[:, member].all() and not found.read_QM[:, 1 - member].any()


@pytest.mark.parametrize(
    ("closed", "retrieving", "weight"),
    [
        ([[0.9, 0.1]], [[0.8, 0.2]], 0.5),  # all weights are right: the one in the middle
        ([[0.9, 0.1]], [[0.05, 0.95]], 0.6),  # right above .5
        ([[0.05, 0.95]], [[0.9, 0.1]], 0.4),
        ([[0.9, 0.1], [0.1, 0.9]], [[0.05, 0.95], [0.95, 0.05]], 0.6),  # .6 to 1
        ([[0.99, 0.01], [0.01, 0.99]], [[0.1, 0.9], [0.8, 0.2]], 0.5),
        ([[0.99, 0.01], [0.6, 0.4]], [[0.4, 0.6], [0.04, 0.96]], None),
    ],
)
def test_the_weight_with_most_right_answers_is_chosen_of_equals_that_nearest_one_half(
    closed, retrieving, weight
):
    members = said(closed), said(retrieving)
    answers_Q = np.arange(len(closed))
    chosen = ENSEMBLE.choose(*members, answers_Q)["weight"]
    right = {
        w: int(np.sum(score.predict(ENSEMBLE.apply(*members, {"weight": w}).logp_QC) == answers_Q))
        for w in Ensemble.WEIGHTS
    }
    best = [w for w, count in right.items() if count == max(right.values())]
    assert chosen == min(best, key=lambda w: (abs(w - 0.5), w))
    assert weight in (None, chosen)


# --- router --------------------------------------------------------------------------------------


def every_router(closed: Said, retrieving: Said) -> list[dict[str, Any]]:
    """All that can be chosen: never, and every signal at every value that was seen."""
    two_Q2 = np.sort(closed.logp_QC, axis=1)[:, -2:]
    seen = {
        "closed_margin_at_most": two_Q2[:, 1] - two_Q2[:, 0],
        "top_score_at_least": retrieving.scores_QK[:, 0],
        "score_margin_at_least": retrieving.scores_QK[:, 0] - retrieving.scores_QK[:, 1],
    }
    never: dict[str, Any] = {"signal": "closed_margin_at_most", "threshold": None}
    return [never] + [
        {"signal": signal, "threshold": float(value)}
        for signal, values in seen.items()
        for value in np.unique(values)
    ]


def test_the_router_with_most_right_answers_is_chosen_and_of_equals_the_one_that_reads_least(rng):
    for _ in range(50):
        closed, retrieving = drawn(rng, 12), drawn(rng, 12)
        answers_Q = rng.integers(0, 4, 12)

        def worth(parameters: dict[str, Any], a=closed, b=retrieving, answers_Q=answers_Q):
            found = ROUTER.apply(a, b, parameters)
            right = int(np.sum(score.predict(found.logp_QC) == answers_Q))
            return right, -int(found.read_QM[:, 1].sum())

        chosen = ROUTER.choose(closed, retrieving, answers_Q)
        assert worth(dict(chosen)) == max(map(worth, every_router(closed, retrieving)))


def test_questions_beyond_all_that_validation_has_seen_are_answered_closed_book():
    # Chunks help wherever the closed book is torn, and that is every question of validation.
    torn = said([[0.5, 0.5 - 1e-9], [0.6, 0.4]])
    knows = said([[0.1, 0.9], [0.1, 0.9]])
    chosen = ROUTER.choose(torn, knows, np.array([1, 1]))
    assert chosen["signal"] == "closed_margin_at_most"
    assert chosen["threshold"] == pytest.approx(np.log(0.6 / 0.4))
    sure, wrong = said([[0.95, 0.05], [0.59, 0.41]]), said([[0.1, 0.9], [0.1, 0.9]])
    found = ROUTER.apply(sure, wrong, chosen)
    assert score.predict(found.logp_QC).tolist() == [0, 1]
    assert found.read_QM.tolist() == [[True, False], [True, True]], "the margin is read first"


@pytest.mark.parametrize(
    ("scores_QK", "signal"),
    [
        ([[9, 8], [1, 0]], "top_score_at_least"),
        ([[9, 0], [9, 8]], "score_margin_at_least"),
    ],
)
def test_a_retrievers_score_routes_before_anything_is_read(scores_QK, signal: str):
    # The first question needs its chunks, the second is led astray; the closed book tells no more.
    closed = said([[0.5, 0.4], [0.4, 0.5]])
    retrieving = said([[0.1, 0.9], [0.9, 0.1]], scores_QK)
    chosen = ROUTER.choose(closed, retrieving, np.array([1, 1]))
    assert chosen["signal"] == signal
    found = ROUTER.apply(closed, retrieving, chosen)
    assert found.read_QM.tolist() == [[False, True], [True, False]]
    assert score.predict(found.logp_QC).tolist() == [1, 1]


def test_a_router_whose_chunks_never_help_never_retrieves():
    closed, wrong = said([[0.9, 0.1], [0.8, 0.2]]), said([[0.1, 0.9], [0.8, 0.2]])
    chosen = ROUTER.choose(closed, wrong, np.array([0, 0]))
    assert chosen["threshold"] is None
    assert not ROUTER.apply(closed, wrong, chosen).read_QM[:, 1].any()


# --- on sets of questions ------------------------------------------------------------------------


@pytest.fixture
def sets(rng: np.random.Generator) -> QuestionSets:
    """Ten questions of two choices in every set."""

    def ask(part: str) -> list[Question]:
        answers = rng.integers(0, 2, 10).tolist()
        return [Question(f"{part}{i}", "?", ("a", "b"), a) for i, a in enumerate(answers)]

    return QuestionSets([], *map(ask, trial.PARTS))


def tried(
    arm: Arm, sets: QuestionSets, reader: Drawn, right: dict[str, dict[bool, float]]
) -> Trial:
    """An arm that gives the right choice this p, by the set: without (False) and with chunks."""
    found = {}
    for number, part in enumerate(trial.PARTS):
        asked = getattr(sets, part)
        ids_QK = 1000 * number + np.arange(2 * len(asked)).reshape(-1, 2)
        count = 2 if arm.retriever else 0
        scores_QK = np.tile([2.0, 1.0], (len(asked), 1))
        found[part] = Found(scores_QK[:, :count], ids_QK[:, :count])
        for question, ids in zip(asked, ids_QK.tolist(), strict=True):
            for key in [(), *((i,) for i in ids)]:
                p = right[part][bool(key)]
                values = (p, 1 - p) if question.answer == 0 else (1 - p, p)
                reader.known[question.id, key] = np.log(values).tolist()
    rules = Rules([2] if arm.retriever else [0])
    return trial.run("member", arm, sets, found, reader, rules, {})


def both(
    hybrid: Hybrid,
    sets: QuestionSets,
    rng: np.random.Generator,
    right: dict[str, dict[bool, float]],
) -> tuple[ArmResult, Drawn]:
    """The hybrid of two arms that share the generator base."""
    reader = Drawn(rng)
    members = [tried(Arm("base", name), sets, reader, right) for name in (None, "warm")]
    return combined.run("hybrid", hybrid, sets, *members), reader


def everywhere(closed: float, retrieving: float, **other: tuple[float, float]) -> dict[str, Any]:
    pairs = dict.fromkeys(trial.PARTS, (closed, retrieving)) | other
    return {part: {False: pair[0], True: pair[1]} for part, pair in pairs.items()}


@pytest.mark.parametrize(("hybrid", "chosen"), [(ENSEMBLE, 0.6), (ROUTER, None)])
def test_parameters_are_chosen_on_validation_and_never_on_test(sets, rng, hybrid, chosen):
    right = everywhere(0.2, 0.8, validation=(0.9, 0.05))
    result, _ = both(hybrid, sets, rng, right)
    assert result.choice and result.choice.validation_accuracy == 1
    assert chosen in dict(result.choice.parameters).values()
    assert result.accuracy == 0, "test would need the chunks"
    assert (result.control_accuracy, result.two_hop_accuracy) == (0, 0)


def test_control_questions_that_the_closed_book_is_sure_of_lose_nothing_to_retrieval(sets, rng):
    right = everywhere(0.45, 0.9, control=(0.99, 0.1))
    result, _ = both(ROUTER, sets, rng, right)
    assert (result.accuracy, result.control_accuracy) == (1, 1)
    assert (result.retrieved_share, result.control_retrieved_share) == (1, 0)
    told = report.summarize("almanac", [result], seed=0, environment={})["arms"]["hybrid"]
    assert told["members"] == ["base", "frozen_rag"]
    assert told["parameters"]["signal"] == "closed_margin_at_most"
    assert told["control_retrieved_share"] == 0 and told["k"] == 2


@pytest.mark.parametrize("hybrid", [ENSEMBLE, ROUTER])
def test_a_hybrid_costs_the_prompts_that_it_really_read(sets, rng, hybrid):
    helps = both(hybrid, sets, rng, everywhere(0.45, 0.9))
    never = both(hybrid, sets, rng, everywhere(0.9, 0.9, validation=(0.9, 0.1)))
    for (result, reader), keys in ((helps, 3), (never, 3 if hybrid is ENSEMBLE else 1)):
        read = [
            (q.id, key)
            for row, q in enumerate(sets.test)
            for key in [(), (1000 + 2 * row,), (1000 + 2 * row + 1,)][:keys]
        ]
        assert result.eval_tokens == sum(reader.tokens[prompt] for prompt in read)
        assert result.eval_seconds == pytest.approx(sum(reader.seconds[p] for p in read))
        assert {len(row) for row in result.retrieved} == {2 if keys == 3 else 0}
    posterior = [sum(item.posterior or 0 for item in row) for row in helps[0].retrieved]
    assert posterior == pytest.approx([1] * 10)


def test_a_prompt_that_both_members_read_counts_once(sets, rng):
    reader = Drawn(rng)
    closed = tried(Arm("base"), sets, reader, everywhere(0.6, 0.6))
    nothing = replace(closed.result, choice=Choice(0, 1.0, 0.5))  # it chose to retrieve nothing
    result = combined.run("ensemble", ENSEMBLE, sets, closed, replace(closed, result=nothing))
    assert result.choice and dict(result.choice.parameters)["weight"] == 0.5
    assert result.eval_tokens == sum(reader.tokens[q.id, ()] for q in sets.test)
    assert result.retrieved_share == 0


def test_a_distribution_over_choices_has_no_pick_by_length(sets, rng):
    for hybrid, measured in ((ENSEMBLE, False), (ROUTER, True)):
        result, _ = both(hybrid, sets, rng, everywhere(0.45, 0.9))
        told = report.summarize("almanac", [result], seed=0, environment={})["arms"]["hybrid"]
        assert (told["acc_norm"] is not None) == (told["acc_bytes"] is not None) == measured
        assert ("acc_norm" in told["intervals"]) == measured


def test_a_hybrid_without_a_jointly_trained_half_is_a_rival_of_joint():
    parts = {"joint": ("joint", "joint"), "ensemble": ("ft + base", "warm")}
    arms = [
        make_arm(name, exactly(right, 40), generator=g, retriever=r)
        for (name, (g, r)), right in zip(parts.items(), (30, 35), strict=True)
    ]
    told = report.summarize("almanac", arms, seed=0, environment={})
    assert "joint does not win: ensemble" in report.verdict(told)
    half = replace(arms[1], generator="ft + joint")
    told = report.summarize("almanac", [arms[0], half], seed=0, environment={})
    assert "was not run beside another arm" in report.verdict(told)
    assert contrasts.holds({"generator": "ft + joint", "retriever": None}, "joint")
    assert not contrasts.holds({"generator": "jointly", "retriever": "warm"}, "joint")


# --- fused lists ---------------------------------------------------------------------------------


class Listed:
    """A retriever with the same list for every question."""

    def __init__(self, **scores: float) -> None:
        """chunk -> score, best first; a name begins with a letter."""
        self.scores_K = np.array([*scores.values()], dtype=np.float32)
        self.ids_K = np.array([int(name[1:]) for name in scores])

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        found = self.scores_K[:k], self.ids_K[:k]
        return np.tile(found[0], (len(questions), 1)), np.tile(found[1], (len(questions), 1))


ASKED = [Question("q", "?"), Question("r", "?")]


def test_fused_scores_are_weighted_sums_of_both_lists_mapped_onto_one_scale():
    dense, lexical = Listed(c7=9.0, c5=8.0, c3=6.0, c1=5.0), Listed(c2=4.0, c3=3.0, c7=2.0, c9=0.0)
    fused = Fused(dense, lexical, count=4, weight=0.25)
    scores_QK, ids_QK = fused.search(ASKED, 4)
    # 2: .75 * 1; 3: .25 * .25 + .75 * .75; 7: .25 * 1 + .75 * .5; 5: .25 * .75
    assert ids_QK.tolist() == [[2, 3, 7, 5]] * 2
    np.testing.assert_allclose(scores_QK[1], [0.75, 0.625, 0.625, 0.1875], rtol=1e-6)
    for weight, alone in ((1.0, dense), (0.0, lexical)):
        only = Fused(dense, lexical, count=4, weight=weight).search(ASKED, 3)
        assert only[1].tolist() == alone.search(ASKED, 3)[1].tolist()
    mirrored = Fused(Listed(c8=2.0, c4=1.0), Listed(c4=2.0, c8=1.0), count=2).search(ASKED, 2)
    assert mirrored[1].tolist() == [[4, 8]] * 2, "ties"
    wordless = Fused(Listed(c8=2.0, c4=1.0), Listed(c4=0.0, c8=0.0), count=2).search(ASKED, 2)
    assert wordless[1].tolist() == [[8, 4]] * 2 and wordless[0].tolist() == [[0.5, 0.0]] * 2


def test_the_weight_is_the_one_whose_chunks_answer_most_validation_questions(
    monkeypatch: pytest.MonkeyPatch,
):
    asked = [Question(f"q{n}", "?", ("a", "b"), 0) for n in range(4)]
    dense = Listed(c1=10.0, c2=8.5, c3=1.0, c4=0.0)
    lexical = Listed(c4=10.0, c3=5.0, c2=4.0, c1=0.0)

    def weighed(*helpful: int) -> tuple[float, list[int]]:
        """When one of these chunks, and no other, makes the generator answer right."""

        def evaluate(questions: Any, found: Found, reader: Any, concat: Any) -> Scores:
            helps_QK = np.isin(found.ids_QK, helpful)
            logp_QKC = np.log(np.where(helps_QK[..., None], [0.9, 0.1], [0.1, 0.9]))
            return Scores(logp_QKC, logp_QKC[:, 0] * 0 - 1.0, found.scores_QK, found.ids_QK)

        monkeypatch.setattr(arms, "evaluate", evaluate)
        best = trial.weighed(Fused(dense, lexical, 4), asked, cast(Any, None), [1], ["marginal"])
        assert best.parameters == {"dense_weight": best.weight}
        return best.weight, best.search(asked, 1)[1][:, 0].tolist()

    # Chunk 2 is first where .6 / 1.45 < w < .4 / .55, chunk 1 above and chunk 4 below.
    assert weighed(2) == (0.5, [2] * 4)
    assert weighed(1) == (0.8, [1] * 4)
    assert weighed(4) == (0.4, [4] * 4)
    assert weighed(1, 2, 3, 4)[0] == weighed()[0] == 0.5  # of equals


@pytest.mark.parametrize("ks", [[1, 3], [3, 1]])
def test_a_weight_is_tried_with_as_many_chunks_as_any_k_reads(
    monkeypatch: pytest.MonkeyPatch, ks: list[int]
):
    asked, widths = [Question(f"q{n}", "?", ("a", "b"), 0) for n in range(4)], set()

    def measured(questions: Any, found: Found, reader: Any, concat: Any) -> Scores:
        widths.add(found.ids_QK.shape[1])
        helps_QK = np.broadcast_to(np.arange(found.ids_QK.shape[1]) == 2, found.ids_QK.shape)
        logp_QKC = np.log(np.where(helps_QK[..., None], [0.99, 0.01], [0.49, 0.51]))
        return Scores(logp_QKC, logp_QKC[:, 0] * 0 - 1.0, found.scores_QK, found.ids_QK)

    monkeypatch.setattr(arms, "evaluate", measured)
    dense, lexical = Listed(c1=4.0, c2=3.0, c3=2.0, c4=1.0), Listed(c4=4.0, c3=3.0, c2=2.0, c1=1.0)
    trial.weighed(Fused(dense, lexical, 4), asked, cast(Any, None), ks, ["marginal"])
    assert widths == {3}


def test_fewer_fused_chunks_are_the_first_of_more(rng):
    lists = [
        Listed(**{f"c{i}": -float(n) for n, i in enumerate(rng.permutation(300))}) for _ in range(2)
    ]
    scores_QK, ids_QK = Fused(*lists, count=300).search(ASKED, 20)
    for k in (1, 8):
        fewer = Fused(*lists, count=300).search(ASKED, k)
        np.testing.assert_array_equal(fewer[0], scores_QK[:, :k])
        np.testing.assert_array_equal(fewer[1], ids_QK[:, :k])

"""One arm on every set of questions: what chooses, what is counted, and what answering cost."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from made import Drawn
from rag2.evaluation import score, trial
from rag2.evaluation.arms import Arm, Found
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Reading
from rag2.evaluation.trial import QuestionSets, Rules
from rag2.retrieval import Random
from rag2.types import Question

ARM = Arm("base", "warm")
RETRIEVED = 6


@pytest.fixture
def sets(rng: np.random.Generator) -> QuestionSets:
    """Twelve questions of two choices in every set; none of them names a chunk that is found."""

    def ask(part: str) -> list[Question]:
        answers = rng.integers(0, 2, 12).tolist()
        rows = enumerate(answers)
        return [Question(f"{part}{i}", "?", ("a", "b"), a, gold_chunk=999) for i, a in rows]

    return QuestionSets([], *map(ask, trial.PARTS))


@pytest.fixture
def found(sets: QuestionSets, rng: np.random.Generator) -> dict[str, Found]:
    """Six chunks a question, others for each, all with the same score."""
    ids = rng.permutation(4 * 12 * RETRIEVED).reshape(4, 12, RETRIEVED)
    return {
        part: Found(np.zeros((12, RETRIEVED)), ids[row]) for row, part in enumerate(trial.PARTS)
    }


def know(
    reader: Drawn, questions: Sequence[Question], found: Found, right: Mapping[int | None, float]
) -> None:
    """Plant p(right choice) behind the chunk at each rank; None is the closed book."""
    for question, ids in zip(questions, found.ids_QK.tolist(), strict=True):
        for rank, p in right.items():
            key = question.id, () if rank is None else (ids[rank],)
            values = (p, 1 - p) if question.answer == 0 else (1 - p, p)
            reader.known[key] = np.log(values).tolist()


def run(
    sets: QuestionSets,
    found: Mapping[str, Found],
    reader: Drawn,
    ks: Sequence[int],
    reading: Reading = "marginal",
    gold: Mapping[str, Sequence[int]] | None = None,
) -> ArmResult:
    return trial.run(
        "frozen_rag", ARM, sets, found, reader, Rules(ks, [reading]), gold or {}
    ).result


# --- the choice ----------------------------------------------------------------------------------


def test_k_is_chosen_on_validation_and_never_on_test(sets, found, rng):
    reader = Drawn(rng)
    for part, rank in (("validation", 2), ("test", 4)):
        known = {r: 0.49 for r in (None, *range(RETRIEVED))} | {rank: 0.99}
        know(reader, getattr(sets, part), found[part], known)
    result = run(sets, found, reader, ks=range(RETRIEVED + 1))
    assert result.k == 3 and result.accuracy == 0, "test would need five chunks"
    assert result.oracle and (result.oracle.k, result.oracle.test_accuracy) == (5, 1)
    right = {at.choice.k: at.correct_Q.mean() for at in result.by_k}
    assert right == {k: float(k > 4) for k in range(RETRIEVED + 1)}


@pytest.fixture
def torn(sets, found, rng) -> ArmResult:
    """The best of two chunks is right for validation and control, the other one for the rest.

    The best one decides from temperature 1/2 downwards (it weighs 0.88), at 1 the other (0.73).
    """
    reader = Drawn(rng)
    for part in trial.PARTS:
        right = {0: 0.6, 1: 0.01} if part in ("validation", "control") else {0: 0.4, 1: 0.99}
        found[part].scores_QK[:] = 1.0 - np.arange(RETRIEVED)
        know(reader, getattr(sets, part), found[part], {None: right[1]} | right)
    return run(sets, found, reader, ks=[2])


def test_the_temperature_is_chosen_on_validation_and_every_k_is_read_with_its_own(torn: ArmResult):
    assert torn.temperature == 0.5 and torn.accuracy == 0, "test would need temperature 1"
    assert torn.oracle and (torn.oracle.temperature, torn.oracle.test_accuracy) == (1, 1)
    (at,) = torn.by_k
    assert at.choice.temperature == 0.5 and not at.correct_Q.any()


def test_the_questions_beside_are_read_with_what_validation_chose(torn: ArmResult):
    assert (torn.control_accuracy, torn.two_hop_accuracy) == (1, 0)
    beside = torn.readings["marginal"]
    assert (beside["control_accuracy"], beside["two_hop_accuracy"]) == (1, 0)
    assert torn.asked_beside == {"control": 12, "two_hop": 12}


# --- what is read --------------------------------------------------------------------------------


def test_an_arm_reads_what_its_retriever_finds_and_never_the_gold_chunk_besides(sets, rng, seed):
    retriever = Random(range(100), seed)
    found = trial.search(ARM, retriever, sets, Rules([0, 2, 5]))
    for part in trial.PARTS:
        scores_QK, ids_QK = retriever.search(getattr(sets, part), 5)
        np.testing.assert_array_equal(found[part].ids_QK, ids_QK)
        np.testing.assert_array_equal(found[part].scores_QK, scores_QK)
    _, ids_QK = retriever.search(sets.test, 5)
    reader = Drawn(rng)
    result = run(sets, found, reader, ks=[5], gold={q.id: [999] for q in sets.all()})
    assert [[item.chunk for item in row] for row in result.retrieved] == ids_QK.tolist()
    assert not any(999 in ids for _, ids in reader.known)
    assert (result.recall_at_1, result.recall_at_k) == (0, 0)


def test_recall_counts_the_chunks_of_the_chosen_k_alone(sets, found, rng):
    rank_Q = rng.permutation(np.arange(12) % RETRIEVED)  # two questions for each of six ranks
    ids_QK = found["test"].ids_QK
    gold = {q.id: [int(ids_QK[row, rank_Q[row]])] for row, q in enumerate(sets.test)}
    for k in (1, 3, RETRIEVED):
        result = run(sets, found, Drawn(rng), ks=[k], gold=gold)
        assert result.recall_at_1 == pytest.approx(1 / 6)
        assert result.recall_at_k == pytest.approx(k / 6)


@pytest.mark.parametrize("reading", score.READINGS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_an_answer_costs_the_prompts_of_the_chosen_k_and_no_others(sets, found, rng, k, reading):
    reader = Drawn(rng)
    result = run(sets, found, reader, ks=[k], reading=reading)
    prompts = []
    for question, ids in zip(sets.test, found["test"].ids_QK[:, :k].tolist(), strict=True):
        apart = k > 1 and reading == "marginal"
        prompts += [(question.id, (i,)) for i in ids] if apart else [(question.id, tuple(ids))]
    assert len(prompts) == 12 * (4 if k == 4 and reading == "marginal" else 1)
    assert result.eval_tokens == sum(reader.tokens[prompt] for prompt in prompts)
    assert result.eval_seconds == pytest.approx(sum(reader.seconds[p] for p in prompts))
    assert result.dropped_chunks == sum(reader.dropped[prompt] for prompt in prompts)

"""One arm on every set of questions: score all, choose on validation, count on test."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from rag2.evaluation import arms, score, select
from rag2.evaluation.arms import Arm, Found, Key, Reader
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.outcome import ArmResult, AtK
from rag2.evaluation.score import Reading, Scores
from rag2.evaluation.select import Choice
from rag2.retrieval import Fused, Retriever
from rag2.types import Question

Metric = Literal["mutual_info", "debiased"]
PARTS = ("validation", "test", "control", "two_hop")


@dataclass(frozen=True, slots=True)
class QuestionSets:
    """What is asked: validation chooses, test counts, control and two_hop are reported beside."""

    train: Sequence[Question]
    validation: Sequence[Question]
    test: Sequence[Question]
    control: Sequence[Question]
    two_hop: Sequence[Question]

    def all(self) -> list[Question]:
        """Every question that is scored."""
        return [question for part in PARTS for question in getattr(self, part)]


@dataclass(frozen=True, slots=True)
class Rules:
    """What every arm alike may choose from on validation, and what is measured besides."""

    ks: Sequence[int]
    readings: Sequence[Reading] = ("marginal",)
    metrics: Sequence[Metric] = ()

    def of(self, arm: Arm) -> list[int]:
        """The K of an arm: the gold chunk is read alone by definition."""
        return [1] if arm.retriever == "gold" else list(self.ks)


# a generator's prompt -> tokens, seconds, chunks it had no room for, operations (None: not known)
Costs = Mapping[tuple[str, Key], tuple[int, float, int, float | None]]


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """An arm's result, and what a hybrid makes of it: the scores of each set of questions, and what
    was read to answer each test question."""

    result: ArmResult
    scored: Mapping[str, Scores]
    read_Q: Sequence[Costs]


def search(
    arm: Arm, retriever: Retriever | None, sets: QuestionSets, rules: Rules
) -> dict[str, Found]:
    """What the arm's retriever finds for each set of questions that is not empty."""
    found = {}
    for part in PARTS:
        asked = getattr(sets, part)
        # A control question has no evidence: the gold control answers it by heart.
        blind = part == "control" and arm.retriever == "gold"
        if asked:
            found[part] = arms.retrieve(asked, None if blind else retriever, max(rules.ks))
    return found


def weighed(
    retriever: Fused,
    asked: Sequence[Question],
    reader: Reader,
    ks: Sequence[int],
    readings: Sequence[Reading],
) -> Fused:
    """The retriever at the weight with most right answers to the questions `asked`.

    Each weight with the K, temperature and reading that are best for it; ties: the weight nearest
    .5, then the smaller.
    """
    answers_Q, k = score.answers(asked), max(ks)
    lists_Q = retriever.lists(asked, k)
    concat = ks if "concat" in readings else []

    def right(fused: Fused) -> float:
        scores_QK, ids_QK = fused.combined(lists_Q, k)
        found = Found(scores_QK.astype(np.float64), ids_QK)
        scores = arms.evaluate(asked, found, reader, concat=concat)
        return select.choose(scores, answers_Q, ks, readings).validation_accuracy

    tried = sorted(Fused.WEIGHTS, key=lambda weight: (abs(weight - 0.5), weight))
    return max((replace(retriever, weight=weight) for weight in tried), key=right)


def run(
    name: str,
    arm: Arm,
    sets: QuestionSets,
    found: Mapping[str, Found],
    reader: Reader,
    rules: Rules,
    gold: Mapping[str, Sequence[int]],
    tick: Callable[[int], None] = lambda amount: None,
    parameters: Mapping[str, float] = MappingProxyType({}),
) -> Trial:
    """The arm's answers to the test questions, and what a hybrid makes of them.

    `gold` names the chunks that answer a question; `parameters` are what validation has chosen for
    the retriever already.
    """
    concat = rules.of(arm) if "concat" in rules.readings and arm.retriever else []
    scored = {
        part: arms.evaluate(getattr(sets, part), rows, reader, tick, concat)
        for part, rows in found.items()
    }
    facts: dict[str, Any] = {}
    choice = None
    if arm.retriever is not None:
        choice, facts = _choose(name, arm, sets, scored, rules)
        choice = replace(choice, parameters=tuple(parameters.items()))
    if "mutual_info" in rules.metrics:
        facts["unconditional_QC"] = reader.unconditional(sets.test)
    if "debiased" in rules.metrics:
        picks_Q = arms.debiased(sets.test, found["test"], reader, choice or Choice(0, 1.0, 0.0))
        facts["debiased_Q"] = picks_Q == score.answers(sets.test)
    ids_QK = scored["test"].ids_QK
    right = [frozenset(gold.get(question.id, ())) for question in sets.test]
    read_Q: list[Costs] = [
        {(arm.generator, prompt): _cost(reader, prompt) for prompt in keys}
        for keys in prompts(sets.test, ids_QK, choice)
    ]
    result = ArmResult.of(
        name,
        sets.test,
        scored["test"],
        choice,
        reader.labels(sets.test),
        contexts=tuple(reader.contexts(sets.test)),
        generator=arm.generator,
        retriever=arm.retriever,
        recall_at_1=score.recall_at(ids_QK, right, 1) if arm.retriever else None,
        recall_at_k=score.recall_at(ids_QK, right, choice.k) if choice else None,
        **total(read_Q),
        asked_beside={part: len(getattr(sets, part)) for part in ("control", "two_hop")},
        **_beside(sets, scored, choice),
        **facts,
    )
    return Trial(result, scored, read_Q)


def total(read_Q: Sequence[Costs]) -> dict[str, Any]:
    """What reading took in all, and the mean operations of a question, as ArmResult calls it.

    What was read once for several prompts counts among the operations of each.
    """
    costs = [cost for read in read_Q for cost in read.values()]
    flops = [cost[3] for cost in costs]
    return {
        "eval_tokens": sum(cost[0] for cost in costs),
        "eval_seconds": sum(cost[1] for cost in costs),
        "dropped_chunks": sum(cost[2] for cost in costs),
        "inference_flops": None if None in flops else sum(filter(None, flops)) / len(read_Q),
    }


def _choose(
    name: str, arm: Arm, sets: QuestionSets, scored: Mapping[str, Scores], rules: Rules
) -> tuple[Choice, dict[str, Any]]:
    """What validation chooses, and beside it every other K, the best of each reading, the oracle.

    The controls get no oracle: nobody would pick their K.
    """
    answers_Q, ks = score.answers(sets.test), rules.of(arm)
    if not sets.validation:
        assert len(ks) == 1, f"{name}: nothing to choose among {ks} on"
        return Choice(ks[0], 1.0, math.nan), {}
    validated = score.answers(sets.validation)
    rows = select.by_k(scored["validation"], validated, ks, rules.readings)
    at_k = [
        AtK(row, score.predict(read(scored["test"], row)) == answers_Q)
        for row in rows
        if row.k > 1 or row.reading == rules.readings[0]  # below, the readings are the same
    ]
    best = {
        reading: select.choose(scored["validation"], validated, ks, [reading])
        for reading in rules.readings
    }
    oracle = select.oracle_on_test(scored["test"], answers_Q, ks, rules.readings)
    return select.choose(scored["validation"], validated, ks, rules.readings), {
        "by_k": tuple(at_k),
        "oracle": oracle if name not in CONTROLS else None,
        "readings": {reading: _reading(sets, scored, chosen) for reading, chosen in best.items()},
    }


def _reading(sets: QuestionSets, scored: Mapping[str, Scores], choice: Choice) -> dict[str, Any]:
    right_Q = score.predict(read(scored["test"], choice)) == score.answers(sets.test)
    return {
        "k": choice.k,
        "temperature": choice.temperature,
        "validation_accuracy": choice.validation_accuracy,
        "right": int(right_Q.sum()),
        **_beside(sets, scored, choice),
    }


def _beside(
    sets: QuestionSets, scored: Mapping[str, Scores], choice: Choice | None
) -> dict[str, float | None]:
    """Accuracy on the control and two-hop questions, read as `choice` says."""

    def accuracy(part: str) -> float | None:
        if part not in scored:
            return None
        picks_Q = score.predict(read(scored[part], choice))
        return float(np.mean(picks_Q == score.answers(getattr(sets, part))))

    return {"control_accuracy": accuracy("control"), "two_hop_accuracy": accuracy("two_hop")}


def read(scores: Scores, choice: Choice | None) -> score.Floats:
    """log p(choice | question) in nats [Q, C] as chosen; None, and without chunks: closed book."""
    chosen = choice or Choice(0, 1.0, 0.0)
    k = min(chosen.k, scores.retrieved)
    return score.read(scores, chosen.reading, k, chosen.temperature)


def prompts(
    questions: Sequence[Question], ids_QK: score.Ints, choice: Choice | None
) -> Iterator[list[Key]]:
    """What the arm reads to answer each question, of all that was scored to choose its K."""
    k = choice.k if choice else 0
    alone = k > 1 and choice is not None and choice.reading == "marginal"
    for question, row in zip(questions, ids_QK[:, :k].tolist(), strict=True):
        yield [(question.id, (i,)) for i in row] if alone else [(question.id, tuple(row))]


def _cost(reader: Reader, prompt: Key) -> tuple[int, float, int, float | None]:
    dropped, flops = reader.dropped.get(prompt, 0), reader.flops.get(prompt)
    return reader.tokens[prompt], reader.seconds[prompt], dropped, flops

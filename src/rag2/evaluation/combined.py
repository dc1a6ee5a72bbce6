"""A hybrid on every set of questions, from what its two members answered: nothing is read anew.

Letters: Q questions, M the two members, C choices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rag2.evaluation import score, trial
from rag2.evaluation.hybrids import Combined, Hybrid, Said
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.select import Choice
from rag2.evaluation.trial import Costs, QuestionSets, Trial


def run(
    name: str, hybrid: Hybrid, sets: QuestionSets, closed: Trial, retrieving: Trial
) -> ArmResult:
    """The hybrid's answers to the test questions, its parameters chosen on validation.

    Its cost is what it really read: a prompt that both members share counts once.
    """
    parts = [part for part in trial.PARTS if getattr(sets, part)]
    said = {part: (_said(closed, part), _said(retrieving, part)) for part in parts}
    answers = {part: score.answers(getattr(sets, part)) for part in parts}
    parameters = hybrid.choose(*said["validation"], answers["validation"])
    answered = {part: hybrid.apply(*said[part], parameters) for part in parts}
    accuracy = {
        part: float(np.mean(score.predict(found.logp_QC) == answers[part]))
        for part, found in answered.items()
    }
    first, second = closed.result, retrieving.result
    chosen = second.choice
    assert chosen is not None and second.k is not None, f"{name}: its member chose no K"
    shares = {part: _share(found, second.k) for part, found in answered.items()}
    return ArmResult(
        name=name,
        questions=first.questions,
        logp_QC=answered["test"].logp_QC,
        labels=first.labels,
        contexts=first.contexts,
        generator=" + ".join(dict.fromkeys([first.generator, second.generator])),
        reading=second.reading,
        k=second.k,
        temperature=second.temperature,
        retrieved=_retrieved(retrieving, chosen, answered["test"]),
        choice=Choice(
            chosen.k,
            chosen.temperature,
            accuracy["validation"],
            chosen.reading,
            tuple(parameters.items()),
        ),
        control_accuracy=accuracy.get("control"),
        two_hop_accuracy=accuracy.get("two_hop"),
        asked_beside=first.asked_beside,
        members=hybrid.members,
        retrieved_share=shares["test"],
        control_retrieved_share=shares.get("control"),
        over_choices=hybrid.over_choices,
        **{key: getattr(second, key) for key in ("retriever", "recall_at_1", "recall_at_k")},
        **trial.total(_read(answered["test"], closed.read_Q, retrieving.read_Q)),
    )


def _said(member: Trial, part: str) -> Said:
    scores = member.scored[part]
    return Said(trial.read(scores, member.result.choice), scores.scores_QK)


def _share(found: Combined, k: int) -> float:
    """Share of the questions for which chunks were read."""
    return float(np.mean(found.read_QM[:, 1])) if k else 0.0


def _retrieved(member: Trial, choice: Choice, found: Combined) -> tuple[tuple[Any, ...], ...]:
    """The chunks that were read for each question, with the posterior of the hybrid's answer."""
    rows = score.retrieved(
        member.scored["test"],
        choice.reading,
        choice.k,
        choice.temperature,
        score.predict(found.logp_QC),
    )
    reads_Q = found.read_QM[:, 1].tolist()
    return tuple(row if reads else () for row, reads in zip(rows, reads_Q, strict=True))


def _read(found: Combined, *members: Sequence[Costs]) -> list[Costs]:
    """What was read for each question: of both members, a prompt they share once."""
    read_Q: list[Costs] = []
    for row, reads_M in enumerate(found.read_QM.tolist()):
        costs: dict[Any, Any] = {}
        for member, reads in zip(members, reads_M, strict=True):
            if reads:
                costs |= member[row]
        read_Q.append(costs)
    return read_Q

"""Scores and the K chosen -> what an arm answered to every test question, and at what cost."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rag2.evaluation import score
from rag2.evaluation.score import Bools, Floats, Ints, Scores
from rag2.evaluation.select import Choice, Oracle
from rag2.types import Question, Retrieved


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArmResult:
    """One arm's answers to the test questions, with what it took to get them.

    `retriever` (warm, bm25, joint, ...; None for closed book), `generator` (base, ft, sft, joint)
    and `reading` (closed, marginal, ...) say what the arm is made of; `logp_QC` holds the final
    log-likelihoods in nats and `lengths_QC` the choices' characters; `k` and `temperature` are
    what it was tested with (None after pooling seeds that differ); `recall_at_k` is at that k.
    `dropped_chunks` counts those the prompt had no room for, which were then not read.
    `choice` (validation) and `oracle` (test, hindsight) are None for arms that chose nothing.
    """

    name: str
    questions: tuple[Question, ...]
    logp_QC: Floats
    lengths_QC: Ints
    generator: str = "base"
    retriever: str | None = None
    reading: str = "closed"
    k: int | None = 0
    temperature: float | None = 1.0
    retrieved: tuple[tuple[Retrieved, ...], ...] = ()
    choice: Choice | None = None
    oracle: Oracle | None = None
    recall_at_1: float | None = None
    recall_at_k: float | None = None
    control_accuracy: float | None = None
    two_hop_accuracy: float | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    trained_parameters: int = 0
    dropped_chunks: int = 0

    def __post_init__(self) -> None:
        assert len(self.questions) == len(self.logp_QC) > 0, (self.name, self.logp_QC.shape)
        assert self.logp_QC.shape == self.lengths_QC.shape, (self.name, self.lengths_QC.shape)
        assert len(self.retrieved) in (0, len(self.questions)), (self.name, len(self.retrieved))

    @classmethod
    def of(
        cls,
        name: str,
        questions: Sequence[Question],
        scores: Scores,
        choice: Choice | None = None,
        **facts: Any,
    ) -> "ArmResult":
        """The result of reading `scores` as `choice` says; without a choice, closed book."""
        k, temperature = (choice.k, choice.temperature) if choice else (0, 1.0)
        logp_QC = score.marginal(scores, k, temperature)
        return cls(
            name=name,
            questions=tuple(questions),
            logp_QC=logp_QC,
            lengths_QC=scores.lengths_QC,
            k=k,
            temperature=temperature,
            retrieved=score.retrieved(scores, k, temperature, score.predict(logp_QC)),
            choice=choice,
            **facts,
        )

    @property
    def predictions(self) -> Ints:
        """Index of the choice picked for each question [Q]."""
        return score.predict(self.logp_QC)

    @property
    def correct(self) -> Bools:
        """Whether each pick is right [Q]; `accuracy` and every test count these."""
        return self.predictions == score.answers(self.questions)

    @property
    def correct_norm(self) -> Bools:
        """Whether the pick by log-likelihood per character is right [Q]."""
        picks_Q = score.predict_norm(self.logp_QC, self.lengths_QC)
        return picks_Q == score.answers(self.questions)

    @property
    def accuracy(self) -> float:
        """Share of questions answered right."""
        return float(np.mean(self.correct))


def pool(runs: Sequence[ArmResult]) -> ArmResult:
    """One arm's runs with several seeds as one: records concatenated, means of the rest."""
    assert runs and len({run.name for run in runs}) == 1, [run.name for run in runs]
    widest = max(run.logp_QC.shape[1] for run in runs)

    def joined(arrays: Iterable[np.ndarray], missing: float) -> np.ndarray:
        return np.concatenate(
            [
                np.pad(array, ((0, 0), (0, widest - array.shape[1])), constant_values=missing)
                for array in arrays
            ]
        )

    def mean(field: str) -> float | None:
        values = [getattr(run, field) for run in runs]
        return None if None in values else float(np.mean(values))

    def same(field: str) -> Any:
        values = {getattr(run, field) for run in runs}
        return values.pop() if len(values) == 1 else None

    means = ("recall_at_1", "recall_at_k", "control_accuracy", "two_hop_accuracy")
    return replace(
        runs[0],
        questions=tuple(itertools.chain.from_iterable(run.questions for run in runs)),
        logp_QC=joined((run.logp_QC for run in runs), -np.inf),
        lengths_QC=joined((run.lengths_QC for run in runs), 0),
        retrieved=tuple(itertools.chain.from_iterable(run.retrieved for run in runs)),
        **{field: same(field) for field in ("k", "temperature", "choice", "oracle")},
        **{field: mean(field) for field in (*means, "train_seconds", "eval_seconds")},
    )

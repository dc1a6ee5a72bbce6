"""Scores and the K chosen -> what an arm answered to every test question, and at what cost."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rag2.evaluation import score
from rag2.evaluation.score import Bools, Floats, Ints, Scores
from rag2.evaluation.select import Choice, Oracle
from rag2.types import Question, Retrieved

WARM = 3  # questions asked before the first whose time counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArmResult:
    """One arm's answers to the test questions, with what it took to get them.

    `retriever` (warm, bm25, joint, ...; None for closed book), `generator` (base, ft, sft, joint)
    and `reading` (closed, marginal, concat) say what the arm is made of; `logp_QC` holds the final
    log-likelihoods in nats of the choices' `labels` (their letters, or their texts); `contexts` are
    the prompts without passages; `k` and `temperature` are what it was tested with (None after
    pooling seeds that differ); `recall_at_k` is at that k. `unconditional_QC` is log p(choice)
    without any context, `debiased_Q` which questions are right when the choices take turns at every
    place; None where not asked for.
    `dropped_chunks` counts those the prompt had no room for, which were then not read.
    `unrelated_nats` are the generator's a token of text that is not about the corpus.
    The costs are those of docs/advice.md, None where not known; `latency_ms` has each question's.
    `choice` (validation) and `oracle` (test, hindsight) are None for arms that chose nothing;
    `by_k` has every K and reading with what validation would choose for it; `readings` the best of
    each reading with its accuracies on other question sets.
    A hybrid names its `members`, has the retrieving one's reading, K and recall, and tells for
    which share of the questions it read chunks; `over_choices`: its log p is normalised over the
    choices, so that no pick by length is to be had from it.
    """

    name: str
    questions: tuple[Question, ...]
    logp_QC: Floats
    labels: tuple[tuple[str, ...], ...]
    contexts: tuple[str, ...] = ()
    generator: str = "base"
    retriever: str | None = None
    reading: str = "closed"
    k: int | None = 0
    temperature: float | None = 1.0
    retrieved: tuple[tuple[Retrieved, ...], ...] = ()
    unconditional_QC: Floats | None = None
    debiased_Q: Bools | None = None
    choice: Choice | None = None
    oracle: Oracle | None = None
    by_k: tuple["AtK", ...] = ()
    readings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recall_at_1: float | None = None
    recall_at_k: float | None = None
    control_accuracy: float | None = None
    unrelated_nats: float | None = None
    two_hop_accuracy: float | None = None
    asked_beside: Mapping[str, int] = field(default_factory=dict)
    train_seconds: float | None = 0.0
    eval_seconds: float = 0.0
    eval_tokens: int | None = None
    peak_memory_bytes: int | None = None
    trained_parameters: int | None = 0
    train_tokens: float | None = None
    ship_bytes: float | None = None
    inference_flops: float | None = None
    document_seconds: float | None = None
    latency_ms: tuple[float, ...] = ()
    dropped_chunks: int = 0
    members: tuple[str, ...] = ()
    retrieved_share: float | None = None
    control_retrieved_share: float | None = None
    over_choices: bool = False

    def __post_init__(self) -> None:
        assert len(self.questions) == len(self.logp_QC) > 0, (self.name, self.logp_QC.shape)
        assert len(self.labels) == len(self.questions), (self.name, len(self.labels))
        assert len(self.retrieved) in (0, len(self.questions)), (self.name, len(self.retrieved))

    @classmethod
    def of(
        cls,
        name: str,
        questions: Sequence[Question],
        scores: Scores,
        choice: Choice | None = None,
        labels: Sequence[Sequence[str]] | None = None,
        **facts: Any,
    ) -> "ArmResult":
        """The result of reading `scores` as `choice` says; without a choice, closed book."""
        chosen = choice or Choice(0, 1.0, 0.0)
        settings = chosen.reading, chosen.k, chosen.temperature
        logp_QC = score.read(scores, *settings)
        return cls(
            name=name,
            questions=tuple(questions),
            logp_QC=logp_QC,
            labels=tuple(map(tuple, labels or [question.choices for question in questions])),
            reading=chosen.reading if choice else "closed",
            k=chosen.k,
            temperature=chosen.temperature,
            retrieved=score.retrieved(scores, *settings, score.predict(logp_QC)),
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
        return self._right_by(score.predict_norm(self.logp_QC, score.lengths(self.labels)))

    @property
    def correct_bytes(self) -> Bools:
        """Whether the pick by log-likelihood per UTF-8 byte is right [Q]."""
        lengths_QC = score.lengths(self.labels, bytewise=True)
        return self._right_by(score.predict_norm(self.logp_QC, lengths_QC))

    @property
    def correct_by_length(self) -> dict[str, Bools]:
        """Both by the names they have in results.json; none where log p is over the choices."""
        if self.over_choices:
            return {}
        return {"acc_norm": self.correct_norm, "acc_bytes": self.correct_bytes}

    @property
    def correct_mutual(self) -> Bools | None:
        """Whether the pick by mutual information with the context is right [Q]."""
        if self.unconditional_QC is None:
            return None
        return self._right_by(score.predict_mutual(self.logp_QC, self.unconditional_QC))

    def _right_by(self, picks_Q: Ints) -> Bools:
        return picks_Q == score.answers(self.questions)

    @property
    def accuracy(self) -> float:
        """Share of questions answered right."""
        return float(np.mean(self.correct))

    @property
    def latency(self) -> dict[str, float] | None:
        """Median and 95th percentile in ms, of how many questions, after how many; None if none."""
        if not self.latency_ms:
            return None
        p50, p95 = np.percentile(self.latency_ms, [50, 95])
        return {"p50": float(p50), "p95": float(p95), "n": len(self.latency_ms), "warmup": WARM}


@dataclass(frozen=True, slots=True, eq=False)
class AtK:
    """What an arm would have been with another K or reading: the choice, and who is right [Q]."""

    choice: Choice
    correct_Q: Bools


def pool(runs: Sequence[ArmResult]) -> ArmResult:
    """One arm's runs with several seeds as one: records concatenated, means of the rest."""
    assert runs and len({run.name for run in runs}) == 1, [run.name for run in runs]
    widest = max(run.logp_QC.shape[1] for run in runs)

    def joined(arrays: Iterable[np.ndarray], missing: float) -> np.ndarray:
        return np.concatenate(
            [
                array
                if array.ndim == 1
                else np.pad(array, ((0, 0), (0, widest - array.shape[1])), constant_values=missing)
                for array in arrays
            ]
        )

    def mean(key: str) -> float | None:
        values = [getattr(run, key) for run in runs]
        return None if None in values else float(np.mean(values))

    def same(key: str) -> Any:
        values = {getattr(run, key) for run in runs}
        return values.pop() if len(values) == 1 else None

    def all_or_none(key: str, missing: float) -> np.ndarray | None:
        arrays = [getattr(run, key) for run in runs]
        return None if any(array is None for array in arrays) else joined(arrays, missing)

    def most(key: str) -> Any:
        values = [getattr(run, key) for run in runs]
        return None if None in values else max(values)

    def total(key: str) -> Any:
        values = [getattr(run, key) for run in runs]
        return None if None in values else sum(values)

    means = ("recall_at_1", "recall_at_k", "control_accuracy", "two_hop_accuracy")
    means += ("unrelated_nats",)
    means += ("train_seconds", "eval_seconds", "train_tokens", "ship_bytes", "inference_flops")
    means += ("retrieved_share", "control_retrieved_share")
    return replace(
        runs[0],
        questions=tuple(itertools.chain.from_iterable(run.questions for run in runs)),
        logp_QC=joined((run.logp_QC for run in runs), -np.inf),
        labels=tuple(itertools.chain.from_iterable(run.labels for run in runs)),
        contexts=tuple(itertools.chain.from_iterable(run.contexts for run in runs)),
        unconditional_QC=all_or_none("unconditional_QC", -np.inf),
        debiased_Q=all_or_none("debiased_Q", 0),
        by_k=(),  # what validation chooses at a K differs from seed to seed
        readings={},
        retrieved=tuple(itertools.chain.from_iterable(run.retrieved for run in runs)),
        reading=same("reading") or "mixed",
        **{key: same(key) for key in ("k", "temperature", "choice", "oracle")},
        **{key: mean(key) for key in (*means, "document_seconds")},
        **{key: total(key) for key in ("eval_tokens", "dropped_chunks")},
        peak_memory_bytes=most("peak_memory_bytes"),
        latency_ms=tuple(itertools.chain.from_iterable(run.latency_ms for run in runs)),
        asked_beside=dict(sum((Counter(run.asked_beside) for run in runs), Counter())),
    )

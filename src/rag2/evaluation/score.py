"""Log-likelihoods per (question, chunk, choice) -> the choice an arm picks, and why.

Letters: Q questions, K retrieved chunks (best first), C choices. A question with fewer than C
choices has log-probability -inf and length 0 in the columns it lacks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax

from rag2.types import Question, Retrieved

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Reading = Literal["marginal", "concat"]
READINGS: tuple[Reading, ...] = ("marginal", "concat")


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one arm's models say about a set of questions, before K and temperature are chosen.

    `logp_QKC` is log p(choice | question, chunk k), `concat[k]` is log p(choice | question, the
    best k chunks in one prompt) [Q, C] for some k > 1, and `closed_QC` log p(choice | question),
    all in nats summed over the tokens of the choice; `scores_QK` are retrieval scores in retrieval
    order (re-scored or fused lists need not fall), -inf where fewer than K chunks were found;
    `ids_QK` are chunk ids.
    """

    logp_QKC: Floats
    closed_QC: Floats
    scores_QK: Floats
    ids_QK: Ints
    concat: Mapping[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        questions, retrieved, choices = self.logp_QKC.shape
        for array in (self.closed_QC, *self.concat.values()):
            assert array.shape == (questions, choices), (array.shape, self.logp_QKC.shape)
        for array in (self.scores_QK, self.ids_QK):
            assert array.shape == (questions, retrieved), (array.shape, self.logp_QKC.shape)
        for array in (self.logp_QKC, self.closed_QC, self.scores_QK, *self.concat.values()):
            assert array.dtype == np.float64, array.dtype
            assert not np.isnan(array).any() and not np.isposinf(array).any()
        if retrieved:
            assert np.isfinite(self.scores_QK[:, 0]).all(), "a question without any chunk"

    @property
    def retrieved(self) -> int:
        """K, the number of chunks retrieved for each question."""
        return self.logp_QKC.shape[1]

    @classmethod
    def closed_book(cls, closed_QC: Floats) -> "Scores":
        """The scores of an arm that retrieves nothing."""
        questions, choices = closed_QC.shape
        return cls(
            logp_QKC=np.zeros((questions, 0, choices)),
            closed_QC=closed_QC,
            scores_QK=np.zeros((questions, 0)),
            ids_QK=np.zeros((questions, 0), dtype=np.int64),
        )


def read(scores: Scores, reading: Reading, k: int, temperature: float = 1.0) -> Floats:
    """log p(choice | question) in nats [Q, C] from the best `k` chunks.

    `marginal` reads each chunk alone and mixes (see there); `concat` reads them in one prompt, as
    most frozen RAG does. With one chunk, or none, the two are the same.
    """
    assert reading in READINGS, reading
    if reading == "marginal" or k < 2:
        return marginal(scores, k, temperature)
    return scores.concat[k]


def marginal(scores: Scores, k: int, temperature: float = 1.0) -> Floats:
    """log p(choice | question) in nats [Q, C]: the mixture over the best `k` chunks.

    logsumexp_k( log_softmax(scores / temperature)_k + log p(choice | question, chunk k) )

    RAG-Sequence of Lewis et al. 2020. Relations: k = 0 is the closed book, k = 1 reads the
    best chunk alone, temperature -> infinity weighs the k chunks alike.
    """
    assert 0 <= k <= scores.retrieved and temperature > 0, (k, scores.retrieved, temperature)
    if k == 0:
        return scores.closed_QC
    joint_QKC = _log_prior(scores, k, temperature) + scores.logp_QKC[:, :k]
    return np.asarray(logsumexp(joint_QKC, axis=1))


def posterior(scores: Scores, k: int, temperature: float, choice_Q: Ints) -> Floats:
    """p(chunk | question, choice) [Q, k]: how much each chunk supports the choice given."""
    assert 0 <= k <= scores.retrieved and temperature > 0, (k, scores.retrieved, temperature)
    if k == 0:
        return np.zeros((len(choice_Q), 0))
    joint_QKC = _log_prior(scores, k, temperature) + scores.logp_QKC[:, :k]
    joint_QK = joint_QKC[np.arange(len(choice_Q)), :, choice_Q]
    return np.asarray(softmax(joint_QK, axis=1))


def retrieved(
    scores: Scores, reading: Reading, k: int, temperature: float, choice_Q: Ints
) -> tuple[tuple[Retrieved, ...], ...]:
    """The chunks each question was answered from, with the posterior of the choice given.

    Chunks that were read in one prompt have no posterior: nothing tells them apart.
    """
    apart = reading == "marginal" or k < 2
    posterior_QK = posterior(scores, k, temperature, choice_Q) if apart else None
    rows = []
    for row, (ids, values) in enumerate(
        zip(scores.ids_QK[:, :k].tolist(), scores.scores_QK[:, :k].tolist(), strict=True)
    ):
        shares = [None] * len(ids) if posterior_QK is None else posterior_QK[row].tolist()
        found = zip(ids, values, shares, strict=True)
        rows.append(tuple(Retrieved(*item) for item in found if np.isfinite(item[1])))
    return tuple(rows)


def predict(logp_QC: Floats) -> Ints:
    """The most likely choice of each question; ties go to the lowest index, as in lm-eval."""
    return np.argmax(logp_QC, axis=1).astype(np.int64)


def predict_norm(logp_QC: Floats, lengths_QC: Ints) -> Ints:
    """The choice with the highest log-likelihood per unit of length.

    Characters give lm-evaluation-harness's `acc_norm`, bytes its `acc_bytes`.
    """
    return predict(logp_QC / np.maximum(lengths_QC, 1))  # absent choices: -inf / 1


def predict_mutual(logp_QC: Floats, unconditional_QC: Floats) -> Ints:
    """The choice that the context raises most: argmax log p(c|x) - log p(c), `acc_mutual_info`."""
    absent_QC = np.isneginf(logp_QC)
    return predict(logp_QC - np.where(absent_QC, 0.0, unconditional_QC))


def answers(questions: Sequence[Question]) -> Ints:
    """The index of the right choice of each question [Q]."""
    return np.array([question.answer for question in questions], dtype=np.int64)


def lengths(labels: Sequence[Sequence[str]], bytewise: bool = False) -> Ints:
    """Characters (or UTF-8 bytes) of what is scored for each choice [Q, C], without the delimiter.

    0 where a question has fewer choices.
    """
    lengths_QC = np.zeros((len(labels), max(map(len, labels))), dtype=np.int64)
    for row, texts in zip(lengths_QC, labels, strict=True):
        row[: len(texts)] = [len(text.encode("utf-8") if bytewise else text) for text in texts]
    return lengths_QC


def recall_at(ids_QK: Ints, gold_Q: Sequence[frozenset[int]], k: int) -> float | None:
    """Share of questions with a gold chunk among the best `k`; None if no question has one."""
    hits = [
        not gold.isdisjoint(ids[:k].tolist())
        for ids, gold in zip(ids_QK, gold_Q, strict=True)
        if gold
    ]
    return float(np.mean(hits)) if hits and k > 0 else None


def majority_position(train: Sequence[Question]) -> int:
    """The most frequent gold position of training questions; ties go to the lowest index."""
    counts = Counter(question.answer for question in train)
    return min(counts, key=lambda position: (-counts[position], position))


def constant(questions: Sequence[Question], position: int) -> Scores:
    """Scores of a model that always answers `position`: the floor that chance is not.

    With unbalanced gold positions a constant answer beats 1/C (MMLU anatomy: .333 with C).
    """
    widest = max(len(question.choices) for question in questions)
    closed_QC = np.full((len(questions), widest), -np.inf)
    for row, question in zip(closed_QC, questions, strict=True):
        if position < len(question.choices):
            row[position] = 0.0
    return Scores.closed_book(closed_QC)


def _log_prior(scores: Scores, k: int, temperature: float) -> Floats:
    """log p(chunk | question) over the best k [Q, k, 1]."""
    prior_QK = log_softmax(scores.scores_QK[:, :k] / temperature, axis=1)
    return rearrange(np.asarray(prior_QK), "q k -> q k 1")

"""Log-likelihoods per (question, chunk, choice) -> the choice an arm picks, and why.

Letters: Q questions, K retrieved chunks (best first), C choices. A question with fewer than C
choices has log-probability -inf and length 0 in the columns it lacks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp, softmax

from rag2.types import Question, Retrieved

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one arm's models say about a set of questions, before K and temperature are chosen.

    `logp_QKC` is log p(choice | question, chunk k) and `closed_QC` log p(choice | question), both
    in nats summed over the tokens of the choice; `scores_QK` are retrieval scores in retrieval
    order (re-scored or fused lists need not fall), -inf where fewer than K chunks were found;
    `ids_QK` are chunk ids; `lengths_QC` are the choices' lengths in characters.
    """

    logp_QKC: Floats
    closed_QC: Floats
    scores_QK: Floats
    ids_QK: Ints
    lengths_QC: Ints

    def __post_init__(self) -> None:
        questions, retrieved, choices = self.logp_QKC.shape
        for array in (self.closed_QC, self.lengths_QC):
            assert array.shape == (questions, choices), (array.shape, self.logp_QKC.shape)
        for array in (self.scores_QK, self.ids_QK):
            assert array.shape == (questions, retrieved), (array.shape, self.logp_QKC.shape)
        for array in (self.logp_QKC, self.closed_QC, self.scores_QK):
            assert array.dtype == np.float64, array.dtype
            assert not np.isnan(array).any() and not np.isposinf(array).any()
        if retrieved:
            assert np.isfinite(self.scores_QK[:, 0]).all(), "a question without any chunk"

    @property
    def retrieved(self) -> int:
        """K, the number of chunks retrieved for each question."""
        return self.logp_QKC.shape[1]

    @classmethod
    def closed_book(cls, closed_QC: Floats, lengths_QC: Ints) -> "Scores":
        """The scores of an arm that retrieves nothing."""
        questions, choices = closed_QC.shape
        return cls(
            logp_QKC=np.zeros((questions, 0, choices)),
            closed_QC=closed_QC,
            scores_QK=np.zeros((questions, 0)),
            ids_QK=np.zeros((questions, 0), dtype=np.int64),
            lengths_QC=lengths_QC,
        )


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
    scores: Scores, k: int, temperature: float, choice_Q: Ints
) -> tuple[tuple[Retrieved, ...], ...]:
    """The chunks each question was answered from, with the posterior of the choice given."""
    posterior_QK = posterior(scores, k, temperature, choice_Q)
    return tuple(
        tuple(
            Retrieved(int(chunk), float(score), float(share))
            for chunk, score, share in zip(ids, values, shares, strict=True)
            if np.isfinite(score)
        )
        for ids, values, shares in zip(
            scores.ids_QK[:, :k], scores.scores_QK[:, :k], posterior_QK, strict=True
        )
    )


def predict(logp_QC: Floats) -> Ints:
    """The most likely choice of each question; ties go to the lowest index, as in lm-eval."""
    return np.argmax(logp_QC, axis=1).astype(np.int64)


def predict_norm(logp_QC: Floats, lengths_QC: Ints) -> Ints:
    """The choice with the highest log-likelihood per character (lm-eval's `acc_norm`)."""
    return predict(logp_QC / np.maximum(lengths_QC, 1))  # absent choices: -inf / 1


def answers(questions: Sequence[Question]) -> Ints:
    """The index of the right choice of each question [Q]."""
    return np.array([question.answer for question in questions], dtype=np.int64)


def choice_lengths(questions: Sequence[Question]) -> Ints:
    """Characters of each choice [Q, C], without the delimiter before it; 0 where there is none."""
    widest = max(len(question.choices) for question in questions)
    lengths_QC = np.zeros((len(questions), widest), dtype=np.int64)
    for row, question in zip(lengths_QC, questions, strict=True):
        row[: len(question.choices)] = [len(choice) for choice in question.choices]
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
    lengths_QC = choice_lengths(questions)
    count, widest = lengths_QC.shape
    closed_QC = np.full((count, widest), -np.inf)
    if position < widest:
        closed_QC[lengths_QC[:, position] > 0, position] = 0.0
    return Scores.closed_book(closed_QC, lengths_QC)


def _log_prior(scores: Scores, k: int, temperature: float) -> Floats:
    """log p(chunk | question) over the best k [Q, k, 1]."""
    prior_QK = log_softmax(scores.scores_QK[:, :k] / temperature, axis=1)
    return rearrange(np.asarray(prior_QK), "q k -> q k 1")

"""Two arms -> one: their answers are mixed, or one of the two answers each question.

A hybrid is a class here and a line of HYBRIDS. Each member has its own reading, K and temperature
by then; `choose` gets validation questions only.
Letters: Q questions, M the two members (closed book, retrieving), K retrieved chunks, C choices.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from einops import rearrange
from scipy.special import log_softmax

from rag2.evaluation.score import Bools, Floats, Ints, predict

Parameters = Mapping[str, float | str | None]


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What a member says to some questions: log p(choice | question) in nats, and the scores of
    all that its retriever found, best first."""

    logp_QC: Floats
    scores_QK: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The hybrid's log p(choice | question) in nats, and which members were read for it."""

    logp_QC: Floats
    read_QM: Bools


@dataclass(frozen=True, slots=True)
class Hybrid(ABC):
    """How two arms answer as one."""

    closed: str
    """name of the arm that answers by heart"""
    retrieving: str
    """name of the arm that reads chunks"""

    over_choices: ClassVar[bool] = False
    """whether its log p is normalised over the choices, and so none of their texts"""

    @property
    def members(self) -> tuple[str, str]:
        """Closed book, retrieving."""
        return self.closed, self.retrieving

    @abstractmethod
    def choose(self, closed: Said, retrieving: Said, answers_Q: Ints) -> Parameters:
        """What answers most of these questions right."""

    @abstractmethod
    def apply(self, closed: Said, retrieving: Said, parameters: Parameters) -> Combined:
        """The answers with these parameters."""


class Ensemble(Hybrid):
    """log(w p_closed + (1 - w) p_retrieving), each p normalised over the choices of a question.

    w is one of WEIGHTS; of equals that nearest .5, then the smaller one. Relations: w = 0 is the
    retrieving arm, w = 1 the closed book; a member of weight 0 is not read.
    """

    WEIGHTS: ClassVar = tuple(tenth / 10 for tenth in range(11))
    over_choices: ClassVar = True

    def choose(self, closed: Said, retrieving: Said, answers_Q: Ints) -> Parameters:
        """The `weight` of the closed book."""
        tried = sorted(self.WEIGHTS, key=lambda weight: (abs(weight - 0.5), weight))
        right = [
            int(np.sum(predict(_mixture(closed, retrieving, weight)) == answers_Q))
            for weight in tried
        ]
        return {"weight": tried[int(np.argmax(right))]}  # the first of equals

    def apply(self, closed: Said, retrieving: Said, parameters: Parameters) -> Combined:
        """The mixture with this weight."""
        weight = float(parameters["weight"] or 0)
        logp_QC = _mixture(closed, retrieving, weight)
        return Combined(logp_QC, np.tile([weight > 0, weight < 1], (len(logp_QC), 1)))


class Router(Hybrid):
    """Answers closed book unless one signal says that chunks are needed.

    `closed_margin_at_most`: the closed book's log p of its best choice over that of its second one
    is small. `top_score_at_least`, `score_margin_at_least`: the best chunk's score, or its lead
    over the second one, is large. Thresholds are the values seen on validation: what lies beyond
    all of them is answered closed book. Of equals: fewer questions that retrieve, then the first
    signal.
    """

    SIGNALS: ClassVar = ("closed_margin_at_most", "top_score_at_least", "score_margin_at_least")

    def choose(self, closed: Said, retrieving: Said, answers_Q: Ints) -> Parameters:
        """The `signal` and its `threshold`, None if retrieving for no question is best."""
        right_MQ = [predict(said.logp_QC) == answers_Q for said in (closed, retrieving)]
        gain_Q = right_MQ[1].astype(int) - right_MQ[0].astype(int)
        best, chosen = (0, 0), (self.SIGNALS[0], None)
        for signal in self.SIGNALS[: 1 + min(2, retrieving.scores_QK.shape[1])]:
            need_Q = _need(signal, closed, retrieving)
            order_Q = np.argsort(-need_Q, kind="stable")
            # Retrieving for the first so many; questions of equal need are decided alike.
            gained_Q = np.cumsum(gain_Q[order_Q])
            last_Q = np.append(np.diff(need_Q[order_Q]) < 0, True)
            count = int(np.argmax(np.where(last_Q, gained_Q, -len(gain_Q) - 1)))
            if (int(gained_Q[count]), -count - 1) > best:
                best = int(gained_Q[count]), -count - 1
                chosen = signal, float(_sign(signal) * need_Q[order_Q[count]])
        return dict(zip(("signal", "threshold"), chosen, strict=True))

    def apply(self, closed: Said, retrieving: Said, parameters: Parameters) -> Combined:
        """Each question's log p from the member that answers it."""
        signal, threshold = str(parameters["signal"]), parameters["threshold"]
        retrieves_Q = np.zeros(len(closed.logp_QC), dtype=bool)
        if threshold is not None:
            need_Q = _need(signal, closed, retrieving)
            retrieves_Q = need_Q >= _sign(signal) * float(threshold)
        logp_QC = np.where(rearrange(retrieves_Q, "q -> q 1"), retrieving.logp_QC, closed.logp_QC)
        asked_Q = ~retrieves_Q | (signal == "closed_margin_at_most")  # its margin must be known
        return Combined(logp_QC, np.stack([asked_Q, retrieves_Q], axis=1))


def _mixture(closed: Said, retrieving: Said, weight: float) -> Floats:
    with np.errstate(divide="ignore"):  # log 0 = -inf: that member counts for nothing
        weights = np.log([weight, 1 - weight])
    p_closed_QC, p_retrieving_QC = (
        np.asarray(log_softmax(said.logp_QC, axis=1)) for said in (closed, retrieving)
    )
    return np.logaddexp(weights[0] + p_closed_QC, weights[1] + p_retrieving_QC)


def _sign(signal: str) -> int:
    return -1 if signal.endswith("at_most") else 1


def _need(signal: str, closed: Said, retrieving: Said) -> Floats:
    """How much the signal speaks for retrieving [Q]."""
    if signal == "top_score_at_least":
        return retrieving.scores_QK.max(axis=1)
    values = closed.logp_QC if signal == "closed_margin_at_most" else retrieving.scores_QK
    two_Q2 = np.sort(values, axis=1)[:, -2:]
    return _sign(signal) * (two_Q2[:, 1] - two_Q2[:, 0])


HYBRIDS: dict[str, Hybrid] = {
    "ensemble": Ensemble("ft", "frozen_rag"),
    "router": Router("base", "frozen_rag"),
}

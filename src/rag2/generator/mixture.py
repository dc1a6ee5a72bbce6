"""Contexts that vote on every token: p(y_t | x, y_<t) = sum_k w_k p(y_t | x, z_k, y_<t).

With w_k = p(z_k | x, y_<t), which follows Bayes' rule from token to token, the product over the
tokens is the sequence marginal sum_k p(z_k|x) p(y|x,z_k) (RAG-Sequence), so that greedy and sampled
answers come from the distribution that joint training and the harness score. With w_k = p(z_k | x)
it is RAG-Token (both Lewis et al. 2020, section 2.1). One context is plain generation.

Letters: S contexts of an answer, R contexts of all answers, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rag2.generator.head import Model, log_softmax
from rag2.generator.pairs import Ids
from rag2.generator.running import running


@dataclass(slots=True, eq=False)
class Mixture:
    """An answer in the making."""

    contexts: Sequence[Ids]
    log_weights_S: Tensor
    """log p(z|x) in float64; with `moving`, log p(z|x,y_<t)"""
    moving: bool = True
    heads: Sequence[int] | None = None
    """tokens at the start of each context that other questions' contexts begin with, too"""
    shares_S: Tensor | None = field(default=None, init=False)
    """sum over the tokens so far of p(z|x,y_<=t)"""
    length: int = field(default=0, init=False)

    def follow(self, logp_S: Tensor) -> None:
        """Weigh the contexts by what each gave to the token that was taken."""
        after_S = (self.log_weights_S + logp_S).log_softmax(0)
        self.shares_S = after_S.exp() + (0 if self.shares_S is None else self.shares_S)
        self.length += 1
        if self.moving:
            self.log_weights_S = after_S

    def posterior(self) -> list[float]:
        """p(z|x,y) of the answer so far; of weights that stand still, its mean over the tokens."""
        if self.moving or self.shares_S is None:
            return self.log_weights_S.exp().tolist()
        return (self.shares_S / self.length).tolist()


class Mixtures:
    """Answers that are made together, each as if it were alone."""

    def __init__(self, model: Model, remembered: int = 0) -> None:
        """`remembered`: bytes that the starts of contexts may take, to be read once only."""
        self.live: list[Mixture] = []
        self._running = running(model, remembered)
        self._logp_RV = torch.empty(0, 0)

    @torch.no_grad()
    def add(self, mixtures: Sequence[Mixture]) -> None:
        """Read the contexts of more answers."""
        contexts = [ids for mixture in mixtures for ids in mixture.contexts]
        heads = [cut for m in mixtures for cut in m.heads or [0] * len(m.contexts)]
        self._running.add(contexts, heads)
        self.live += mixtures
        self._logp_RV = log_softmax(self._running.logits_RV)

    def next(self) -> list[Tensor]:
        """log p(next token | x, y_<t) in nats [V], float64, of each live answer."""
        return [
            _voted(mixture.log_weights_S, logp_SV)
            for mixture, logp_SV in zip(self.live, self._split(), strict=True)
        ]

    @torch.no_grad()
    def go_on(self, tokens: Sequence[int | None], over: Sequence[bool]) -> None:
        """Append each answer's token, if it has one more; those `over` are live no longer."""
        rows, read, at = [], [], 0
        parts = zip(self.live, self._split(), tokens, over, strict=True)
        for mixture, logp_SV, token, ends in parts:
            assert token is not None or ends
            if token is not None:
                mixture.follow(logp_SV[:, token].double().cpu())
            if not ends:
                rows += range(at, at + len(logp_SV))
                read += [token] * len(logp_SV)
            at += len(logp_SV)
        self.live = [mixture for mixture, ends in zip(self.live, over, strict=True) if not ends]
        self._running.go_on(rows, read)
        self._logp_RV = log_softmax(self._running.logits_RV)

    def drop(self, gone: Sequence[Mixture]) -> None:
        """Make these no further."""
        which = {id(mixture) for mixture in gone}
        kept = [id(mixture) not in which for mixture in self.live]
        rows = [
            stays for m, stays in zip(self.live, kept, strict=True) for _ in range(len(m.contexts))
        ]
        self.live = [mixture for mixture, stays in zip(self.live, kept, strict=True) if stays]
        self._running.keep([row for row, stays in enumerate(rows) if stays])
        self._logp_RV = log_softmax(self._running.logits_RV)

    def _split(self) -> tuple[Tensor, ...]:
        return self._logp_RV.split([len(mixture.contexts) for mixture in self.live])


def _voted(log_weights_S: Tensor, logp_SV: Tensor) -> Tensor:
    """log sum_s w_s p_s [V] in float64."""
    if len(logp_SV) == 1:  # its weight is 1
        return logp_SV[0].double().cpu()
    return (rearrange(log_weights_S, "s -> s 1") + logp_SV.double().cpu()).logsumexp(0)


def log_prior(scores_K: np.ndarray, temperature: float) -> Tensor:
    """log p(z|x) of the chunks read, from their retrieval scores, in float64 [K]."""
    return (torch.from_numpy(scores_K.astype(np.float64)) / temperature).log_softmax(0)

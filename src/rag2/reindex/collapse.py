"""Whether an encoder still tells texts apart: what a collapse looks like, and what follows.

Letters: P sampled chunks, Q probe questions, K found chunks, D embedding.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rag2.config import Config
from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder

logger = logging.getLogger(__name__)
SAMPLE = 1024  # chunks whose embeddings are looked at
ASKED = 256  # validation questions that are searched with
FOUND = 10  # chunks found for each
CUT = 0.1  # what is left of the retriever's learning rate after a cut


@dataclass(frozen=True, slots=True)
class Health:
    """Figures of a generation: how spread its embeddings are, and how varied what it finds."""

    effective_rank: float
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007), 1 to D"""
    mean_cosine: float
    """between two chunks, -1 to 1; 1 where all embeddings point one way"""
    top1_share: float
    """share of the questions whose first chunk is the most frequent first chunk"""
    unique_rate: float
    """distinct chunks among all that are found, as a share of what there could be"""
    skewness: float
    """of N_k, how often each chunk is among the k found (Radovanovic et al. 2010): hubs raise it"""

    @classmethod
    def of(cls, vectors_PD: np.ndarray, found_QK: np.ndarray, chunks: int) -> "Health":
        """Of some embeddings, and of the ids found for some questions among so many chunks."""
        unit_PD = vectors_PD / np.linalg.norm(vectors_PD, axis=1, keepdims=True)
        total = len(unit_PD)
        pairs = max(1, total * (total - 1))
        cosine = (np.square(unit_PD.sum(0, dtype=np.float64)).sum() - total) / pairs
        shares = np.linalg.svd(unit_PD.astype(np.float64), compute_uv=False)
        shares = shares[shares > 0] / shares.sum()
        _, counts = np.unique(found_QK[:, 0], return_counts=True)
        _, times = np.unique(found_QK, return_counts=True)
        often_N = np.concatenate([times, np.zeros(chunks - len(times))])
        centred_N, spread = often_N - often_N.mean(), often_N.std()
        return cls(
            effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
            mean_cosine=float(cosine),
            top1_share=float(counts.max() / len(found_QK)),
            unique_rate=len(times) / found_QK.size,
            skewness=float((centred_N**3).mean() / (spread**3 or 1.0)),  # all equally often: 0
        )


class Guard(Config):
    """What counts as a collapse, measured against the generation that training began with."""

    action: Literal["warn", "cut", "stop"] = "warn"
    """cut: the retriever learns on at a tenth of its rate; stop: the generation is not swapped in,
    and training ends with one line"""
    min_rank: float = Field(default=0.3, ge=0, le=1)
    """effective rank as a share of the first generation's"""
    max_cosine: float = Field(default=0.6, ge=0, le=1)
    """how much of the room between the first generation's mean cosine and 1 may be used up"""
    max_hub: float = Field(default=0.5, gt=0, le=1)
    """share of the questions that may find one and the same chunk first, or twice the share of the
    first generation"""
    min_unique: float = Field(default=0.5, ge=0, le=1)
    """distinct chunks among the found ones as a share of the first generation's"""
    max_skewness: float = Field(default=8.0, ge=0)
    """of how often chunks are found; or three times the first generation's"""

    def complaints(self, first: Health, now: Health) -> list[str]:
        """What is wrong, in words; empty for a healthy generation."""
        found = []
        if now.effective_rank < self.min_rank * first.effective_rank:
            ranks = f"{now.effective_rank:.1f}, at first {first.effective_rank:.1f}"
            found.append(f"effective rank {ranks}")
        if now.mean_cosine > first.mean_cosine + self.max_cosine * (1 - first.mean_cosine):
            found.append(f"mean cosine {now.mean_cosine:.2f}, at first {first.mean_cosine:.2f}")
        if now.top1_share > max(self.max_hub, 2 * first.top1_share):
            found.append(f"{now.top1_share:.0%} of the questions find one chunk first")
        if now.unique_rate < self.min_unique * first.unique_rate:
            rates = f"{now.unique_rate:.1%}, at first {first.unique_rate:.1%}"
            found.append(f"different chunks among all found {rates}")
        if now.skewness > max(self.max_skewness, 3 * first.skewness):
            found.append(f"skewness of finds {now.skewness:.1f}, at first {first.skewness:.1f}")
        return found


class Watchdog:
    """Looks at every generation before training searches it, and remembers the first one."""

    def __init__(
        self,
        guard: Guard,
        encoder: DualEncoder,
        questions: Sequence[str],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` is what a checkpoint has of it; None: the first generation is yet to be seen."""
        self.guard, self.encoder, self.questions = guard, encoder, list(questions[:ASKED])
        state = state or {}
        first, latest = state.get("first_health"), state.get("latest_health")
        self.first = Health(**first) if first else None
        self.latest = Health(**latest) if latest else None
        self.cuts: list[int] = list(state.get("cuts", []))

    @property
    def rate(self) -> float:
        """The share of its learning rate that the retriever has been left with."""
        return CUT ** len(self.cuts)

    def check(self, generation: Generation) -> None:
        """Warn of a generation that has collapsed, cut, or raise UserError, as the guard says."""
        if not self.questions:
            return
        rows_P = np.unique(np.linspace(0, len(generation) - 1, SAMPLE).astype(np.int64))
        queries_QD = embed_corpus(self.encoder, self.questions, side="question")
        _, found_QK = generation.index.search(queries_QD, min(FOUND, len(generation)))
        self.latest = Health.of(generation.index.vectors(rows_P), found_QK, len(generation))
        self.first = self.first or self.latest
        if wrong := self.guard.complaints(self.first, self.latest):
            what = (
                f"the retriever is collapsing (index of step {generation.step}): {'; '.join(wrong)}"
            )
            if self.guard.action == "stop":
                raise UserError(
                    f"{what}. Begin again with a lower lr_retriever, or more candidates by bm25 "
                    "or random, or go on as it is with resume=true guard.action=warn"
                )
            if self.guard.action == "cut":
                self.cuts.append(generation.step)
                what += f"; its learning rate is now {self.rate:g} of what it was"
            logger.warning("%s", what)

    def figures(self) -> dict[str, float]:
        """The health of the generation that was looked at last, for the log."""
        return asdict(self.latest) if self.latest else {}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "first_health": asdict(self.first) if self.first else None,
            "latest_health": asdict(self.latest) if self.latest else None,
            "cuts": self.cuts,
        }

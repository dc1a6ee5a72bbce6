"""How far the index that training searches lags behind the encoder that training changes.

Letters: Q probe questions, M chunks found for each, U distinct ones, D embedding, K compared.
"""

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from rag2.config import Config
from rag2.index.generation import Generation
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder


class Staleness(Config):
    """Embedding drift and overlap of results, measured on what the index finds for some questions.

    The chunks that it finds for `questions` validation questions are encoded anew. `drift` is the
    mean of 1 - cosine between a chunk's stored and new embedding, 0 to 2; `overlap` the share of a
    question's K best of these chunks by stored embeddings that are among its K best by new ones.
    The question is encoded with today's weights in both, as training does. It is an estimate: a
    chunk that the stale index would not find at all is missing in both.
    """

    every: int = Field(default=25, ge=0)
    """training steps between two measurements; 0: never"""
    questions: int = Field(default=16, ge=1)
    found: int = Field(default=16, ge=1)
    """chunks that are looked at for each question"""
    k: int = Field(default=5, ge=1)
    """length of the compared lists"""


class Probe:
    """The questions that staleness is measured by, the same throughout a run."""

    def __init__(self, cfg: Staleness, questions: Sequence[str]) -> None:
        self.cfg, self.questions = cfg, list(questions[: cfg.questions])

    def due(self, step: int) -> bool:
        """Whether to measure after `step`."""
        every = self.cfg.every
        return bool(every and self.questions) and (step + 1) % every == 0

    def measure(self, encoder: DualEncoder, generation: Generation) -> dict[str, float]:
        """`drift` and `overlap` of the generation against the encoder as it is now."""
        queries_QD = embed_corpus(encoder, self.questions, side="question")
        depth = min(self.cfg.found, len(generation))
        _, ids_QM = generation.index.search(queries_QD, depth)
        ids_U = np.unique(ids_QM)
        stale_UD = generation.index.vectors(np.searchsorted(generation.ids_N, ids_U))
        fresh_UD = embed_corpus(encoder, [generation.chunk(i).passage for i in ids_U.tolist()])
        k = min(self.cfg.k, len(ids_U))
        stale_QK, fresh_QK = (_best(queries_QD @ rows_UD.T, k) for rows_UD in (stale_UD, fresh_UD))
        pairs = zip(stale_QK.tolist(), fresh_QK.tolist(), strict=True)
        common = sum(len({*stale} & {*fresh}) for stale, fresh in pairs)
        drift = 1 - _cosines(stale_UD, fresh_UD).mean()
        return {"drift": float(drift), "overlap": common / stale_QK.size}


def _best(scores_QU: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores_QU, axis=1, kind="stable")[:, :k]


def _cosines(a_UD: np.ndarray, b_UD: np.ndarray) -> np.ndarray:
    norms_U = np.linalg.norm(a_UD, axis=1) * np.linalg.norm(b_UD, axis=1)
    return (a_UD * b_UD).sum(1, dtype=np.float64) / norms_U

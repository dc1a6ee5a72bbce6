"""Vectors and words of one state of the knowledge base -> one list, as `rag2.retrieval.Fused`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rag2.live.view import Found
from rag2.registry import UserError
from rag2.retrieval import Fused, combined, unit

Words = Sequence[tuple[int, float]]  # (chunk id, BM25), best first


def checked(weight: float, k: int) -> int:
    """How long both lists have to be; UserError for a weight outside [0, 1], or k < 1."""
    if not 0 <= weight <= 1:
        raise UserError(f"weight={weight}; allowed: 0 (words alone) to 1 (vectors alone)")
    if k < 1:
        raise UserError(f"k={k}; allowed: 1 or more")
    return max(k, Fused.DEPTH)


def fused(dense: Found, words_B: Sequence[Words], weight: float, k: int) -> Found:
    """The k best of each query's two lists of the same chunks, as long as `checked` told.

    The list of vectors ends where there is no chunk any more.
    """
    depth = dense.ids_BK.shape[1]
    if not depth:
        return dense
    lists_B = [
        (dict(zip(ids_K, unit(scores_K), strict=True)), _units(words, depth))
        for scores_K, ids_K, words in zip(
            dense.scores_BK, dense.ids_BK.tolist(), words_B, strict=True
        )
    ]
    scores_BK, ids_BK = combined(lists_B, weight, min(k, depth))
    return replace(dense, scores_BK=scores_BK, ids_BK=ids_BK)


def _units(words: Words, depth: int) -> dict[int, float]:
    """Chunk id -> s' of a list of words; behind its end come chunks of score 0, up to `depth`."""
    end = [0.0] * (len(words) < depth)
    units = unit(np.array([*(score for _, score in words), *end], dtype=np.float32))
    return dict(zip((id for id, _ in words), units, strict=False))

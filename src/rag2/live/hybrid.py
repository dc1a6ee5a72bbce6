"""Vectors and words of one state of the knowledge base -> one list, as `rag2.retrieval.Fused`."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from rag2.live.view import Found, View
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


def fused(
    dense: Found,
    words_B: Sequence[Words],
    namespaces: Collection[str] | None,
    weight: float,
    k: int,
) -> Found:
    """The k best of each query's two lists of the same chunks, as long as `checked` told.

    Behind all that vectors find come the chunks that none finds, as those without a word of the
    query come behind all that words find.
    """
    width, depth = dense.ids_BK.shape[1], checked(weight, k)
    blind = _blind(dense.view, namespaces)[: depth - width] if width < depth else []
    depth = min(depth, width + len(blind))
    if not depth:
        return dense
    lists_B = [
        (
            dict(zip(ids_K, unit(scores_K), strict=True)) | dict.fromkeys(blind, 0.0),
            _units(words, depth),
        )
        for scores_K, ids_K, words in zip(
            dense.scores_BK, dense.ids_BK.tolist(), words_B, strict=True
        )
    ]
    scores_BK, ids_BK = combined(lists_B, weight, min(k, depth))
    return replace(dense, scores_BK=scores_BK, ids_BK=ids_BK)


def _blind(view: View, namespaces: Collection[str] | None) -> list[int]:
    """The chunks of the namespaces that no vector finds, by id."""
    return [
        id for id in sorted(view.blind) if namespaces is None or view.namespace(id) in namespaces
    ]


def _units(words: Words, depth: int) -> dict[int, float]:
    """Chunk id -> s' of a list of words; behind its end come chunks of score 0, up to `depth`."""
    end = [0.0] * (len(words) < depth)
    units = unit(np.array([*(score for _, score in words), *end], dtype=np.float32))
    return dict(zip((id for id, _ in words), units, strict=False))

"""What a run is given -> rows to learn from, and the loss of any of them.

Letters: N training rows.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag2.modes import evaluating
from rag2.registry import UserError
from rag2.types import Chunk, Question

HELD = 2  # rewordings that are held out of each document chosen for validation, as in the paper


@dataclass(frozen=True, slots=True)
class Given:
    """What an objective may learn from; what it does not need is empty."""

    questions: Sequence[Question] = ()
    chunks: Sequence[Chunk] = ()
    paraphrases: Sequence[Chunk] = ()
    """rewordings of documents; `document` names the one"""

    @property
    def passages(self) -> list[Chunk]:
        """Everything to read: the corpus, then its rewordings."""
        return [*self.chunks, *self.paraphrases]

    def __iter__(self) -> Iterator[str | Question]:
        """All of it: what a run that goes on must find as it was."""
        yield from (passage.passage for passage in self.passages)
        yield from self.questions


@dataclass(frozen=True, slots=True)
class Lessons:
    """The rows of an objective: how many tokens of each carry loss, and the loss of some rows.

    `nll(rows)` is the mean of -log p over the tokens of these rows that carry loss, in nats, with
    gradient.
    """

    tokens_N: np.ndarray
    nll: Callable[[Sequence[int]], Tensor]


class Validation:
    """The loss on what is held out, under the names that it has in a run's log."""

    def __init__(self, model: Any, unseen: Lessons | None, size: int) -> None:
        """`size` rows share a forward; without any held out, nothing is measured."""
        self.model, self.unseen, self.size = model, unseen, size

    def measure(self, name: str) -> dict[str, float]:
        """{name: the mean of -log p over every held-out token, in nats}, or nothing."""
        if self.unseen is None:
            return {}
        tokens_N, total = self.unseen.tokens_N, 0.0
        with torch.no_grad(), evaluating(self.model):
            for first in range(0, len(tokens_N), self.size):
                rows = range(first, min(first + self.size, len(tokens_N)))
                total += float(self.unseen.nll(rows)) * int(tokens_N[rows].sum())
        return {name: total / int(tokens_N.sum())}


def first_of_each(paraphrases: Sequence[Chunk], count: int, source: str) -> list[Chunk]:
    """The first `count` rewordings of each document; UserError where no document has so many."""
    seen, kept = Counter[str](), []
    for row in paraphrases:
        seen[row.document] += 1
        if seen[row.document] <= count:
            kept.append(row)
    most = max(seen.values(), default=0)
    if count > most:
        raise UserError(
            f"paraphrases_per_document={count}: {source} has at most {most} of a document"
        )
    return kept


def hold_out(
    paraphrases: Sequence[Chunk], documents: int, seed: int, source: str | None
) -> tuple[list[Chunk], list[Chunk]]:
    """(what is left, what is held out): the last two rewordings of so many random documents.

    Which documents depends on the seed and their ids alone (Ovadia et al. 2024: 240 chunks x 2).
    Raises UserError where fewer have two.
    """
    counts = Counter(row.document for row in paraphrases)
    able = [name for name, count in counts.items() if count >= HELD]
    if source is None:
        raise UserError(
            f"validation={documents}: rewordings are held out, and none are given: set "
            "paraphrases=FILE"
        )
    if len(able) < documents:
        raise UserError(
            f"validation={documents}: {source} has {HELD} rewordings of {len(able)} documents only"
        )
    chosen = set(sorted(able, key=lambda name: _place(seed, name))[:documents])
    left, held, seen = [], [], Counter[str]()
    for row in paraphrases:
        seen[row.document] += 1
        last = seen[row.document] > counts[row.document] - HELD
        (held if row.document in chosen and last else left).append(row)
    return left, held


def _place(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/validation/{name}".encode()).hexdigest()

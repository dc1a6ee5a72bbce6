"""Sequences that a model is continuing together, each a token a step; others may join them.

Letters: R sequences, V vocabulary, L tokens, P positions in the cache.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from rag2.generator.head import Model, Rows, logits_at
from rag2.generator.pairs import Ids, pad, place, token_batches
from rag2.generator.past import Past, shares_past

BATCH_TOKENS = 8192  # padded positions that are read at once


class Running(ABC):
    """R sequences and `logits_RV`, those of the next token of each."""

    logits_RV: Tensor

    def __init__(self, model: Model) -> None:
        self.model = model
        self.logits_RV = torch.empty(0, model.config.get_text_config().vocab_size)

    @abstractmethod
    def add(self, contexts: Sequence[Ids], heads: Sequence[int] | None = None) -> None:
        """Read more sequences, which come after those that run.

        `heads` say how many tokens at the start of each are worth remembering, since other
        sequences will begin with them as well: fewer than all of them.
        """

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in order."""

    @abstractmethod
    def read(self, tokens: Sequence[int]) -> None:
        """Read one token more of each row."""

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep these rows, in order, each with a token more; the others are done."""
        self.keep(rows)
        if rows:
            self.read(tokens)


def running(model: Model, remembered: int = 0) -> Running:
    """No sequence yet; `remembered` is how many bytes of heads may be kept."""
    return Cached(model, Heads(model, remembered)) if shares_past(model) else Anew(model)


class Heads:
    """What the model has read at the start of sequences, those used last; bounded in bytes."""

    def __init__(self, model: Model, most: int) -> None:
        self.model, self.most = model, most
        self.bytes = 0
        self._known: OrderedDict[tuple[int, ...], Past] = OrderedDict()

    def of(self, heads: Sequence[tuple[int, ...]]) -> Past:
        """The past of each head, one row each; those that are not known are read together."""
        fresh = [head for head in dict.fromkeys(heads) if head not in self._known]
        for batch in token_batches([(1, len(head)) for head in fresh], BATCH_TOKENS, 0):
            ids = [fresh[i] for i in batch]
            _, past = Past.nothing(self.model, len(ids)).read(self.model, ids)
            for row, head in enumerate(ids):
                self._known[head] = past.take(torch.tensor([row])).trimmed()
                self.bytes += self._known[head].bytes
        found = []
        for head in heads:
            self._known.move_to_end(head)
            found.append(self._known[head])
        while self.bytes > self.most and self._known:
            _, oldest = self._known.popitem(last=False)
            self.bytes -= oldest.bytes
        return Past.joined(found)


class Cached(Running):
    """Sequences whose past is kept: a step reads one token of each."""

    def __init__(self, model: Model, heads: Heads) -> None:
        super().__init__(model)
        self.heads, self.past = heads, Past.nothing(model, 0)

    def add(self, contexts: Sequence[Ids], heads: Sequence[int] | None = None) -> None:
        """As Running.add; equal sequences, such as those of n answers, are read once."""
        cuts = heads if heads and self.heads.most else [0] * len(contexts)
        logits: list[Tensor] = [torch.empty(0)] * len(contexts)
        pasts: list[Past] = [self.past] * len(contexts)
        whole = [tuple(ids) for ids in contexts]
        first: dict[tuple[int, ...], int] = {}
        for i, ids in enumerate(whole):
            first.setdefault(ids, i)
        for headed in (True, False):
            some = [i for i in first.values() if bool(cuts[i]) == headed]
            shapes = [(1, len(contexts[i])) for i in some]
            for batch in token_batches(shapes, BATCH_TOKENS, 0):
                rows = [some[at] for at in batch]
                known = self._known([contexts[i][: cuts[i]] for i in rows])
                rest = [contexts[i][cuts[i] :] for i in rows]
                logits_RV, past = known.read(self.model, rest)
                for row, i in enumerate(rows):
                    logits[i] = logits_RV[row]
                    pasts[i] = past.take(torch.tensor([row]))
        logits = [logits[first[ids]] for ids in whole]
        pasts = [pasts[first[ids]] for ids in whole]
        self.past = Past.joined([self.past, *pasts]) if len(self.past) else Past.joined(pasts)
        self.logits_RV = torch.cat([self.logits_RV.to(logits[0]), torch.stack(logits)])

    def _known(self, heads: Sequence[Ids]) -> Past:
        if not heads[0]:
            return Past.nothing(self.model, len(heads))
        return self.heads.of([tuple(head) for head in heads])

    def keep(self, rows: Sequence[int]) -> None:
        """As Running.keep."""
        if not rows:
            self.past, self.logits_RV = Past.nothing(self.model, 0), self.logits_RV[:0]
        elif len(rows) < len(self.past):
            index_R = torch.tensor(rows, device=place(self.model))
            self.past = self.past.take(index_R).trimmed()
            self.logits_RV = self.logits_RV[index_R]

    def read(self, tokens: Sequence[int]) -> None:
        """As Running.read."""
        ids = [[token] for token in tokens]
        self.logits_RV, self.past = self.past.read(self.model, ids)


class Anew(Running):
    """Sequences that are read whole at every step, for models whose cache cannot stand padding."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.ids: list[list[int]] = []

    def add(self, contexts: Sequence[Ids], heads: Sequence[int] | None = None) -> None:
        """As Running.add; there is nothing to remember."""
        new = [list(ids) for ids in contexts]
        logits_RV = self._whole(new)
        self.logits_RV = torch.cat([self.logits_RV.to(logits_RV), logits_RV])
        self.ids += new

    def keep(self, rows: Sequence[int]) -> None:
        """As Running.keep."""
        self.ids = [self.ids[row] for row in rows]
        self.logits_RV = self.logits_RV[list(rows)]

    def read(self, tokens: Sequence[int]) -> None:
        """As Running.read."""
        self.ids = [[*row, token] for row, token in zip(self.ids, tokens, strict=True)]
        self.logits_RV = self._whole(self.ids)

    def _whole(self, ids: Sequence[Ids]) -> Tensor:
        ids_RL, mask_RL = pad(ids, place(self.model))
        last_R = ids_RL.shape[1] - mask_RL.sum(1) + 1
        rows = Rows(torch.arange(len(ids), device=ids_RL.device), last_R)
        inputs = {"input_ids": ids_RL, "attention_mask": mask_RL, "use_cache": False}
        return logits_at(self.model, rows, **inputs)[0]

"""What a model has read: a cache whose rows can be copied and read on from.

Letters: R rows, P positions in the cache, L (or q) tokens to read
next, M rows of logits, V vocabulary.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from rag2.generator.head import Model, Rows, logits_at
from rag2.generator.pairs import Ids, every_row, pad, place, virtual_tokens
from rag2.generator.room import Roomy


@dataclass(frozen=True, slots=True)
class Past:
    """R token sequences as the model keeps them; padding may stand anywhere between the tokens."""

    cache: DynamicCache
    mask_RP: Tensor

    @classmethod
    def nothing(cls, model: Model, rows: int) -> "Past":
        """Rows of which the model has read no token yet."""
        mask_RP = torch.zeros(rows, 0, dtype=torch.long, device=place(model))
        cache = DynamicCache(config=model.config)
        layers: list[Any] = [Roomy() if type(one) is DynamicLayer else one for one in cache.layers]
        cache.layers = layers
        return cls(cache, mask_RP)

    @classmethod
    def joined(cls, pasts: Sequence["Past"]) -> "Past":
        """The rows of several pasts one after the other, padded in front."""
        width = max(past.mask_RP.shape[1] for past in pasts)
        cache = copy.copy(pasts[0].cache)
        of_each: Any = zip(*(past.cache.layers for past in pasts), strict=True)
        joined: list[Any] = [Roomy.joined(layers, width) for layers in of_each]
        cache.layers = joined
        masks = [nn.functional.pad(p.mask_RP, (width - p.mask_RP.shape[1], 0)) for p in pasts]
        return cls(cache, torch.cat(masks))

    def __len__(self) -> int:
        return len(self.mask_RP)

    @property
    def bytes(self) -> int:
        """What the cache takes."""
        layers: list[Any] = self.cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def take(self, index_R: Tensor) -> "Past":
        """A copy of the rows at `index_R`, in its order; a row may be taken several times."""
        index_R = index_R.to(self.mask_RP.device)
        cache = _edited(self.cache, lambda at, kind: _rows(self._states(at, kind), index_R))
        return Past(cache, self.mask_RP.index_select(0, index_R))

    def trimmed(self) -> "Past":
        """The same without the positions that are padding in every row."""
        used_P = self.mask_RP.any(0)
        if used_P.all():
            return self
        kept = used_P.nonzero()[:, 0]
        cache = _edited(self.cache, lambda at, kind: self._states(at, kind).index_select(-2, kept))
        return Past(cache, self.mask_RP[:, kept])

    def _states(self, layer: int, kind: str) -> Tensor:
        return getattr(self.cache.layers[layer], kind)

    def read(
        self, model: Model, ids: Sequence[Ids], rows: Rows | None = None
    ) -> tuple[Tensor, "Past"]:
        """Read `ids` after each row: the logits_MV at `rows`, and the longer past.

        `rows` counts in the right-padded ids and is by default the last token of each. The cache
        of this past is used up: take a copy to read on from it twice.
        """
        ids_RL, mask_RL = pad(ids, self.mask_RP.device)
        mask_RP = torch.cat([self.mask_RP, mask_RL], dim=1)
        # Padding is hidden by the mask and takes no position: tokens are counted, not columns.
        # Behind a row's end the count stands still, so that no position is beyond the model's.
        lengths_R1 = self.mask_RP.sum(1, keepdim=True)
        if rows is None:
            index_R = torch.arange(len(ids), device=ids_RL.device)
            rows = Rows(index_R, ids_RL.shape[1] - mask_RL.sum(1) + 1)
        logits_MV, output = logits_at(
            model,
            rows,
            input_ids=ids_RL,
            attention_mask=mask_RP,
            position_ids=lengths_R1 + mask_RL.cumsum(1) - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_MV, Past(output.past_key_values, mask_RP)

    def branch(self, model: Model, branches: Sequence[Sequence[Ids]]) -> Tensor:
        """Read several alternatives after each row at once, each as if it were alone.

        The logits_MV of all their tokens, row after row. They stand one behind the other in one
        sequence, and a mask keeps each from seeing the others, so that nothing is copied or padded
        for them. The cache of this past is used up.
        """
        device = self.mask_RP.device
        ids = [[token for branch in row for token in branch] for row in branches]
        ids_RL, mask_RL = pad(ids, device)
        which = [[number for number, b in enumerate(row) for _ in b] for row in branches]
        which_RL, _ = pad(which, device)
        step_RL, _ = pad(
            [[step for b in row for step in range(len(b))] for row in branches], device
        )
        same_RLL = rearrange(which_RL, "r q -> r q 1") == rearrange(which_RL, "r l -> r 1 l")
        earlier_LL = torch.ones_like(same_RLL[0]).tril()
        own_RLL = same_RLL & earlier_LL & rearrange(mask_RL.bool(), "r l -> r 1 l")
        before_RLP = repeat(self.mask_RP.bool(), "r p -> r l p", l=ids_RL.shape[1])
        hidden_RLP = ~torch.cat([before_RLP, own_RLL], dim=-1)
        dtype = model.get_input_embeddings().weight.dtype
        bias_RLP = torch.zeros(hidden_RLP.shape, dtype=dtype, device=device)
        bias_RLP.masked_fill_(hidden_RLP, torch.finfo(dtype).min)
        logits_MV, _ = logits_at(
            model,
            every_row(ids, device),
            input_ids=ids_RL,
            attention_mask=rearrange(bias_RLP, "r l p -> r 1 l p"),
            position_ids=self.mask_RP.sum(1, keepdim=True) + step_RL,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_MV


def _edited(cache: DynamicCache, states: Callable[[int, str], Tensor]) -> DynamicCache:
    """A copy whose every layer has the keys and values that `states` makes of its number."""
    edited = copy.copy(cache)
    edited.layers = [copy.copy(layer) for layer in cache.layers]
    layers: list[Any] = edited.layers
    for at, layer in enumerate(layers):
        if layer.is_initialized:
            layer.keys, layer.values = states(at, "keys"), states(at, "values")
    return edited


def _rows(states: Tensor, index_R: Tensor) -> Tensor:
    """As states[index_R], several times faster on a CPU.

    Of a single row it is a view: to read on copies it anyway, and never writes into it.
    """
    if states.shape[0] == 1:
        return states.expand(len(index_R), *states.shape[1:])
    return states.index_select(0, index_R)


def shares_past(model: Model) -> bool:
    """Whether a cache can be copied row by row and continued behind padding, under any mask."""
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False  # flash attention knows no mask but the causal one
    if virtual_tokens(model):
        return False  # virtual tokens would be put in front of the cached continuation again
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return False  # positions would be counted through the padding
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)

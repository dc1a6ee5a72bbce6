"""Keys and values of a layer -> one token longer, without copying what is there."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 16  # positions that are made at once


class Roomy(DynamicLayer):
    """Keys and values of a layer, with room behind them for tokens that come one at a time.

    Transformers' own layer copies everything that was read at every token: a third of a step.
    """

    _keys: tuple[Tensor, Tensor] | None = None  # the whole room, and the part in use
    _values: tuple[Tensor, Tensor] | None = None

    @classmethod
    def joined(cls, layers: Sequence[Self], width: int) -> Self:
        """The rows of several layers one after the other, padded in front to so many positions."""
        made = copy.copy(layers[0])
        if made.is_initialized:
            made._keys = _stacked([layer.keys for layer in layers], width)
            made._values = _stacked([layer.values for layer in layers], width)
            made.keys, made.values = made._keys[1], made._values[1]
        return made

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values, these new ones at their end."""
        if not self.is_initialized or key_states.shape[-2] > 1 or torch.is_grad_enabled():
            self._keys = self._values = None
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None
        self._keys = _longer(self._keys, self.keys, key_states)
        self._values = _longer(self._values, self.values, value_states)
        self.keys, self.values = self._keys[1], self._values[1]
        return self.keys, self.values


def _longer(
    room: tuple[Tensor, Tensor] | None, states: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """`new` written behind `states`: in their own room, where they are what is in use of it."""
    length = states.shape[-2]
    if room is None or room[1] is not states or room[0].shape[-2] == length:
        whole = states.new_empty(*states.shape[:-2], length + ROOM, states.shape[-1])
        whole[..., :length, :] = states
    else:
        whole = room[0]
    whole[..., length : length + 1, :] = new
    return whole, whole[..., : length + 1, :]


def _stacked(states: Sequence[Any], width: int) -> tuple[Tensor, Tensor]:
    """All rows in one room, and the part of it in use; each is copied once."""
    _, heads, _, size = states[0].shape
    whole = states[0].new_empty(sum(map(len, states)), heads, width + ROOM, size)
    at = 0
    for some in states:
        rows = whole[at : at + len(some)]
        rows[..., : width - some.shape[-2], :] = 0  # it is hidden, but has to be a number
        rows[..., width - some.shape[-2] : width, :] = some
        at += len(some)
    return whole, whole[..., :width, :]

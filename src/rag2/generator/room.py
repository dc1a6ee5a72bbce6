"""Keys and values of a layer -> one token longer, without copying what is there."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # positions that are made at once


class Roomy(DynamicLayer):
    """Keys and values of a layer, with room behind them for tokens that come one at a time.

    Transformers' own layer copies everything that was read at every token: a third of a step.
    """

    _keys: tuple[Tensor, Tensor] | None = None  # the whole room, and the part in use
    _values: tuple[Tensor, Tensor] | None = None

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

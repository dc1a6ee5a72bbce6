"""model + positions -> the hidden states, or the logits, of those positions only.

Letters: R sequences, L tokens, M positions of interest, H hidden, V vocabulary.

The rows are taken by a pre-hook on the output head during the model's own forward. `logits_to_keep`
is not enough: one index for all sequences cannot name ragged answers, and not every model has it.
Calling the inner decoder is not either: it would skip the virtual tokens of prompt and prefix
tuning. The hook hands the head the wanted rows, or, when the rows themselves are the result, a
single one, so that forward returns in the ordinary way through every wrapper; an exception as an
early exit would cut through the context managers of PEFT and accelerate.

Positions are counted from the end, since virtual tokens lengthen a sequence at its start.
A hook belongs to the model: do not score with one model from two threads at once.
"""

import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Model = Any  # a PreTrainedModel, or what PEFT wrapped around one


@dataclass(frozen=True, slots=True)
class Rows:
    """M positions in R right-padded sequences: which sequence, and how far from its padded end."""

    sequence_M: Tensor
    back_M: Tensor  # 1 = the last position

    def take(self, states_RLH: Tensor) -> Tensor:
        """The states at the rows, [M, H]."""
        length = states_RLH.shape[1]
        index_M = self.sequence_M * length + (length - self.back_M)
        # index_select on flat rows: its backward is much faster than that of [r, l] indexing.
        return rearrange(states_RLH, "r l h -> (r l) h").index_select(0, index_M)


def hidden_at(model: Model, rows: Rows, **inputs: Any) -> Tensor:
    """What the output head reads at `rows`, [M, H], with gradient; the head itself sees one row."""
    taken = []

    def edit(hidden_RLH: Tensor) -> Tensor:
        taken.append(rows.take(hidden_RLH))
        return hidden_RLH[:1, -1:]

    with _head_input(model, edit):
        model(**inputs)
    assert len(taken) == 1, f"the output head ran {len(taken)} times in one forward"
    return taken[0]


def logits_at(model: Model, rows: Rows, **inputs: Any) -> tuple[Tensor, Any]:
    """The model's own logits at `rows`, [M, V], and its output; the head sees no other row."""
    taken = []

    def edit(hidden_RLH: Tensor) -> Tensor:
        taken.append(True)
        return rearrange(rows.take(hidden_RLH), "m h -> 1 m h")

    with _head_input(model, edit):
        output = model(**inputs)
    # A head that is no module, or is not called as one, computes all logits: take ours from them.
    return (output.logits[0] if taken else rows.take(output.logits)), output


@contextmanager
def _head_input(model: Model, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head = _output_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _output_head(model: Model) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


_PLAIN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def plain_weight(model: Model) -> Tensor | None:
    """The head's weight [V, H] if the logits are exactly `hidden W^T`, else None.

    None, with one warning, for a bias, an adapted, quantised or sharded head, softcapping or a
    logit scale: such models go through their own logits. One probe per model finds what no type
    or config tells.
    """
    weight_VH = _bare_weight(_output_head(model))
    if weight_VH is not None:
        if model not in _PLAIN:
            _PLAIN[model] = _probe(model, weight_VH)
        if _PLAIN[model]:
            return weight_VH
    if model not in _WARNED:
        _WARNED.add(model)
        logger.warning("the generator's head is no bare matrix: its full logits are computed")
    return None


def _bare_weight(head: nn.Module | None) -> Tensor | None:
    """Of exactly nn.Linear: a subclass (quantised, LoRA, parametrised) computes something else."""
    if type(head) is not nn.Linear or head.bias is not None:
        return None
    return head.weight if type(head.weight) is nn.Parameter else None


@torch.no_grad()
def _probe(model: Model, weight_VH: Tensor) -> bool:
    """Whether one forward with a chosen head input gives `input W^T`, large logits included."""
    generator = torch.Generator().manual_seed(0)
    hidden_H = torch.randn(weight_VH.shape[1], generator=generator).to(weight_VH.device)
    expected_V = einsum(hidden_H, weight_VH.float(), "h, v h -> v")
    # A cap such as 30 tanh(z / 30) shows only on large logits, whatever the size of the weights.
    scale = 100 / expected_V.abs().max().clamp_min(1e-6)
    given_H = (hidden_H * scale).to(weight_VH.dtype)
    expected_V = einsum(given_H.float(), weight_VH.float(), "h, v h -> v")
    seen = []

    def edit(hidden_RLH: Tensor) -> Tensor:
        seen.append(True)
        return given_H.to(hidden_RLH.dtype).expand(1, 1, -1)

    ids = torch.zeros(1, 2, dtype=torch.long, device=weight_VH.device)
    cuda = [weight_VH.device] if weight_VH.is_cuda else []
    # In training mode dropout would advance the random state, and a resumed run would differ.
    with torch.random.fork_rng(cuda), _head_input(model, edit):
        logits_V = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    error = (logits_V - expected_V).abs().max() if seen else torch.inf
    return bool(error < (0.01 if weight_VH.dtype == torch.float32 else 2.0))


def log_softmax(logits_MV: Tensor) -> Tensor:
    """In fp32, or fp64 for fp64 logits."""
    return logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)).log_softmax(-1)

"""(context, continuation) -> log-probability with gradient: what training learns from.

Letters: R (context, continuation) pairs, L tokens, T continuation tokens, M rows: the continuation
tokens of all pairs in one line, B sequences, V vocabulary. Log-softmax is in fp32, in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from rag2.generator.head import (
    Model,
    Rows,
    hidden_at,
    log_softmax,
    logits_at,
    plain_weight,
)
from rag2.generator.pairs import (
    Pair,
    check_length,
    lay_out,
    length,
    place,
    rounded,
    token_batches,
)
from rag2_kernels import answer_logprob


def answer_logprob_rows(
    model: Model, pairs: Sequence[Pair], batch_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """log p of every continuation token in nats, logp_RT padded with 0, and its mask_RT.

    With gradient; the output head sees only the answers' rows. Given `batch_tokens`, pairs of
    similar length share a forward of at most so many padded tokens, which saves padding, not
    memory. Raises UserError for a sequence longer than the model's positions.
    """
    shapes = [(1, length(pair)) for pair in pairs]
    batches = token_batches(shapes, batch_tokens) if batch_tokens else [list(range(len(pairs)))]
    sequence, logp = [], []
    for batch in batches:
        inputs, rows, labels_M = lay_out(model, [pairs[i] for i in batch])
        sequence.append(torch.tensor(batch, device=labels_M.device)[rows.sequence_M])
        logp.append(_row_logp(model, rows, labels_M, inputs))
    logp_M = torch.cat(logp)
    counts = [len(ids) for _, ids in pairs]
    steps_T = torch.arange(max(counts), device=logp_M.device)
    mask_RT = steps_T < rearrange(torch.tensor(counts, device=logp_M.device), "r -> r 1")
    # Within a pair the rows are in order, so a stable sort by pair is the order of the mask.
    order_M = torch.cat(sequence).argsort(stable=True)
    logp_RT = torch.zeros(mask_RT.shape, dtype=logp_M.dtype, device=logp_M.device)
    return logp_RT.masked_scatter(mask_RT, logp_M[order_M]), mask_RT


@dataclass(frozen=True, slots=True)
class HeadRows:
    """What a bare output head makes the answers' log-probabilities of, for a loss fused with it.

    Row m is a token of the answer of pair `pair_M[m]`, in the order of the pairs.
    """

    hidden_MH: Tensor
    weight_VH: Tensor
    labels_M: Tensor
    pair_M: Tensor


def answer_head_rows(model: Model, weight_VH: Tensor, pairs: Sequence[Pair]) -> HeadRows:
    """The bare head's weight and its inputs at the answers' rows, with gradient.

    Raises UserError for a sequence longer than the model's positions.
    """
    inputs, rows, labels_M = lay_out(model, pairs)
    count, pair_M = len(labels_M), rows.sequence_M
    inputs, rows, _ = rounded(model, inputs, rows, labels_M)
    hidden_MH = hidden_at(model, rows, **inputs, use_cache=False)[:count]
    return HeadRows(hidden_MH, weight_VH, labels_M, pair_M)


def sequence_nll(model: Model, ids_BL: Tensor, weights_BL: Tensor) -> Tensor:
    """Mean of -log p(token | tokens before) in nats, weighted by `weights_BL` at each token.

    The weight of a sequence's first token counts for nothing, since nothing predicts it. Padding
    goes to the right and has weight 0; it needs no mask, for no earlier token can see it. Raises
    UserError for sequences longer than the model's positions.
    """
    check_length(model, ids_BL.shape[1], "lower objective.block or shorten the texts")
    assert ids_BL.shape == weights_BL.shape, f"{tuple(ids_BL.shape)}, {tuple(weights_BL.shape)}"
    ids_BL, weights_BL = ids_BL.to(place(model)), weights_BL.to(place(model))
    weights_BS = weights_BL[:, 1:]
    sequence_M, before_M = weights_BS.nonzero(as_tuple=True)
    assert len(sequence_M), "every weight is 0: there is nothing to learn from"
    rows = Rows(sequence_M, ids_BL.shape[1] - before_M)
    labels_M = ids_BL[:, 1:][sequence_M, before_M]
    weights_M = weights_BS[sequence_M, before_M].float()
    logp_M = _row_logp(model, rows, labels_M, {"input_ids": ids_BL})
    return -(weights_M * logp_M).sum() / weights_M.sum()


def _row_logp(model: Model, rows: Rows, labels_M: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    count, weight_VH = len(labels_M), plain_weight(model)
    inputs, rows, labels_M = rounded(model, inputs, rows, labels_M)
    if weight_VH is None:
        logits_MV, _ = logits_at(model, rows, **inputs, use_cache=False)
        logp_MV = log_softmax(logits_MV)
        return logp_MV.gather(-1, rearrange(labels_M, "m -> m 1"))[:count, 0]
    hidden_MH = hidden_at(model, rows, **inputs, use_cache=False)
    return answer_logprob(hidden_MH, weight_VH, labels_M)[:count]

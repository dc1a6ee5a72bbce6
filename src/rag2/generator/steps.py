"""contexts x continuations -> log p of every token, for weights that do not follow the tokens.

Letters: S contexts, T tokens of a continuation, M rows of logits, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rag2.generator.head import Model, log_softmax, logits_at
from rag2.generator.pairs import Ids, check_pairs, lay_out, length, token_batches
from rag2.generator.past import Past, shares_past
from rag2.modes import evaluating

BATCH_TOKENS = 8192  # padded positions that are read at once


@torch.no_grad()
def step_logprobs(
    model: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
) -> list[Tensor]:
    """log p(y_t | context_s, y_<t) in nats [S, T] of each continuation, float64, on the CPU.

    Each context is read once, where the model's past can be shared. Raises UserError for a sequence
    longer than the model's positions.
    """
    check_pairs(model, [(context, ids) for context in contexts for ids in continuations])
    rows: list[list[Tensor]] = [[] for _ in contexts]
    with evaluating(model):
        for batch in token_batches([(1, len(ids)) for ids in contexts], BATCH_TOKENS, 0):
            some = [contexts[i] for i in batch]
            read = _after_each if shares_past(model) else _whole
            for i, row in zip(batch, read(model, some, continuations), strict=True):
                rows[i] = row
    return [torch.stack(of_one) for of_one in zip(*rows, strict=True)]


def _after_each(
    model: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
) -> list[list[Tensor]]:
    logits_SV, past = Past.nothing(model, len(contexts)).read(model, contexts)
    longer = [ids[:-1] for ids in continuations if len(ids) > 1]
    found = []
    for row, logits_V in enumerate(logits_SV):
        lines = [logits_V[None]]
        if longer:
            lines.append(past.take(torch.tensor([row])).branch(model, [longer]))
        logp_MV, at, logps = log_softmax(torch.cat(lines)), 1, []
        for ids in continuations:
            steps = [0, *range(at, at + len(ids) - 1)]
            at += len(ids) - 1
            logps.append(logp_MV[steps, list(ids)].double().cpu())
        found.append(logps)
    return found


def _whole(
    model: Model, contexts: Sequence[Ids], continuations: Sequence[Ids]
) -> list[list[Tensor]]:
    pairs = [(context, ids) for context in contexts for ids in continuations]
    logps: list[Tensor] = [torch.empty(0)] * len(pairs)
    for batch in token_batches([(1, length(pair)) for pair in pairs], BATCH_TOKENS, 0):
        inputs, rows, labels_M = lay_out(model, [pairs[i] for i in batch])
        logits_MV, _ = logits_at(model, rows, **inputs, use_cache=False)
        logp_M = log_softmax(logits_MV).gather(1, labels_M[:, None])[:, 0].double().cpu()
        parts = logp_M.split([len(pairs[i][1]) for i in batch])
        for i, part in zip(batch, parts, strict=True):
            logps[i] = part
    count = len(continuations)
    return [logps[start : start + count] for start in range(0, len(logps), count)]

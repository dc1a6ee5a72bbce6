"""(context, continuation) -> log-probability: THE quantity of training, evaluation and serving.

Letters: R (context, continuation) pairs, G contexts, L tokens, T continuation tokens, M rows: the
continuation tokens of all pairs in one line, V vocabulary. Log-softmax is in fp32, in nats.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
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
    Ids,
    Pair,
    check_pairs,
    lay_out,
    length,
    place,
    token_batches,
)
from rag2.generator.past import Past, shares_past
from rag2.generator.prefixes import Group, shared_prefixes
from rag2.modes import evaluating
from rag2_kernels import greedy_logprob

# A prefix of fewer tokens, such as the beginning of text alone, is read faster than it is shared.
SHORT = 8
Answer = tuple[float, bool]  # log p(continuation | context) in nats; whether it is the greedy one


@dataclass(frozen=True, slots=True)
class Request:
    """One context and the continuations to score after it, as token ids."""

    context_ids: Ids
    continuations: Sequence[Ids]


# -- evaluation: no gradient ---------------------------------------------------------------------


def choice_logprobs(
    model: Model, requests: Sequence[Request], batch_tokens: int = 8192
) -> list[list[float]]:
    """log p(continuation | context) in nats; raises UserError as `choice_answers` does."""
    return [[logp for logp, _ in row] for row in choice_answers(model, requests, batch_tokens)]


@torch.no_grad()
def choice_answers(
    model: Model, requests: Sequence[Request], batch_tokens: int = 8192
) -> list[list[Answer]]:
    """log p(continuation | context) in nats; what contexts and choices share is read once.

    That is three levels: the tokens with which several contexts begin (the passage that several
    questions found), the rest of each context, the rest of each choice. Each level holds at most
    `batch_tokens` padded cache positions, or one item. Models whose cache cannot be shared
    (sliding windows, recurrent states, virtual tokens) are scored pair by pair. Raises UserError
    for a sequence longer than the model's positions.
    """
    pairs = [(r.context_ids, ids) for r in requests for ids in r.continuations]
    if not shares_past(model):
        answers = iter(_pair_answers(model, pairs, batch_tokens))
        return [[next(answers) for _ in request.continuations] for request in requests]
    check_pairs(model, pairs)
    result: list[list[Answer]] = [[] for _ in requests]
    groups = shared_prefixes([request.context_ids for request in requests])
    alone = Group(0, [i for g in groups if g.shared < SHORT for i in g.members])
    groups = [group for group in groups if group.shared >= SHORT]
    with evaluating(model):
        for batch in token_batches([(1, group.shared) for group in groups], batch_tokens, 0):
            some = [groups[i] for i in batch]
            prefixes = [requests[g.members[0]].context_ids[: g.shared] for g in some]
            _, past = Past.nothing(model, len(some)).read(model, prefixes)
            for i, answers in _group_answers(model, requests, some, past, batch_tokens):
                result[i] = answers
        nothing = Past.nothing(model, 1)
        for i, answers in _group_answers(model, requests, [alone], nothing, batch_tokens):
            result[i] = answers
    return result


def pair_logprobs(model: Model, pairs: Sequence[Pair], batch_tokens: int = 8192) -> list[float]:
    """log p(continuation | context) in nats from one full sequence per pair, in batches."""
    return [logp for logp, _ in _pair_answers(model, pairs, batch_tokens)]


@torch.no_grad()
def _pair_answers(model: Model, pairs: Sequence[Pair], batch_tokens: int) -> list[Answer]:
    result: list[Answer] = [(0.0, False)] * len(pairs)
    with evaluating(model):
        for batch in token_batches([(1, length(p)) for p in pairs], batch_tokens, 0):
            inputs, rows, labels_M = lay_out(model, [pairs[i] for i in batch])
            tokens = _row_answers(model, rows, labels_M, inputs)
            for i, answer in zip(batch, _summed(tokens, rows.sequence_M, len(batch)), strict=True):
                result[i] = answer
    return result


def _row_answers(
    model: Model, rows: Rows, labels_M: Tensor, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """log p of each row's label, and 1 where another token is more likely."""
    # In half precision a model rounds its logits, and so does what others measure with it.
    weight_VH = plain_weight(model)
    if weight_VH is None or weight_VH.dtype.itemsize < 4:
        logits_MV, _ = logits_at(model, rows, **inputs, use_cache=False)
        everything_M = torch.arange(len(labels_M), device=labels_M.device)
        return _picked(log_softmax(logits_MV), everything_M, labels_M)
    hidden_MH = hidden_at(model, rows, **inputs, use_cache=False)
    logp_M, greedy_M = greedy_logprob(hidden_MH, weight_VH, labels_M)
    return logp_M.double(), (~greedy_M).long()


def _group_answers(
    model: Model,
    requests: Sequence[Request],
    groups: Sequence[Group],
    past: Past,
    batch_tokens: int,
) -> Iterator[tuple[int, list[Answer]]]:
    """(index, answers) of each member of the groups; `past` has read their prefixes, one a row."""
    todo = [(row, i, group.shared) for row, group in enumerate(groups) for i in group.members]
    width = past.mask_RP.shape[1]
    shapes = [_cache_shape(requests[i], width - shared) for _, i, shared in todo]
    for batch in token_batches(shapes, batch_tokens, width):
        rows, members, shared = zip(*(todo[j] for j in batch), strict=True)
        start = past.take(torch.tensor(rows, device=place(model)))
        rests = [requests[i].context_ids[n:] for i, n in zip(members, shared, strict=True)]
        choices = [requests[i].continuations for i in members]
        yield from zip(members, _rest_answers(model, start, rests, choices), strict=True)


def _rest_answers(
    model: Model, start: Past, rests: Sequence[Ids], continuations: Sequence[Sequence[Ids]]
) -> list[list[Answer]]:
    """First tokens from the contexts' last logits, the others from one more, cached forward."""
    device = place(model)
    logits_GV, past = start.read(model, rests)
    choices = [(g, ids) for g, group in enumerate(continuations) for ids in group]
    owner_R = torch.tensor([g for g, _ in choices], device=device)
    first_R = torch.tensor([ids[0] for _, ids in choices], device=device)
    tokens = [_picked(log_softmax(logits_GV), owner_R, first_R)]
    choice = [torch.arange(len(choices), device=device)]
    # Choices that differ in their last token alone, as letters after a space do, are read once.
    read = sorted({(g, tuple(ids[:-1])) for g, ids in choices if len(ids) > 1})
    if read:
        rows = sorted({g for g, _ in read})
        if len(rows) < len(rests):
            past = past.take(torch.tensor(rows, device=device))
        logits_MV = past.branch(model, [[ids for g, ids in read if g == row] for row in rows])
        first = dict(zip(read, accumulate((len(ids) for _, ids in read), initial=0), strict=False))
        steps = [
            (r, first[g, tuple(ids[:-1])] + t, ids[t + 1])
            for r, (g, ids) in enumerate(choices)
            for t in range(len(ids) - 1)
        ]
        choice_N, row_N, label_N = torch.tensor(steps, device=device).unbind(1)
        tokens.append(_picked(log_softmax(logits_MV), row_N, label_N))
        choice.append(choice_N)
    logp_N, miss_N = map(torch.cat, zip(*tokens, strict=True))
    answers = iter(_summed((logp_N, miss_N), torch.cat(choice), len(choices)))
    return [[next(answers) for _ in group] for group in continuations]


def _picked(logp_MV: Tensor, row_N: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the labels at the rows, and 1 where another token is the most likely one."""
    # Added up in fp64: the log p of a long text is some hundreds of nats.
    return logp_MV[row_N, label_N].double(), (logp_MV.argmax(-1)[row_N] != label_N).long()


def _summed(tokens: tuple[Tensor, Tensor], sequence_N: Tensor, count: int) -> list[Answer]:
    """The tokens' log p and misses added up for each of `count` sequences."""
    logp_R, miss_R = (
        torch.zeros(count, device=t.device, dtype=t.dtype).index_add_(0, sequence_N, t)
        for t in tokens
    )
    return list(zip(logp_R.tolist(), (miss_R == 0).tolist(), strict=True))


def _cache_shape(request: Request, gap: int) -> tuple[int, int]:
    """(1, length) that a request needs in the cache, with `gap` of padding after its prefix."""
    read = {tuple(ids[:-1]) for ids in request.continuations}
    return 1, len(request.context_ids) + gap + sum(map(len, read))

"""(context, continuation) ids -> log-probability by a whole forward each: the slow reference.

Letters: L tokens, T continuation tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch

from rag2.generator.head import Model
from rag2.generator.logprob import Request
from rag2.generator.pairs import Pair, check_pairs, place
from rag2.modes import evaluating


@torch.no_grad()
def exact_logprobs(model: Model, pairs: Sequence[Pair]) -> list[float]:
    """log p(continuation | context) in nats, equal to the bit to lm-evaluation-harness's.

    That is its order of operations at batch size 1, without its logits cache and with
    `softmax_dtype=float32`: a forward for every pair, without cache and mask; all logits; their
    log-softmax; the last rows. Use it to check a faster path, not to evaluate. Raises UserError
    for a sequence longer than the model's positions, which lm-evaluation-harness would cut.
    """
    check_pairs(model, pairs)
    scores = []
    with evaluating(model):
        for context, continuation in pairs:
            ids_1L = torch.tensor([[*context, *continuation[:-1]]], device=place(model))
            logp_1LV = model(ids_1L).logits.log_softmax(-1, dtype=torch.float32)
            labels_1T1 = torch.tensor([[[token] for token in continuation]], device=place(model))
            logp_1T1 = logp_1LV[:, -len(continuation) :].gather(-1, labels_1T1)
            scores.append(logp_1T1.sum().item())
    return scores


def exact_choices(model: Model, requests: Sequence[Request]) -> list[list[float]]:
    """`exact_logprobs` of every continuation of every request."""
    pairs = [(r.context_ids, ids) for r in requests for ids in r.continuations]
    scores = iter(exact_logprobs(model, pairs))
    return [[next(scores) for _ in request.continuations] for request in requests]

"""text -> (context, continuation) ids -> right-padded tensors and the rows to score.

Letters: R pairs, L tokens, M rows: the continuation tokens of all pairs in one line.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rag2.generator.head import Model, Rows
from rag2.registry import UserError

Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # context ids, continuation ids


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of context and continuation, tokenised together and cut where the context's ids end.

    The semantics of lm-evaluation-harness: whitespace at the end of the context moves to the
    continuation; special tokens as the tokenizer adds them, once; an empty context is the
    beginning-of-text token (or end-of-text where there is none). Raises UserError when no token of
    the continuation is left, as for an empty one.
    """
    spaces = len(context) - len(context.rstrip())
    if context and spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    context_ids = _encode(tokenizer, context) if context else []
    if context_ids:
        whole_ids = _encode(tokenizer, context + continuation)
        continuation_ids = whole_ids[len(context_ids) :]
    else:
        prefix = _prefix(tokenizer)
        continuation_ids = tokenizer.encode(continuation, add_special_tokens=False)
        if continuation_ids[:1] == [prefix]:
            continuation_ids = continuation_ids[1:]
        context_ids = [prefix]
    if not continuation_ids:
        raise UserError(
            f"continuation {continuation!r} has no token of its own after context "
            f"{context[-40:]!r}: it is empty or merges into the context's last token"
        )
    return context_ids, continuation_ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not begins)


def _prefix(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a bos nor an eos token to stand for no context")


def lay_out(model: Model, pairs: Sequence[Pair]) -> tuple[dict[str, Tensor], Rows, Tensor]:
    """Right-padded inputs of the pairs, the rows that predict their continuations, the labels.

    The last token of a pair is a label only: nothing is predicted from it. Raises UserError as
    `check_pair` does.
    """
    device = place(model)
    for pair in pairs:
        check_pair(model, pair)
    ids_RL, mask_RL = pad([[*context, *ids[:-1]] for context, ids in pairs], device)
    sequence_M = [r for r, (_, ids) in enumerate(pairs) for _ in ids]
    back_M = [
        ids_RL.shape[1] - len(context) + 1 - step
        for context, ids in pairs
        for step in range(len(ids))
    ]
    labels_M = torch.tensor([token for _, ids in pairs for token in ids], device=device)
    rows = Rows(torch.tensor(sequence_M, device=device), torch.tensor(back_M, device=device))
    return {"input_ids": ids_RL, "attention_mask": mask_RL}, rows, labels_M


def pad(ids: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask; the padding's id is never looked at."""
    lengths = torch.tensor([len(row) for row in ids])
    ids_RL = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask_RL = torch.arange(ids_RL.shape[1]) < rearrange(lengths, "r -> r 1")
    return ids_RL.to(device), mask_RL.long().to(device)


def length(pair: Pair) -> int:
    """Tokens that the model reads for a pair: all but the last."""
    return len(pair[0]) + len(pair[1]) - 1


def check_pair(model: Model, pair: Pair) -> None:
    """Raise UserError for a pair longer than the model's positions: nothing is cut silently."""
    assert pair[0] and pair[1], "a pair needs at least one token of context and of continuation"
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length(pair) > limit:
        raise UserError(
            f"context and continuation take {length(pair)} tokens, the generator has positions "
            f"for {limit}: lower prompt.budget"
        )


def token_batches(shapes: Sequence[tuple[int, int]], batch_tokens: int) -> list[list[int]]:
    """Indices of (rows, length) items, longest first, in batches of <= `batch_tokens` padded."""
    batches: list[list[int]] = []
    rows = width = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1]):
        rows += shapes[i][0]
        if not batches or rows * width > batch_tokens:
            batches.append([])
            rows, width = shapes[i]
        batches[-1].append(i)
    return batches


def place(model: Model) -> torch.device:
    """The device of the token embeddings, where inputs go."""
    return model.get_input_embeddings().weight.device

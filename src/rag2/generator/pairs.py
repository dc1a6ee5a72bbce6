"""text -> (context, continuation) ids -> right-padded tensors and the rows to score.

Letters: R pairs, L tokens, M rows: the continuation tokens of all pairs in one line.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rag2.generator.head import Model, Rows
from rag2.registry import UserError

# Tokens that keep a core busy: a batch of so many need not grow at the price of padding.
ENOUGH = 512
LENGTHS, ROWS = 16, 64  # the steps in which shapes grow in training
Ids = Sequence[int]
Pair = tuple[Ids, Ids]  # context ids, continuation ids


def encode_pairs(
    tokenizer: Any, texts: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Ids of (context, continuation), tokenised together and cut where the context's ids end.

    The semantics of lm-evaluation-harness: whitespace at the end of the context moves to the
    continuation; special tokens as the tokenizer adds them, once; an empty context is the
    beginning-of-text token (or end-of-text where there is none). A text that several pairs share
    is tokenised once. Raises UserError when no token of a continuation is left, as for an empty
    one.
    """
    moved = []
    for context, continuation in texts:
        stem = context.rstrip()
        moved.append((stem, context[len(stem) :] + continuation))
    ids = _encode(tokenizer, [text for stem, rest in moved if stem for text in (stem, stem + rest)])
    pairs = []
    for stem, rest in moved:
        context_ids = ids[stem] if stem else []
        if context_ids:
            continuation_ids = ids[stem + rest][len(context_ids) :]
        else:
            prefix = _prefix(tokenizer)
            continuation_ids = tokenizer.encode(rest, add_special_tokens=False)
            if continuation_ids[:1] == [prefix]:
                continuation_ids = continuation_ids[1:]
            context_ids = [prefix]
        if not continuation_ids:
            raise UserError(
                f"continuation {rest!r} has no token of its own after context "
                f"{stem[-40:]!r}: it is empty or merges into the context's last token"
            )
        pairs.append((context_ids, continuation_ids))
    return pairs


def encode_contexts(tokenizer: Any, contexts: Sequence[str]) -> list[list[int]]:
    """Ids of contexts to be continued, special tokens as in `encode_pairs`; white space stays."""
    ids = _encode(tokenizer, [context for context in contexts if context])
    return [ids[context] if context else [_prefix(tokenizer)] for context in contexts]


def _encode(tokenizer: Any, texts: Sequence[str]) -> dict[str, list[int]]:
    """The ids of every distinct text; a text that begins with the bos token gets no second one."""
    bos = tokenizer.bos_token
    ids: dict[str, list[int]] = {}
    for begins in (False, True):
        todo = [
            t for t in dict.fromkeys(texts) if (bos is not None and t.startswith(bos)) == begins
        ]
        if todo:
            rows = tokenizer(todo, add_special_tokens=not begins, return_attention_mask=False)
            ids.update(zip(todo, rows["input_ids"], strict=True))
    return ids


def _prefix(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has neither a bos nor an eos token to stand for no context")


def lay_out(model: Model, pairs: Sequence[Pair]) -> tuple[dict[str, Tensor], Rows, Tensor]:
    """Right-padded inputs of the pairs, the rows that predict their continuations, the labels.

    Raises UserError as `check_pairs` does.
    """
    check_pairs(model, pairs)
    tokens, rows, labels_M = align(pairs, place(model))
    ids_RL, mask_RL = pad(tokens, place(model))
    return {"input_ids": ids_RL, "attention_mask": mask_RL}, rows, labels_M


def align(pairs: Sequence[Pair], device: torch.device) -> tuple[list[list[int]], Rows, Tensor]:
    """The tokens to read for each pair, the rows that predict its continuation, the labels_M.

    The last token of a pair is a label only: nothing is predicted from it.
    """
    tokens = [[*context, *ids[:-1]] for context, ids in pairs]
    width = max(map(len, tokens))
    sequence_M = [r for r, (_, ids) in enumerate(pairs) for _ in ids]
    back_M = [width - len(context) + 1 - step for context, ids in pairs for step in range(len(ids))]
    labels_M = torch.tensor([token for _, ids in pairs for token in ids], device=device)
    rows = Rows(torch.tensor(sequence_M, device=device), torch.tensor(back_M, device=device))
    return tokens, rows, labels_M


def rounded(
    model: Model, inputs: dict[str, Tensor], rows: Rows, labels_M: Tensor
) -> tuple[dict[str, Tensor], Rows, Tensor]:
    """The same with more padding: lengths in steps of LENGTHS, rows, repeating the last, of ROWS.

    Libraries compile a fast product for every shape it is asked for: without this, training in
    reduced precision on a CPU spends a fifth of its time there, and GiB of memory.
    """
    length, limit = inputs["input_ids"].shape[1], positions(model)
    wider = -(-length // LENGTHS) * LENGTHS
    extra = max(0, min(wider, limit or wider) - length)
    spare = -len(labels_M) % ROWS
    return (
        {name: nn.functional.pad(tensor, (0, extra)) for name, tensor in inputs.items()},
        Rows(_repeat_last(rows.sequence_M, spare), _repeat_last(rows.back_M, spare) + extra),
        _repeat_last(labels_M, spare),
    )


def _repeat_last(values_M: Tensor, spare: int) -> Tensor:
    return torch.cat([values_M, values_M[-1:].expand(spare)])


def every_row(tokens: Sequence[Ids], device: torch.device) -> Rows:
    """All positions of the right-padded sequences, those of the first sequence first."""
    width = max(map(len, tokens))
    places = [(r, width - step) for r, ids in enumerate(tokens) for step in range(len(ids))]
    sequence_M, back_M = torch.tensor(places, device=device).unbind(1)
    return Rows(sequence_M, back_M)


def pad(ids: Sequence[Ids], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask; the padding's id is never looked at."""
    lengths = torch.tensor([len(row) for row in ids])
    ids_RL = pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    mask_RL = torch.arange(ids_RL.shape[1]) < rearrange(lengths, "r -> r 1")
    return ids_RL.to(device), mask_RL.long().to(device)


def length(pair: Pair) -> int:
    """Tokens that the model reads for a pair: all but the last."""
    return len(pair[0]) + len(pair[1]) - 1


def check_pairs(model: Model, pairs: Sequence[Pair]) -> None:
    """Raise UserError for a pair longer than the model's positions: nothing is cut silently."""
    for pair in pairs:
        assert pair[0] and pair[1], "a pair needs at least one token of context and of continuation"
        check_length(model, length(pair), "lower prompt.budget")


def check_length(model: Model, tokens: int, remedy: str) -> None:
    """Raise UserError for a sequence longer than the model's positions."""
    limit = positions(model)
    if limit is not None and tokens > limit:
        raise UserError(
            f"a sequence of {tokens} tokens, the generator has positions for {limit}: {remedy}"
        )


def check_room(model: Model, context: int, answer: int, called: str) -> None:
    """Raise UserError if a question's prompt and answer have more tokens than fit the positions.

    `context` and `answer` are their lengths in tokens, `called` the question's id or text.
    """
    check_fits(positions(model), context, answer, called)


def check_fits(limit: int | None, context: int, answer: int, called: str) -> None:
    """The same of so many positions; None: as many as one likes."""
    if limit is not None and context + answer - 1 > limit:
        budget = max(limit - answer + 1, 1)
        raise UserError(
            f"question {called!r}: a prompt of {context} tokens and {answer} of the answer, the "
            f"generator has positions for {limit}: with passages, a prompt budget of {budget} or "
            "less drops some; else take fewer worked examples or shorten the question"
        )


def positions(model: Model) -> int | None:
    """The longest sequence that the model can read, in tokens; None where there is no limit.

    Virtual tokens of prompt and prefix tuning take positions of their own.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - virtual_tokens(model)


def virtual_tokens(model: Model) -> int:
    """How many learned tokens the model reads before each sequence."""
    method: Any = getattr(model, "active_peft_config", None)
    return method.num_virtual_tokens if getattr(method, "is_prompt_learning", False) else 0


def token_batches(
    shapes: Sequence[tuple[int, int]], batch_tokens: int, known: int | None = None
) -> list[list[int]]:
    """Indices of (rows, length) items, longest first, in batches of <= `batch_tokens` padded.

    Given `known`, the first tokens of every item that a cache holds already (they take room, and
    are not computed again), a batch that keeps a core busy takes no item that would be more than
    an eighth padding.
    """
    batches: list[list[int]] = []
    rows = width = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1]):
        rows += shapes[i][0]
        loose = False
        if known is not None:
            busy = (rows - shapes[i][0]) * (width - known) >= ENOUGH
            loose = busy and 8 * (shapes[i][1] - known) < 7 * (width - known)
        if not batches or rows * width > batch_tokens or loose:
            batches.append([])
            rows, width = shapes[i]
        batches[-1].append(i)
    return batches


def place(model: Model) -> torch.device:
    """The device of the token embeddings, where inputs go."""
    return model.get_input_embeddings().weight.device

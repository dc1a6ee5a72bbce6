"""context -> the text that the model continues it with up to the end of the line.

The model's own generation settings (sampling, penalties) are not asked: a text is the argmax of the
same logits that `logprob.py` scores, or drawn from them. Letters: R contexts, L tokens, T steps,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag2.generator.head import Model
from rag2.generator.pairs import Ids, check_room, encode_contexts, token_batches
from rag2.generator.running import running
from rag2.modes import evaluating

# (rows that go on, the step they are at, their logits_RV) -> the next token of each
Pick = Callable[[Sequence[int], int, Tensor], list[int]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Tokens drawn from softmax(logits / temperature); each context has a seed of its own."""

    temperature: float
    seeds: Sequence[int]

    def picker(self, batch: Sequence[int], most: int) -> Pick:
        """Draws for the contexts of a batch: which others are in it changes nothing."""
        uniform_RT = np.stack([_philox(self.seeds[i]).random(most) for i in batch])

        def pick(rows: Sequence[int], step: int, logits_RV: Tensor) -> list[int]:
            chances_RV = torch.softmax(logits_RV.double() / self.temperature, dim=-1)
            below_RV = chances_RV.cumsum(-1).cpu()
            below_R1 = torch.from_numpy(uniform_RT[list(rows), step])[:, None] * below_RV[:, -1:]
            found_R1 = torch.searchsorted(below_RV, below_R1, right=True)
            return found_R1[:, 0].clamp(max=below_RV.shape[1] - 1).tolist()  # a rounded-up sum

        return pick


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Any,
    contexts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    batch_tokens: int = 8192,
    names: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> list[str]:
    """The continuation of each context: its first line, without white space at its ends.

    It is greedy, or drawn by `sampling`, and ends before the first line feed or end-of-text token,
    or after `max_new_tokens`: one number, or one for each context. Contexts of similar length share
    a batch of at most `batch_tokens` padded positions, or one context; padding is masked and takes
    no position, so that the batch does not change a text. Raises UserError for a context that
    leaves the model no positions for `max_new_tokens`; `names` are its questions' ids, for that
    message.
    """
    ids = encode_contexts(tokenizer, contexts)
    most = [max_new_tokens] * len(ids) if isinstance(max_new_tokens, int) else max_new_tokens
    for number, row in enumerate(ids):
        called = names[number] if names else contexts[number][-60:]
        check_room(model, len(row), most[number], called)
    texts = [""] * len(ids)
    shapes = [(1, len(row) + limit) for row, limit in zip(ids, most, strict=True)]
    with evaluating(model):
        for batch in token_batches(shapes, batch_tokens):
            some, limits = [ids[i] for i in batch], [most[i] for i in batch]
            pick = sampling.picker(batch, max(limits)) if sampling else _likeliest
            found = _continue(model, tokenizer, some, limits, pick)
            for i, text in zip(batch, found, strict=True):
                texts[i] = text
    return texts


def _likeliest(rows: Sequence[int], step: int, logits_RV: Tensor) -> list[int]:
    return logits_RV.argmax(-1).tolist()


def _philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def _continue(
    model: Model, tokenizer: Any, contexts: Sequence[Ids], most: Sequence[int], pick: Pick
) -> list[str]:
    """The texts after one batch of contexts."""
    sequences = running(model)
    sequences.add(contexts)
    ends = ends_of(model, tokenizer)
    made: list[list[int]] = [[] for _ in contexts]
    alive = list(range(len(contexts)))
    while alive:
        tokens = pick(alive, len(made[alive[0]]), sequences.logits_RV)
        for row, token in zip(alive, tokens, strict=True):
            made[row].append(token)
        # Text, not ids, says where a line ends: a token may hold a line feed and more.
        kept = [
            at
            for at, row in enumerate(alive)
            if len(made[row]) < most[row]
            and tokens[at] not in ends
            and "\n" not in tokenizer.decode(made[row])
        ]
        alive = [alive[at] for at in kept]
        if kept:
            sequences.go_on(kept, [tokens[at] for at in kept])
    return [_line(tokenizer, ids, ends) for ids in made]


def ends_of(model: Model, tokenizer: Any) -> set[int]:
    """The end-of-text tokens of tokenizer and model, which may be several."""
    listed = model.config.get_text_config().eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    return {token for token in (tokenizer.eos_token_id, *listed) if token is not None}


def _line(tokenizer: Any, ids: list[int], ends: set[int]) -> str:
    text = tokenizer.decode([token for token in ids if token not in ends], skip_special_tokens=True)
    return text.partition("\n")[0].strip()

"""Texts of contexts and choices -> requests in token ids, and their answers back in place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rag2.generator.head import Model
from rag2.generator.logprob import Request, choice_logprobs
from rag2.generator.pairs import Ids, check_room, encode_pairs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """What to score, without repetitions, and where each choice of each context is in it."""

    requests: Sequence[Request]
    places: Sequence[Sequence[tuple[int, int]]]
    """of each context, for each choice: which request, which of its continuations"""

    def arrange(self, answers: Sequence[Sequence[T]]) -> list[list[T]]:
        """Answers to the requests as answers to every context's choices."""
        return [[answers[request][i] for request, i in places] for places in self.places]

    def tokens(self) -> list[int]:
        """Tokens to read for each context: it once, and every choice."""
        counts = []
        for places in self.places:
            contexts = {request for request, _ in places}
            read = sum(len(self.requests[request].context_ids) for request in contexts)
            read += sum(len(self.requests[r].continuations[i]) for r, i in places)
            counts.append(read)
        return counts


def encode_choices(
    model: Model,
    tokenizer: Any,
    contexts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    names: Sequence[str] = (),
) -> Encoded:
    """The requests of every context's continuations, with lm-evaluation-harness's tokens.

    A merge across the boundary can give the choices of one context different context ids; equal
    ids are one request, wherever they come from. Raises UserError for a context and continuation
    longer than the model's positions; it tells the context's name (a question's id), or its end.
    """
    grouped: dict[tuple[int, ...], list[Ids]] = {}
    order: dict[tuple[int, ...], int] = {}
    places: list[list[tuple[int, int]]] = []
    texts = [(c, choice) for c, cs in zip(contexts, continuations, strict=True) for choice in cs]
    encoded = iter(encode_pairs(tokenizer, texts))
    for number, choices in enumerate(continuations):
        places.append([])
        for _ in choices:
            context_ids, continuation_ids = next(encoded)
            called = names[number] if names else contexts[number][-60:]
            check_room(model, len(context_ids), len(continuation_ids), called)
            key = tuple(context_ids)
            found = grouped.setdefault(key, [])
            places[-1].append((order.setdefault(key, len(order)), len(found)))
            found.append(continuation_ids)
    return Encoded([Request(ids, found) for ids, found in grouped.items()], places)


def score_choices(
    model: Model,
    tokenizer: Any,
    contexts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    batch_tokens: int = 8192,
    names: Sequence[str] = (),
) -> list[list[float]]:
    """log p(continuation | context) in nats, for every continuation of every context.

    Raises UserError as `encode_choices` does.
    """
    encoded = encode_choices(model, tokenizer, contexts, continuations, names)
    return encoded.arrange(choice_logprobs(model, encoded.requests, batch_tokens))

"""An answer in the making: its prompts, its tokens so far, and where its text ends."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rag2.answering.ask import Answer, Ask, Citation, Hit, Place
from rag2.answering.settings import Settings
from rag2.answering.text import Text
from rag2.generator.generate import ends_of
from rag2.generator.load import Generator
from rag2.generator.mixture import Mixture, log_prior
from rag2.generator.pairs import check_fits, encode_contexts, positions
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.types import Chunk

CALLED = "asked"  # in errors: what is asked is nobody else's affair


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the generator reads for a question: texts, their ids, and the chunks that they hold."""

    texts: list[str]
    contexts: list[list[int]]
    heads: list[int]
    read: list[int]
    """places of the chunks that had room; empty: the closed book"""
    dropped: int

    @classmethod
    def of(
        cls,
        ask: Ask,
        chunks: Sequence[Chunk],
        settings: Settings,
        tokenizer: Any,
        wanted: int,
        limit: int | None,
    ) -> "Prompts":
        """Passages are dropped to leave `wanted` of the model's `limit` positions to the answer.

        Raises UserError for a question that does not even fit alone.
        """
        prompt, concat = settings.prompt, (ask.reading or settings.reading) == "concat"
        made = cls._within(prompt, ask, chunks, concat, tokenizer)
        longest = max(map(len, made.contexts))
        if limit is None or not made.read or longest <= limit - wanted + 1:
            return made
        header = prompt.header() + ask.header
        tight = prompt.leaving(wanted, limit, ask.question, tokenizer, header=header)
        return cls._within(tight, ask, chunks, concat, tokenizer)

    @classmethod
    def _within(
        cls, prompt: Prompt, ask: Ask, chunks: Sequence[Chunk], concat: bool, tokenizer: Any
    ) -> "Prompts":
        """By the budget of the prompt."""
        passages, header = [chunk.passage for chunk in chunks], prompt.header() + ask.header
        if len(header) + len(ask.question) > prompt.budget:
            # What does not fit alone is refused at once: not once for each of its passages.
            prompt.context(ask.question, [], tokenizer, header=header, name=CALLED)
        if concat or not chunks:
            built = [prompt.context(ask.question, passages, tokenizer, header=header, name=CALLED)]
            read = list(range(len(chunks) - built[0].dropped))
        else:
            alone = [
                prompt.context(ask.question, [passage], tokenizer, header=header, name=CALLED)
                for passage in passages
            ]
            read = [place for place, one in enumerate(alone) if not one.dropped]
            built = [alone[place] for place in read] or alone[:1]
        texts = [one.text for one in built]
        contexts = encode_contexts(tokenizer, texts)
        cuts = [0] * len(built)
        if len(read) < 2 or len(built) > 1:  # a passage comes again; a list of them hardly ever
            heads = encode_contexts(tokenizer, [one.text[: one.head] for one in built])
            cuts = [_shared(*pair) for pair in zip(contexts, heads, strict=True)]
        return cls(texts, contexts, cuts, read, len(chunks) - len(read))


def _shared(context: Sequence[int], head: Sequence[int]) -> int:
    """Tokens that a context has in common with its own beginning; its last one is not counted."""
    most = min(len(head), len(context) - 1)
    return next((at for at in range(most) if head[at] != context[at]), most)


class Draft:
    """One answer from its first token to its last."""

    def __init__(
        self,
        ask: Ask,
        found: Sequence[Hit],
        place: Place,
        settings: Settings,
        generator: Generator,
    ) -> None:
        """Raises UserError for a question that leaves no room for an answer."""
        self.ask, self.found, self.place = ask, found, place
        self.tokenizer = generator.tokenizer
        self.ends = ends_of(generator.model, generator.tokenizer)
        self.stops = (*settings.stop, *ask.stop)
        reading = ask.reading or settings.reading
        chunks, limit = [hit.chunk for hit in found], positions(generator.model)
        wanted = ask.max_new_tokens or settings.max_new_tokens
        self.prompts = Prompts.of(ask, chunks, settings, self.tokenizer, wanted, limit)
        self.most = room(limit, self.prompts, ask, settings)
        scores_S = np.array([found[at].score for at in self.prompts.read], dtype=np.float64)
        apart = reading != "concat" and self.prompts.read
        weights_S = log_prior(scores_S, settings.temperature) if apart else torch.zeros(1).double()
        self.mixture = Mixture(
            self.prompts.contexts, weights_S, reading != "token", self.prompts.heads
        )
        self.apart = bool(apart) or len(self.prompts.read) == 1
        self.ids: list[int] = []
        self.logps: list[float] = []
        self.finish = ""
        self.began = time.monotonic()
        self._text = Text(self.tokenizer, self.stops)
        self._draw = drawer(ask)

    def take(self, logp_V: Tensor) -> int | None:
        """The next token by its distribution; None where the answer ends before it."""
        token = self._draw(logp_V)
        if token in self.ends or not self._text.add(token):
            self.finish = "stop"
            return None
        self.ids.append(token)
        self.logps.append(float(logp_V[token]))
        if self._text.ended:
            self.finish = "stop"
        elif len(self.ids) == self.most:
            self.finish = "length"
        return token

    def news(self) -> str:
        """The text that is certain and was not told yet."""
        return self._text.news(all=bool(self.finish))

    def answer(self) -> Answer:
        """All of it."""
        posterior_S = self.mixture.posterior() if self.apart else None
        citations = []
        for number, at in enumerate(self.prompts.read):
            share = None if posterior_S is None else posterior_S[number]
            citations.append(Citation.of(self.found[at], share))
        return Answer(
            text=self._text.whole(),
            citations=tuple(citations),
            tokens=tuple(self.tokenizer.decode([token]) for token in self.ids),
            logps=tuple(self.logps),
            finish=self.finish,
            prompt_tokens=sum(map(len, self.prompts.contexts)),
            dropped=self.prompts.dropped,
            place=self.place,
        )


def room(limit: int | None, prompts: Prompts, ask: Ask, settings: Settings) -> int:
    """The most tokens of the answer; a default that has no room is less, a wish is an error."""
    longest = max(map(len, prompts.contexts))
    room = settings.max_new_tokens if limit is None else limit - longest + 1
    if ask.max_new_tokens is None and room > 0:
        return min(settings.max_new_tokens, room)
    wanted = 1 if ask.max_new_tokens is None else ask.max_new_tokens
    if wanted < 1:
        raise UserError(f"max_new_tokens={wanted}; allowed: 1 or more")
    if limit is not None and room > 0 and wanted > room:
        raise UserError(
            f"max_tokens={wanted}: beside the prompt of {longest} tokens the generator's {limit} "
            f"positions leave room for {room}"
        )
    check_fits(limit, longest, wanted, CALLED)
    return wanted


def drawer(ask: Ask) -> Callable[[Tensor], int]:
    """How the next token is chosen: the likeliest, the first of equals, or by chance."""
    if ask.temperature == 0:
        return lambda logp_V: int(logp_V.argmax())
    chance = np.random.Generator(np.random.Philox(np.random.SeedSequence(ask.seed)))

    def draw(logp_V: Tensor) -> int:
        # From the largest: log p / T of all tokens may be more than a number holds.
        heated_V = (logp_V - logp_V.max()) / ask.temperature
        p_V, order_V = heated_V.softmax(0).sort(descending=True, stable=True)
        below_V = p_V.cumsum(0)
        allowed = int((below_V - p_V < ask.top_p).sum()) if ask.top_p < 1 else len(p_V)
        allowed = max(allowed, 1)
        point = chance.random() * float(below_V[allowed - 1])
        at = int(torch.searchsorted(below_V[:allowed], torch.tensor(point).double(), right=True))
        return int(order_V[min(at, allowed - 1)])

    return draw

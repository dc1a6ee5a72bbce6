"""Tokens one after the other -> the text they are, and how much of it is certain already."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class Text:
    """Tokens -> the text that they are, up to the first stop, without white space at its ends."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ended = False
        self._done = ""
        self._before: list[int] = []  # the last tokens of `done`: a token's text depends on them
        self._known = 0  # characters of these
        self._open: list[int] = []  # tokens that end within a character
        self._told = 0

    def add(self, token: int) -> bool:
        """Append a token; False for one that completes a stop and adds nothing before it."""
        tokens = [*self._open, token]
        text = self._raw(tokens)
        at = self._first_stop(text)
        if at is not None:
            more = len(text[:at].rstrip()) > len(self._raw(self._open).rstrip())
            self._done, self._open, self.ended = text[:at], [], True
            return more
        self._open = tokens
        if not text.endswith(BROKEN):
            self._done, self._before, self._open = text, tokens, []
            self._known = len(self._decoded(tokens))
        return True

    def whole(self) -> str:
        """The text so far."""
        return self._raw(self._open).strip()

    def news(self, all: bool) -> str:
        """What was not told yet and stays whatever comes; `all` of it at the end."""
        text = self._raw(self._open).lstrip()
        sure = len(text.rstrip()) if all else certain(text, self.stops)
        new = text[self._told : sure]
        self._told = max(self._told, sure)
        return new

    def _raw(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return self._done
        return self._done + self._decoded([*self._before, *tokens])[self._known :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _first_stop(self, text: str) -> int | None:
        longest = max(map(len, self.stops), default=0)
        return first_stop(text, self.stops, start=max(0, len(self._done) - longest))


def first_stop(text: str, stops: Sequence[str], start: int = 0) -> int | None:
    """Where the first of the stops begins; None where there is none."""
    found = [at for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=None)


def certain(text: str, stops: Sequence[str]) -> int:
    """Characters that stay whatever comes: no part of a character, a stop or white space ends them.

    `text` holds no whole stop, and does not begin with white space.
    """
    sure = len(text.rstrip(BROKEN).rstrip())
    for stop in stops:
        held = range(1, len(stop))
        cut = max((n for n in held if text[:sure].endswith(stop[:n])), default=0)
        sure = min(sure, len(text[:sure]) - cut)
    return len(text[:sure].rstrip())

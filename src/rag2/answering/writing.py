"""Pieces of text from a server -> the answer's text so far, its tokens, and how it ended."""

from collections.abc import Sequence

from rag2.answering.text import certain, first_stop
from rag2.answering.wire import Choice, Unavailable


class Writing:
    """A text up to its first stop; servers that leave stops in it, or ignore them, do no harm."""

    def __init__(self, stops: Sequence[str], ends: Sequence[str]) -> None:
        """`ends` are the end-of-text tokens, the usual one first."""
        self.stops, self.ends = stops, ends
        self.raw = ""
        self.tokens: list[tuple[str, float | None]] = []
        """as the server tells them, those of the end included; none where it does not"""
        self.finish = ""
        self._told = 0

    def add(self, piece: Choice) -> bool:
        """Append a piece; whether the text goes on. Raises Unavailable for a broken one."""
        self.raw += piece.text
        if piece.logprobs is not None:
            self.tokens += piece.logprobs.pairs()
        at = first_stop(self.raw, self.stops)
        if at is not None:
            self.raw, self.finish = self.raw[:at], "stop"
        elif piece.finish_reason in ("stop", "length"):
            self.finish = piece.finish_reason
        elif piece.finish_reason is not None:
            raise Unavailable(f"the generator's server gave up: {piece.finish_reason[:60]!r}")
        return not self.finish

    @property
    def text(self) -> str:
        """Without white space at its ends."""
        return self.raw.strip()

    def news(self) -> str:
        """The text that is certain and was not told yet."""
        text = self.raw.lstrip()
        sure = len(text.rstrip()) if self.finish else certain(text, self.stops)
        new = text[self._told : sure]
        self._told = max(self._told, sure)
        return new

    def kept(self) -> list[tuple[str, float | None]]:
        """The tokens of the text."""
        return self.tokens[: kept([token for token, _ in self.tokens], self.stops, self.ends)]

    def ending(self) -> str:
        """What ended it: a stop, or the end-of-text token; nothing where there was no room."""
        if self.finish == "length":
            return ""
        written = "".join(token for token, _ in self.tokens)
        at = first_stop(written, self.stops)
        if at is not None:
            return next(stop for stop in self.stops if written.startswith(stop, at))
        last = self.tokens[-1][0] if self.tokens else ""
        return last if last in self.ends else next(iter(self.ends), "")


def kept(tokens: Sequence[str], stops: Sequence[str], ends: Sequence[str]) -> int:
    """How many of the tokens belong to the text: the one that only ends it does not."""
    text = ""
    for number, token in enumerate(tokens):
        if token in ends:
            return number
        longer = text + token
        at = first_stop(longer, stops)
        if at is not None:
            return number + (len(longer[:at].rstrip()) > len(text.rstrip()))
        text = longer
    return len(tokens)

"""What is asked, and what comes back: an answer with its tokens' probabilities and its sources."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

from rag2.answering.settings import READINGS, Reading
from rag2.registry import UserError, nearest
from rag2.types import Chunk


@dataclass(frozen=True, slots=True)
class Ask:
    """A question, and what is to differ from the system's settings (None: nothing)."""

    question: str
    header: str = ""
    """what every prompt begins with, such as earlier turns"""
    k: int | None = None
    """chunks to read; 0 is the closed book"""
    reading: Reading | None = None
    namespaces: tuple[str, ...] | None = None
    """whose documents may be found; None: everybody's"""
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    """where the answer ends, too"""
    temperature: float = 0.0
    """0: the likeliest token; else tokens are drawn from softmax(log p / temperature)"""
    top_p: float = 1.0
    """draw among the likeliest tokens that have so much probability together"""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values that mean nothing."""
        if not isinstance(self.question, str) or not self.question.strip():
            raise UserError("question: a text that is not empty")
        if self.reading not in (None, *READINGS):
            near = nearest(str(self.reading), READINGS)
            raise UserError(f"reading={self.reading!r}; allowed: {', '.join(READINGS)}.{near}")
        for name, value, good, allowed in (
            ("k", self.k, self.k is None or self.k >= 0, "0 or more"),
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UserError(f"{name}={value!r}; allowed: {allowed}")

    @classmethod
    def of(cls, question: str, **named: Any) -> Self:
        """With fields by name; raises UserError, with the nearest one, for an unknown name."""
        allowed = [field.name for field in fields(cls)]
        for name in named:
            if name not in allowed:
                raise UserError(
                    f"unknown {name!r}; allowed: {', '.join(allowed)}.{nearest(name, allowed)}"
                )
        return cls(question, **named)


class Hit(NamedTuple):
    """A chunk that was found, with the retriever's score, and the namespace of its document."""

    chunk: Chunk
    score: float
    namespace: str


@dataclass(frozen=True, slots=True)
class Citation:
    """A chunk that was read: where it stands, how it was found, and what it did for the answer."""

    chunk: int
    namespace: str
    document: str
    title: str
    start: int
    end: int
    """characters of the document's text"""
    score: float
    """of the retriever, the logit of p(z|x) before the temperature"""
    posterior: float | None
    """p(z|x,y); None where chunks were read in one prompt, which tells them not apart"""
    text: str

    @classmethod
    def of(cls, hit: Hit, posterior: float | None) -> "Citation":
        """What is told of a chunk."""
        chunk = hit.chunk
        place = (chunk.id, hit.namespace, chunk.document, chunk.title, chunk.start, chunk.end)
        return cls(*place, hit.score, posterior, chunk.text)


@dataclass(frozen=True, slots=True)
class Place:
    """Which state of the system answered."""

    export: str
    """first characters of the manifest's seal"""
    generation: int
    """version of the knowledge base that the generation was built of"""
    version: int
    """version of the knowledge base that was searched"""

    def __str__(self) -> str:
        return f"rag2-{self.export}-g{self.generation}-v{self.version}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A text, why it ended, and what it stands on."""

    text: str
    citations: tuple[Citation, ...]
    """the chunks that were read, best first by retrieval"""
    tokens: tuple[str, ...]
    logps: tuple[float, ...]
    """log p(y_t | x, y_<t) in nats of each token; their sum is log p(y|x) of the reading mode"""
    finish: str
    """stop, or length: there was no room for more tokens"""
    prompt_tokens: int
    dropped: int
    """chunks that the prompt's budget had no room for"""
    place: Place

    @property
    def logp(self) -> float:
        """log p(y|x) in nats."""
        return sum(self.logps)


@dataclass(frozen=True, slots=True)
class Scored:
    """How likely each choice is as the answer to a question."""

    logps: tuple[float, ...]
    """log p(choice | question) in nats"""
    citations: tuple[Citation, ...]
    """with the posterior of the likeliest choice"""
    place: Place

    @property
    def best(self) -> int:
        """The likeliest choice, the first of equals."""
        return max(range(len(self.logps)), key=lambda choice: (self.logps[choice], -choice))


def needed(asks: Sequence[Ask], default: int) -> int:
    """The largest number of chunks that any of these wants."""
    return max((default if ask.k is None else ask.k for ask in asks), default=0)

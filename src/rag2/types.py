"""The records that travel through the system, in order of appearance."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One source text of the knowledge base, as read and cleaned."""

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document: characters `start` to `end` of its text. Ids are never reused."""

    id: int
    document: str
    text: str
    title: str = ""
    start: int = 0
    end: int = 0

    @property
    def passage(self) -> str:
        """What encoder and generator read: the title on a line of its own, then the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True, slots=True)
class Question:
    """A question; `evidence` names documents that answer it.

    Multiple choice: `answer` indexes `choices`. Open: no choices, and `answers` holds every
    wording that counts as right, the usual one first.
    """

    id: str
    question: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    split: str = "test"
    gold_chunk: int | None = None
    evidence: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    answers: tuple[str, ...] = ()

    @property
    def gold(self) -> str:
        """The text of the right answer."""
        return self.choices[self.answer] if self.choices else self.answers[0]

    @property
    def subject(self) -> str:
        """What `metadata` calls its subject, as MMLU does; empty where there is none."""
        return str(self.metadata.get("subject", ""))


@dataclass(frozen=True, slots=True)
class Retrieved:
    """One retrieved chunk with its retrieval score and, once answered, its posterior p(z|x,y)."""

    chunk: int
    score: float
    posterior: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How one arm answered one question: log-likelihood of each choice in nats, and the pick."""

    question: str
    logp: tuple[float, ...]
    prediction: int
    correct: bool
    retrieved: tuple[Retrieved, ...] = ()

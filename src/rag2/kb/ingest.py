"""Files, folders and data sets -> documents of a knowledge base, each input accounted for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rag2.kb.chunk import Chunker
from rag2.kb.duplicates import Exact, Near
from rag2.kb.jail import Limits
from rag2.kb.read import printable, read
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Document

# What is committed together: durable at once, and little to do again after a kill.
DOCUMENTS = 500
CHARACTERS = 2**22
KEPT = 1000  # rejects of which place and reason are told: a small archive can hold a million


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that became no document: its place, as in `file.jsonl:17`, and the reason."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of the inputs: accepted + rejected = total.

    accepted = new + `updated` + `unchanged` documents, `chunks` those that were written.
    """

    accepted: int
    rejected: int
    rejects: list[Reject]
    """the first KEPT of those rejected"""
    chunks: int
    updated: int = 0
    unchanged: int = 0

    @property
    def total(self) -> int:
        """Documents, rows and files that were looked at."""
        return self.accepted + self.rejected

    @property
    def added(self) -> int:
        """Documents that were not there before."""
        return self.accepted - self.updated - self.unchanged


class Inputs:
    """The documents of all sources that are new among them; counts them and keeps the rest.

    Of two with one id, or with one text under one title, the first is taken; with `near`, also of
    two whose texts are so similar. Texts are compared among the sources only, so that a second time
    they are taken as the first: what a knowledge base holds has no say, but for its ids. A document
    that is there already is refused, or else replaced even by another's text: its own is old.
    """

    def __init__(
        self,
        sources: Sequence[Path | str],
        keep_duplicates: bool = False,
        near: float | None = None,
        limits: Limits | None = None,
        there: Callable[[str], bool] = lambda id: False,
        replace: bool = False,
    ) -> None:
        """`keep_duplicates`: also texts that came before; `there`: whether an id is taken already.

        Raises UserError for a bad `near`.
        """
        self.sources, self.limits = sources, limits
        self._there, self._replace = there, replace
        self.seen: dict[str, str] = {}  # document id -> place
        self.rejected, self.rejects = 0, list[Reject]()
        self._finders: list[Exact | Near] = [] if keep_duplicates else [Exact()]
        if near is not None:
            self._finders.append(Near(near))

    def __iter__(self) -> Iterator[Document]:
        for place, item in read(*self.sources, limits=self.limits):
            reason = item if isinstance(item, str) else self._refusal(item, place)
            if isinstance(item, str) or reason:
                self.reject(place, reason)
            else:
                self.seen[item.id] = place
                yield item

    def summary(self, chunks: int, updated: int = 0, unchanged: int = 0) -> Summary:
        """What became of them all."""
        return Summary(len(self.seen), self.rejected, self.rejects, chunks, updated, unchanged)

    def _refusal(self, document: Document, place: str) -> str:
        """Why the document is not taken, or nothing."""
        if first := self.seen.get(document.id):
            return printable(f"duplicate id {document.id!r}, first used at {first}")
        there = self._there(document.id)
        if there and not self._replace:
            return printable(f"document {document.id!r} is there already; an update replaces it")
        # Asked last, for it remembers what it has not found: a text that is refused is nobody's.
        reason = next((why for find in self._finders if (why := find.find(document, place))), "")
        return "" if there else reason

    def reject(self, place: str, reason: str) -> None:
        """Count one, and keep it if it is among the first."""
        self.rejected += 1
        if len(self.rejects) < KEPT:
            self.rejects.append(Reject(place, reason))

    def nothing(self) -> UserError:
        """The error for sources without a document, with the first reason."""
        where = ", ".join(str(source) for source in self.sources) or "no source"
        if not self.rejected:
            return UserError(f"no document in {where}")
        first = self.rejects[0]
        return UserError(
            f"no document was accepted from {where}: {self.rejected} rejected,"
            f" the first {first.place}: {first.reason}"
        )


def ingest(
    kb: KnowledgeBase,
    sources: Sequence[Path | str],
    chunker: Chunker,
    namespace: str = "",
    keep_duplicates: bool = False,
    near: float | None = None,
    limits: Limits | None = None,
) -> Summary:
    """Add what is new in `sources` and replace what has changed; each batch is durable at once.

    A document is known by its id. What the sources do not name stays. The same sources twice
    change nothing; after a kill the same call completes the rest, to the same content. Raises
    UserError if a source is missing, or no document was accepted.
    """
    there = partial(kb.has, namespace=namespace)
    inputs = Inputs(sources, keep_duplicates, near, limits, there, replace=True)
    updated = unchanged = chunks = 0
    for batch in _batches(inputs):
        put = kb.put(batch, chunker, namespace)
        updated, unchanged = updated + put.updated, unchanged + put.unchanged
        chunks += put.chunks
    if not inputs.seen:
        raise inputs.nothing()
    return inputs.summary(chunks, updated, unchanged)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of bounded number and length."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + len(document.title) + len(str(document.metadata))
        if len(batch) >= DOCUMENTS or characters >= CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch

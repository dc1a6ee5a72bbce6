"""A trained system over a living knowledge base: retrieve, answer, score."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Self

from rag2.answering.ask import Answer, Ask, Citation, Scored
from rag2.answering.draft import Draft
from rag2.answering.exported import Exported
from rag2.answering.library import Library, check_choices, names_of, parts_of
from rag2.answering.scoring import log_likelihoods
from rag2.answering.settings import Reading, Settings
from rag2.generator.load import Generator
from rag2.generator.mixture import Mixtures
from rag2.kb.chunk import Chunker
from rag2.live.live import Live
from rag2.retriever.encoder import DualEncoder


class Rag(Library):
    """Answers questions from documents, and says which ones; safe to use from several threads.

    >>> with Rag.from_pretrained("export") as rag:
    ...     answer = rag.answer("Who keeps the lighthouse of Sund?")
    ...     print(answer.text, answer.citations[0].posterior)
    """

    def __init__(
        self,
        encoder: DualEncoder,
        generator: Generator,
        live: Live,
        chunker: Chunker,
        settings: Settings,
        export: str = "",
    ) -> None:
        """`live` searches with `encoder`; neither may be trained any further."""
        super().__init__(encoder, live, chunker, settings, export)
        self.generator = generator
        self.reading = Lock()  # a model is read by one thread at a time

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        state: str | Path | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> Self:
        """The system that `rag2 export` wrote; nothing in it is executed.

        Changes of documents live in the directory `state`; without one they are forgotten at the
        end. `dtype` is the generator's. Raises UserError for an export that is damaged or not what
        it says, and as `State` does.
        """
        exported = Exported.open(directory)
        generator = exported.generator(dtype, device)
        with ExitStack() as opened:
            parts = parts_of(exported, state, device, opened)
            rag = cls(parts.encoder, generator, *parts[1:])
            rag._closing = opened.pop_all()
        return rag

    def answer(self, question: str, **ask: Any) -> Answer:
        """Write an answer; keywords are the fields of `Ask`. Raises UserError for a wrong one."""
        return self.answers([Ask.of(question, **ask)])[0]

    def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """Write answers together; each is what it would be alone."""
        with self.reading:
            drafts = self.drafts(asks)
            mixtures = Mixtures(self.generator.model)
            mixtures.add([draft.mixture for draft in drafts])
            live = drafts
            while live:
                live = step(mixtures, live)
        return [draft.answer() for draft in drafts]

    def stream(self, question: str, **ask: Any) -> Iterator[str | Answer]:
        """Pieces of the text as they are certain, then the answer itself."""
        (draft,) = live = self.drafts([Ask.of(question, **ask)])
        mixtures = Mixtures(self.generator.model)
        with self.reading:
            mixtures.add([draft.mixture])
        while live:
            with self.reading:
                live = step(mixtures, live)
            if piece := draft.news():
                yield piece
        yield draft.answer()

    def score(
        self,
        question: str,
        choices: Sequence[str],
        k: int | None = None,
        reading: Reading | None = None,
        namespaces: Collection[str] | None = None,
    ) -> Scored:
        """log p(choice | question) of each choice, as the harness computes it.

        Raises UserError for no choices, empty ones, and a question that has no room.
        """
        ask = Ask(question, k=k, reading=reading, namespaces=names_of(namespaces))
        check_choices(choices)
        ((hits, view),) = self.searched([ask])
        with self.reading:
            logps, posterior = log_likelihoods(self.generator, self.settings, ask, hits, choices)
        shares = posterior or [None] * len(hits)
        cited = tuple(Citation.of(hit, share) for hit, share in zip(hits, shares, strict=True))
        return Scored(tuple(logps), cited, self.place(view))

    def drafts(self, asks: Sequence[Ask]) -> list[Draft]:
        """Answers that have no token yet. Raises UserError for one that has no room."""
        return [
            Draft(ask, hits, self.place(view), self.settings, self.generator)
            for ask, (hits, view) in zip(asks, self.searched(asks), strict=True)
        ]


def step(
    mixtures: Mixtures, live: Sequence[Draft], failed: dict[int, Exception] | None = None
) -> list[Draft]:
    """One token more for each of these, which are those of the mixtures; those that go on.

    With `failed`, a draft that cannot take its token ends alone, its error kept there by its id().
    """
    tokens: list[int | None] = []
    for draft, logp_V in zip(live, mixtures.next(), strict=True):
        try:
            tokens.append(draft.take(logp_V))
        except Exception as error:
            if failed is None:
                raise
            failed[id(draft)] = error
            tokens.append(None)
    over = [bool(draft.finish) or bool(failed and id(draft) in failed) for draft in live]
    mixtures.go_on(tokens, over)
    return [draft for draft, ends in zip(live, over, strict=True) if not ends]

"""A trained system over a living knowledge base: retrieve, answer, score."""

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from rag2.answering.ask import Answer, Ask, Citation, Place, Scored, needed
from rag2.answering.draft import Draft
from rag2.answering.exported import Exported
from rag2.answering.scoring import Hits, log_likelihoods
from rag2.answering.settings import Reading, Settings
from rag2.answering.state import State
from rag2.generator.load import Generator
from rag2.generator.mixture import Mixtures, log_prior
from rag2.kb.chunk import Chunker, TokenChunker
from rag2.kb.store import KnowledgeBase, Put
from rag2.live.live import Live
from rag2.live.view import Embedder, View
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.types import Document


class Rag:
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
        self.encoder, self.generator, self.live = encoder, generator, live
        self.chunker, self.settings, self.export = chunker, settings, export
        self.scale = float(encoder.scale.detach())
        self.reading = Lock()  # a model is read by one thread at a time
        self._looking = Lock()
        self._kb = KnowledgeBase(live.path, trusted=True)  # to look things up in
        self._closing = ExitStack()

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
        encoder = exported.retriever().to(device).eval()
        generation = exported.generation()
        generator = exported.generator(dtype, device)
        with ExitStack() as opened:
            if state is None:
                state = opened.enter_context(tempfile.TemporaryDirectory(prefix="rag2-state-"))
            bound = State(Path(state), exported)
            opened.callback(bound.close)
            backend: Any = generation.index.backend
            live = Live(bound.kb, Embedder.of(encoder), backend, bound.generations)
            opened.callback(live.close)
            with KnowledgeBase(bound.kb, trusted=True) as kb:
                chunker = kb.chunker(bound.tokenizer)
                if chunker is None and kb.chunker_fingerprint is not None:
                    raise UserError(f"{exported.directory}: the tokenizer that cut it is gone")
            rag = cls(
                encoder, generator, live, chunker or TokenChunker(), exported.settings, exported.id
            )
            rag._closing = opened.pop_all()
        return rag

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the state directory; what was changed is already safe in it."""
        self._kb.close()
        self._closing.close()

    # ----- questions -----------------------------------------------------------------------------

    def retrieve(
        self, question: str, k: int | None = None, namespaces: Collection[str] | None = None
    ) -> list[Citation]:
        """The best chunks of a question, fewer where there are fewer; `posterior` is p(z|x)."""
        return self.retrieved(question, k, namespaces)[0]

    def retrieved(
        self, question: str, k: int | None = None, namespaces: Collection[str] | None = None
    ) -> tuple[list[Citation], View]:
        """The same, and the state that was searched."""
        k = self.settings.k if k is None else k
        (hits,), view = self.search([question], k, namespaces)
        scores_K = np.array([value for _, value in hits])
        prior = log_prior(scores_K, self.settings.temperature).exp().tolist() if hits else []
        return [Citation.of(*hit, share) for hit, share in zip(hits, prior, strict=True)], view

    def answer(self, question: str, **ask: Any) -> Answer:
        """Write an answer; keywords are the fields of `Ask`. Raises UserError for a wrong one."""
        return self.answers([Ask(question, **ask)])[0]

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
        (draft,) = live = self.drafts([Ask(question, **ask)])
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
        ask = Ask(question, k=k, reading=reading, namespaces=_names(namespaces))
        if not choices or not all(choice.strip() for choice in choices):
            raise UserError("choices: at least one, and none empty")
        ((hits, view),) = self.searched([ask])
        with self.reading:
            logps, posterior = log_likelihoods(self.generator, self.settings, ask, hits, choices)
        shares = posterior or [None] * len(hits)
        cited = tuple(Citation.of(*hit, share) for hit, share in zip(hits, shares, strict=True))
        return Scored(tuple(logps), cited, self.place(view))

    # ----- documents -----------------------------------------------------------------------------

    def documents(self, namespace: str = "", after: str = "", limit: int = 100) -> list[Document]:
        """Live documents in the order of their ids, those after `after`, at most `limit`."""
        with self._looking:
            return self._kb.listed(namespace, after, limit)

    def document(self, id: str, namespace: str = "") -> Document | None:
        """The live document of an id; None if there is none."""
        with self._looking:
            return self._kb.document(id, namespace)

    def put(self, documents: Iterable[Document], namespace: str = "") -> Put:
        """Add or replace documents; durable, and in the next search, on return."""
        return self.live.put(documents, self.chunker, namespace)

    def remove(self, ids: Iterable[str], namespace: str = "") -> int:
        """Remove documents; gone from the next search on return. Returns the chunks removed."""
        return self.live.remove(ids, namespace)

    # ----- parts of an answer --------------------------------------------------------------------

    def searched(self, asks: Sequence[Ask]) -> list[tuple[Hits, View]]:
        """What each finds and in which state; nothing where k = 0."""
        nothing: tuple[Hits, View] = ([], self.live.view())
        results = [nothing for _ in asks]
        groups: dict[tuple[str, ...] | None, list[int]] = {}
        for number, ask in enumerate(asks):
            if ask.k != 0:
                groups.setdefault(ask.namespaces, []).append(number)
        for namespaces, numbers in groups.items():
            some = [asks[number] for number in numbers]
            most = needed(some, self.settings.k)
            found, view = self.search([ask.question for ask in some], most, namespaces)
            for number, ask, row in zip(numbers, some, found, strict=True):
                results[number] = (row[: self.settings.k if ask.k is None else ask.k], view)
        return results

    def search(
        self, questions: Sequence[str], k: int, namespaces: Collection[str] | None
    ) -> tuple[list[Hits], View]:
        """The k best chunks of each question with their scores, and the state that was searched."""
        weight = self.settings.dense_weight
        found = self.live.search(questions, k, namespaces, weight)
        scale = self.scale if weight == 1 else 1.0
        rows = [
            list(zip(found.chunks(row), (found.scores_BK[row] * scale).tolist(), strict=True))
            for row in range(len(questions))
        ]
        return rows, found.view

    def drafts(self, asks: Sequence[Ask]) -> list[Draft]:
        """Answers that have no token yet. Raises UserError for one that has no room."""
        return [
            Draft(ask, hits, self.place(view), self.settings, self.generator)
            for ask, (hits, view) in zip(asks, self.searched(asks), strict=True)
        ]

    def place(self, view: View) -> Place:
        """The name of a state."""
        built = 0 if view.generation is None else view.generation.kb_version
        return Place(self.export[:12], built, view.version)


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


def _names(namespaces: Collection[str] | None) -> tuple[str, ...] | None:
    return None if namespaces is None else tuple(namespaces)

"""Documents that change, and the chunks that an encoder finds in them for a question."""

import tempfile
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np

from rag2.answering.ask import Ask, Citation, Hit, Place, needed
from rag2.answering.exported import Exported
from rag2.answering.settings import READINGS, Reading, Settings
from rag2.answering.state import State
from rag2.generator.mixture import log_prior
from rag2.kb.chunk import Chunker, TokenChunker
from rag2.kb.store import KnowledgeBase, Put
from rag2.live.live import Live
from rag2.live.view import Embedder, View
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.types import Document


class Parts(NamedTuple):
    """What a library is made of."""

    encoder: DualEncoder
    live: Live
    chunker: Chunker
    settings: Settings
    export: str
    """the seal of the export's manifest"""


class Library:
    """What every system over living documents shares; safe to use from several threads."""

    readings: tuple[Reading, ...] = READINGS
    """how the system can read chunks"""

    def __init__(
        self,
        encoder: DualEncoder,
        live: Live,
        chunker: Chunker,
        settings: Settings,
        export: str = "",
    ) -> None:
        """`live` searches with `encoder`, which may not be trained any further."""
        self.encoder, self.live = encoder, live
        self.chunker, self.settings, self.export = chunker, settings, export
        self.scale = float(encoder.scale.detach())
        self._looking = Lock()
        self._kb = KnowledgeBase(live.path, trusted=True)  # to look things up in
        self._closing = ExitStack()

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
        """The same, and the state that was searched; raises UserError for k below 1."""
        k = needed([Ask(question, k=k)], self.settings.k)
        (hits,), view = self.search([question], k, namespaces)
        scores_K = np.array([hit.score for hit in hits])
        prior = log_prior(scores_K, self.settings.temperature).exp().tolist() if hits else []
        return [Citation.of(hit, share) for hit, share in zip(hits, prior, strict=True)], view

    def searched(self, asks: Sequence[Ask]) -> list[tuple[list[Hit], View]]:
        """What each finds and in which state; nothing where k = 0."""
        nothing: tuple[list[Hit], View] = ([], self.live.view())
        results = [nothing for _ in asks]
        # By k, too: an index that is not exact finds other chunks where more are wanted.
        groups: dict[tuple[tuple[str, ...] | None, int | None], list[int]] = {}
        for number, ask in enumerate(asks):
            if ask.k != 0:
                groups.setdefault((ask.namespaces, ask.k), []).append(number)
        for (namespaces, _), numbers in groups.items():
            some = [asks[number] for number in numbers]
            k = needed(some, self.settings.k)
            found, view = self.search([ask.question for ask in some], k, namespaces)
            for number, row in zip(numbers, found, strict=True):
                results[number] = (row, view)
        return results

    def search(
        self, questions: Sequence[str], k: int, namespaces: Collection[str] | None
    ) -> tuple[list[list[Hit]], View]:
        """The k best chunks of each question with their scores, and the state that was searched."""
        weight = self.settings.dense_weight
        found = self.live.search(questions, k, namespaces, weight)
        scale = self.scale if weight == 1 else 1.0
        view, rows = found.view, []
        for ids_K, scores_K in zip(found.ids_BK.tolist(), found.scores_BK * scale, strict=True):
            pairs = zip(ids_K, scores_K.tolist(), strict=True)
            rows.append([Hit(view.chunk(id), score, view.namespace(id)) for id, score in pairs])
        return rows, view

    def place(self, view: View) -> Place:
        """The name of a state."""
        built = 0 if view.generation is None else view.generation.kb_version
        return Place(self.export[:12], built, view.version)

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


def parts_of(exported: Exported, state: str | Path | None, device: str, opened: ExitStack) -> Parts:
    """What an export's library is made of; `opened` closes it.

    Changes of documents live in the directory `state`; without one they are forgotten at the end.
    Raises UserError as `Exported.retriever`, `Exported.generation` and `State` do.
    """
    encoder = exported.retriever().to(device).eval()
    generation = exported.generation()
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
    return Parts(encoder, live, chunker or TokenChunker(), exported.settings, exported.id)


def names_of(namespaces: Collection[str] | None) -> tuple[str, ...] | None:
    """As an Ask has them."""
    return None if namespaces is None else tuple(namespaces)


def check_choices(choices: Sequence[str]) -> None:
    """Raise UserError for no choices and for empty ones."""
    if isinstance(choices, str) or not choices or not all(choice.strip() for choice in choices):
        raise UserError("choices: at least one, and none empty")

"""A knowledge base on disk and an encoder -> search that is never behind the last change.

Any process may write the file: every search asks it for its version first, and encodes what is new.
A generation made meanwhile of an older version is swapped in with all that is newer added and
all that is gone left out, so that nothing is lost and nothing comes back.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, RLock
from typing import Self, TypeVar

import numpy as np
import pyarrow as pa

from rag2.index.base import Backend
from rag2.index.generation import Generation, table_of
from rag2.kb.chunk import Chunker
from rag2.kb.store import KnowledgeBase, Put
from rag2.live import folder, hybrid
from rag2.live.part import Part
from rag2.live.snapshot import Snapshot
from rag2.live.view import Embedder, Found, View, delta_of
from rag2.registry import UserError
from rag2.types import Document

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Live:
    """Searches and changes one knowledge base; safe to use from several threads."""

    def __init__(
        self,
        path: Path | str,
        embedder: Embedder,
        backend: Backend,
        generations: Path | None = None,
    ) -> None:
        """Open the file, and the newest sound generation of this encoder in `generations`.

        What no generation holds is encoded now. Raises UserError as KnowledgeBase does.
        """
        self.path, self.backend, self.generations = Path(path), backend, generations
        # A connection each: a search waits for no commit and no generation that is being built. It
        # does wait while another one encodes the chunks of a change, which both of them need.
        self._writer = KnowledgeBase(path)
        self._maker, self._reader, self._speller = (
            KnowledgeBase(path, trusted=True) for _ in range(3)
        )
        # Who needs several takes them in this order.
        self._writing, self._making = RLock(), RLock()
        self._spelling, self._seeing = Lock(), Lock()
        found = folder.newest(generations, embedder.fingerprint) if generations else None
        if found is not None and not self._fits(found):
            logger.warning("the generation in %s is of another knowledge base", generations)
            found = None
        self._view = self._viewed(found, embedder, None, self._maker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was changed is already safe in it."""
        for kb in (self._writer, self._reader, self._maker, self._speller):
            kb.close()

    # ----- searching -----------------------------------------------------------------------------

    def view(self) -> View:
        """The state as of the last change that anybody committed."""
        with self._seeing:
            if self._reader.version != self._view.version:
                news = self._reader.since(self._view.version)
                if news is None:  # compacted meanwhile
                    old = self._view
                    self._view = self._viewed(old.generation, old.embedder, old, self._reader)
                else:
                    self._view = self._view.after(news.version, news.added, news.removed)
            return self._view

    def search(
        self,
        questions: Sequence[str],
        k: int,
        namespaces: Collection[str] | None = None,
        weight: float = 1.0,
    ) -> Found:
        """The k best live chunks of each question, by the encoder of the view that is searched.

        Only chunks of the namespaces are looked at (None: of all). Fewer if there are fewer. With
        `weight` < 1 the score is `rag2.retrieval.Fused`'s of vectors and of words (FTS5's BM25), of
        one state. Raises UserError for k < 1 and for a weight outside [0, 1].
        """
        if isinstance(questions, str):
            raise ValueError("questions: a sequence of texts, not one text")
        depth = hybrid.checked(weight, k)
        if weight == 1:
            view = self.view()
            return view.search(view.embedder.embed(questions, "question"), k, namespaces)
        view, words_B = self._spelled(questions, depth, namespaces)
        queries_BD = view.embedder.embed(questions, "question")
        dense = view.search(queries_BD, depth, namespaces)
        return hybrid.fused(dense, words_B, namespaces, weight, k)

    def nearest(
        self, queries_BD: np.ndarray, k: int, namespaces: Collection[str] | None = None
    ) -> Found:
        """The same for embeddings of questions; UserError for one that is not finite."""
        return self.view().search(queries_BD, k, namespaces)

    def _spelled(
        self, questions: Sequence[str], k: int, namespaces: Collection[str] | None
    ) -> tuple[View, list[hybrid.Words]]:
        """A view, and the k best chunks of each question by its words, as of the same version."""
        while True:
            view = self.view()
            with self._spelling, self._speller.reading():
                if self._speller.version == view.version:  # nobody wrote in between
                    search = self._speller.search_text
                    return view, [search(question, k, namespaces) for question in questions]

    # ----- changing ------------------------------------------------------------------------------

    def add(self, documents: Iterable[Document], chunker: Chunker, namespace: str = "") -> int:
        """As KnowledgeBase.add; durable and searchable on return."""
        return self._change(lambda kb: kb.add(documents, chunker, namespace))

    def put(self, documents: Iterable[Document], chunker: Chunker, namespace: str = "") -> Put:
        """As KnowledgeBase.put; durable and searchable on return."""
        return self._change(lambda kb: kb.put(documents, chunker, namespace))

    def remove(self, ids: Iterable[str], namespace: str = "") -> int:
        """As KnowledgeBase.remove; durable and gone from every later search on return."""
        return self._change(lambda kb: kb.remove(ids, namespace))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Changes of this thread inside become durable and searchable together, at its end."""
        with self._writing, self._writer.batch():
            yield

    def _change(self, change: Callable[[KnowledgeBase], Result]) -> Result:
        with self._writing:
            result = change(self._writer)
        self.view()
        return result

    # ----- generations ---------------------------------------------------------------------------

    def snapshot(self, embedder: Embedder | None = None) -> Snapshot:
        """All chunks as of now, to build a generation of while changes go on; None: same encoder.

        Another process needs none: it may build of `KnowledgeBase.chunks(version)` at any version.
        """
        view = self.view()
        same = embedder is None or embedder.fingerprint == view.embedder.fingerprint
        return self._snapshot(embedder or view.embedder, view if same else None)

    def swap(self, generation: Generation | None, embedder: Embedder | None = None) -> None:
        """Search this generation from now on, with every change that is newer than it.

        It is committed to `generations` first. `embedder` is that of the questions, where it
        changes with the generation. Raises UserError for a generation of another encoder, or of
        another knowledge base.
        """
        embedder = embedder or self._view.embedder
        if generation is not None:
            if generation.encoder_fingerprint != embedder.fingerprint:
                made_by = generation.encoder_fingerprint[:12]
                raise UserError(
                    f"the generation was embedded by encoder {made_by}, "
                    f"not {embedder.fingerprint[:12]}"
                )
            # One from before a compaction is not searched anyway, but made anew of the file.
            if not (self._holds_erased(generation) or self._fits(generation)):
                raise UserError(f"the generation is not of {self.path}: its chunks are others")
        self._install(generation, embedder)

    def refresh(self, embedder: Embedder | None = None) -> None:
        """Build a generation of all that is there now and swap it in."""
        with self._making:
            snapshot = self.snapshot(embedder)
            self._install(snapshot.build(self.backend), snapshot.embedder)

    def compact(self) -> int:
        """Erase what was removed, from the file, from memory and from the folder of generations.

        Returns the number of chunks that the file lost. Raises UserError as KnowledgeBase.compact,
        and where a generation in the folder is of another knowledge base.
        """
        with self._writing, self._making:
            if self.generations is not None:
                folder.refuse_others(self.generations, self._maker)
            chunks = self._writer.compact()
            base = self.view().base
            if base is not None and not base.alive_N.all():
                self.refresh()
            if self.generations is not None:
                folder.purge(self.generations, set(self._maker.alive()))
        return chunks

    def _snapshot(self, embedder: Embedder, known: View | None) -> Snapshot:
        with self._making, self._maker.reading():
            version, kb_hash = self._maker.version, self._maker.content_hash()
            blind = known.blind if known is not None else ()
            chunks = [chunk for chunk in self._maker.chunks() if chunk.id not in blind]
            return Snapshot(version, kb_hash, table_of(chunks), embedder, known)

    def _install(self, generation: Generation | None, embedder: Embedder) -> None:
        """Commit and search a generation; what was erased since it was begun is not in it."""
        with self._making:
            view = self._viewed(generation, embedder, self._view, self._maker)
            while True:
                if self._holds_erased(generation):
                    generation = self._snapshot(embedder, view).build(self.backend)
                    view = self._viewed(generation, embedder, view, self._maker)
                if self.generations is not None:
                    folder.publish(generation, self.generations)
                if not self._holds_erased(generation):  # nor did another process compact meanwhile
                    break
            with self._seeing:
                self._view = view  # what came after it is caught up with by the next search

    def _holds_erased(self, generation: Generation | None) -> bool:
        """Whether a generation is from before a compaction."""
        return generation is not None and generation.kb_version < self._maker.oldest

    def _fits(self, generation: Generation) -> bool:
        """Whether a generation's chunks have the texts that the file has, or had at its version.

        Of one from before a compaction only those that are still live can be looked at, and there
        has to be one.
        """
        version = generation.kb_version
        with self._making, self._maker.reading():
            if version > self._maker.version:
                return False
            erased = self._holds_erased(generation)
            chunks = {c.id: c for c in self._maker.chunks(None if erased else version)}
        known_N = np.isin(generation.ids_N, np.array([*chunks], dtype=np.int64))
        kept = generation.chunks.take(pa.array(np.flatnonzero(known_N)))
        same = kept.equals(table_of([chunks[id] for id in kept.column("id").to_pylist()]))
        return same and bool(known_N.any() if erased else known_N.all())

    def _viewed(
        self,
        generation: Generation | None,
        embedder: Embedder,
        old: View | None,
        kb: KnowledgeBase,
    ) -> View:
        """A generation and all that is newer, as of now."""
        with kb.reading():
            version, alive = kb.version, kb.alive()
            held = set() if generation is None else set(generation.ids_N.tolist())
            added = [(name, kb.chunk(id)) for id, name in alive.items() if id not in held]
        base = None if generation is None else Part.of(generation.index, alive)
        delta = delta_of(embedder, added, old)
        chunks = {chunk.id: (name, chunk) for name, chunk in added}
        return View(embedder, version, generation, base, delta, chunks)

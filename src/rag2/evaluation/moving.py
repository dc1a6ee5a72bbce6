"""A knowledge base that takes in revisions, and what an arm finds in it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rag2.evaluation.revision import Revision
from rag2.index.exact import TorchExact
from rag2.kb.chunk import Chunker
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.retriever import LiveDense
from rag2.live.view import Embedder
from rag2.retrieval import Dense, Lexical, Retriever
from rag2.types import Chunk


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of a revision in all, and of each document until it was durable and searchable.

    The latter are empty where nothing is searchable before the end.
    """

    seconds: float
    document_seconds: Sequence[float]


@dataclass
class Moving:
    """A knowledge base file, what changes it, and the retriever over what it holds by now."""

    path: Path
    store: Live | KnowledgeBase
    retriever: Retriever
    again: Callable[[], Retriever] | None = None
    """makes a retriever that does not follow the file by itself anew"""

    def take_in(self, news: Revision, chunker: Chunker) -> Took:
        """Put the documents and remove those that are gone, one by one."""
        began = time.perf_counter()
        took = []
        for document in news.documents:
            start = time.perf_counter()
            self.store.put([document], chunker)
            took.append(time.perf_counter() - start)
        for id in news.removed:
            self.store.remove([id])
        if self.again:
            self.retriever = self.again()
        return Took(time.perf_counter() - began, () if self.again else took)

    def chunks(self) -> list[Chunk]:
        """What the file holds by now."""
        with KnowledgeBase(self.path) as kb:
            return kb.chunks()


@contextmanager
def opened(path: Path, retriever: Retriever) -> Iterator[Moving]:
    """The file, to be searched as `retriever` (dense or BM25) would search it, always as of now.

    A dense one is searched by a live index, and words by one that is made again after each
    revision.
    """
    if isinstance(retriever, Dense):
        with Live(path, Embedder.of(retriever.encoder), TorchExact()) as live:
            live.refresh()
            yield Moving(path, live, LiveDense(live, float(retriever.encoder.scale.detach())))
        return
    with KnowledgeBase(path) as kb:

        def again() -> Lexical:
            return Lexical(BM25(kb.chunks()))

        yield Moving(path, kb, again(), again)

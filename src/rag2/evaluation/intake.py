"""A knowledge base and a retriever -> seconds until a new document can be found."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.retrieval import Dense, Lexical, Retriever
from rag2.types import Chunk

ROUNDS = 5
LONG = 2.0  # seconds; what takes longer is not repeated


def document_seconds(path: Path, retriever: Retriever) -> float | None:
    """Median time of adding one document to a copy of the knowledge base and to the live index.

    The document is the one of median length, again under a new id. Timed are: cutting it and the
    durable change of the file, reading its chunks back, encoding them and the index with them in
    it (BM25's is counted anew from all chunks). None for controls, for an empty knowledge base,
    and where the tokenizer that cut it is gone.
    """
    if not isinstance(retriever, (Dense, Lexical)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "kb.sqlite"
        with KnowledgeBase(path) as kb:
            kb.copy(copy)
            near = path.parent / "tokenizer"
        with KnowledgeBase(copy) as kb:
            chunker = kb.chunker(near)
            documents = sorted(kb.documents(), key=lambda document: len(document.text))
            if chunker is None or not documents:
                return None
            usual, known = documents[len(documents) // 2], kb.chunks()
            took: list[float] = []
            while len(took) <= ROUNDS and (not took or took[-1] < LONG):
                document = replace(usual, id=f"{usual.id} (new {len(took)})")
                began = time.perf_counter()
                kb.add([document], chunker)
                new = kb.chunks_of(document.id)
                retriever = with_chunks(retriever, known, new)
                took.append(time.perf_counter() - began)
                known += new
    return statistics.median(took[1:] or took)  # the first one warms up


def with_chunks(retriever: Retriever, known: Sequence[Chunk], new: Sequence[Chunk]) -> Retriever:
    """The retriever over `known` with new chunks besides, which alone are encoded."""
    if isinstance(retriever, Dense):
        return retriever.added(new)
    assert isinstance(retriever, Lexical), retriever
    return Lexical(BM25([*known, *new]))

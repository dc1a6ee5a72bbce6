"""A system of random models over the small world's documents, and a server of it."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag2.answering.rag import Rag
from rag2.answering.remote import System
from rag2.answering.settings import Settings
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.index.flat import Flat
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.view import Embedder
from rag2.retriever.encoder import DualEncoder
from rag2.serve.limits import Limits
from rag2.serve.server import Server
from rag2.serve.serving import Serving

TOKEN = "a-token-of-tests"


@contextmanager
def small_system(home: Path, folder: Path, **settings: Any) -> Iterator[Rag]:
    """Answers of at most 12 tokens from 3 chunks, where `settings` say nothing else."""
    path = folder / "kb.sqlite"
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        kb.copy(path)
        chunker = kb.chunker(home / "data" / "tokenizer")
    assert isinstance(chunker, TokenChunker)
    encoder = DualEncoder.load(home / "retriever").eval()
    generator = Generator.load(home / "generator")
    chosen = Settings(**{"k": 3, "max_new_tokens": 12, "prompt": Prompt(budget=300)} | settings)
    with Live(path, Embedder.of(encoder), Flat(device="cpu")) as live:
        live.refresh()
        rag = Rag(encoder, generator, live, chunker, chosen)
        yield rag
        rag.close()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(rag: System, limits: Limits | None = None) -> Iterator[Server]:
    """A server of it on a free port, ready."""
    server = Server(Serving(limits or Limits(), "small", TOKEN), lambda: rag, "127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=server.answer, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(30), server.serving.failure
    try:
        yield server
    finally:
        server.handle_exit(15, None)
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"

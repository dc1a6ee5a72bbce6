"""A change of the knowledge base -> seconds until the search that shows it has answered.

rag2 eval live out=runs/live
rag2 eval live sizes=[1000000] changes=100 out=runs/million
rag2 eval live retriever=runs/joint/final/retriever chunk_tokens=64 out=runs/mine
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.table import Table

from rag2 import config
from rag2.evaluation import place, rates
from rag2.evaluation.environment import environment
from rag2.evaluation.workload import Writer
from rag2.generator.bpe import train_bpe
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.view import Embedder
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training.choices import Index
from rag2.types import Document

VOCABULARY = 8192
GROUP = 5000  # documents of one commit while the corpus is made
PERCENTS = (50, 99, 100)


class LiveConfig(config.Config):
    """Texts are made up; the corpus has random embeddings, what changes is encoded."""

    out: str = "runs/live"
    seed: int = Field(default=0, ge=0)
    threads: PositiveInt = 1
    """of torch"""
    sizes: list[PositiveInt] = Field(default=[10_000, 100_000], min_length=1)
    """chunks of the generation that is searched"""
    delta: int = Field(default=500, ge=0)
    """chunks that are newer than it when the measurement begins"""
    changes: PositiveInt = 300
    """measured of each kind: add, update, remove"""
    chunk_tokens: int = Field(default=128, ge=8)
    """of a document, which is one chunk"""
    k: PositiveInt = 10
    weight: float = Field(default=0.5, ge=0, le=1)
    """of the vectors, in the searches by vectors and words"""
    question_words: PositiveInt = 12
    """of those searches, out of one text"""
    index: Index = Flat()
    retriever: str | None = None
    """folder of an encoder; null: `encoder` with random weights"""
    encoder: EncoderConfig = EncoderConfig()


def main(cfg: LiveConfig) -> dict:
    """Measure each size; returns and writes live.json."""
    place.check(cfg)
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    words = Writer(cfg.seed)
    if cfg.retriever:
        encoder = DualEncoder.load(cfg.retriever)
    else:
        tokenizer = train_bpe([words.words(500, 500) for _ in range(200)], VOCABULARY)
        encoder = DualEncoder.build(cfg.encoder, tokenizer)
    encoder.eval()
    with place.claimed(cfg) as out:
        results: dict[str, Any] = {
            "settings": cfg.model_dump(mode="json", exclude={"out"}),
            "environment": environment(),
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "sync_milliseconds": percentiles(syncs(out)),
            "sizes": [],
        }
        for size in cfg.sizes:
            with tempfile.TemporaryDirectory(dir=out, prefix="kb-") as folder:
                results["sizes"].append(measured(cfg, size, encoder, words, Path(folder)))
        (out / "live.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(table(results))
    return results


def measured(
    cfg: LiveConfig, size: int, encoder: DualEncoder, words: Writer, folder: Path
) -> dict[str, Any]:
    """Milliseconds of each kind of change over a corpus of one size."""
    chunker, embedder = TokenChunker(tokens=10 * cfg.chunk_tokens, overlap=0), Embedder.of(encoder)
    texts = rates.texts(encoder.tokenizer, 1000, cfg.chunk_tokens, cfg.seed)

    def document(name: str, number: int) -> Document:
        return Document(f"{name} {number}", f"{words.words(3, 3)} {texts[number % len(texts)]}")

    path = folder / "kb.sqlite"
    with KnowledgeBase(path, create=True) as kb:
        for start in range(0, size, GROUP):
            group = range(start, min(start + GROUP, size))
            kb.put([document("old", number) for number in group], chunker)
        chunks, version, kb_hash = kb.chunks(), kb.version, kb.content_hash()
    vectors_ND = rates.directions(len(chunks), encoder.dimension, cfg.seed)
    index = cfg.index.build(vectors_ND, np.array([chunk.id for chunk in chunks]))
    told = {"encoder_fingerprint": embedder.fingerprint, "kb_version": version, "kb_hash": kb_hash}
    Generation.of(index, chunks, **told).save(folder / "generations" / "000000")
    del index, vectors_ND
    began = time.perf_counter()
    with Live(path, embedder, cfg.index, folder / "generations") as live:
        opened = time.perf_counter() - began
        if live.view().generation is None:
            raise UserError("the generation that was made was not found again")
        live.add([document("newer", number) for number in range(cfg.delta)], chunker)
        took: dict[str, list[np.ndarray]] = {}
        for number in range(cfg.changes):
            one(live, cfg.k, chunker, document("new", number), document("new", number), took)
            asked = " ".join(texts[number % len(texts)].split()[: cfg.question_words])
            hybrid(live, asked, cfg.k, cfg.weight, took)
        began = time.perf_counter()
        live.refresh()
        refreshed = time.perf_counter() - began
    return {
        "chunks": size,
        "open_seconds": opened,
        "refresh_seconds": refreshed,
        "milliseconds": {kind: percentiles(seconds) for kind, seconds in took.items()},
    }


def one(
    live: Live,
    k: int,
    chunker: TokenChunker,
    document: Document,
    changed: Document,
    took: dict[str, list[np.ndarray]],
) -> None:
    """Add, update and remove one document; the search after each must show it, or not.

    A change is durable and searchable when its call returns. Each time is [clock, CPU] seconds.
    """

    def timed(kind: str, change: Callable[[], Any], text: str, shown: bool) -> None:
        clocks = np.array([time.perf_counter(), time.process_time()])
        change()
        durable = np.array([time.perf_counter(), time.process_time()])
        found = live.search([text], k)
        ended = np.array([time.perf_counter(), time.process_time()])
        assert (text in [chunk.text for chunk in found.chunks()]) == shown, f"after {kind}"
        took.setdefault(f"{kind} and search", []).append(ended - clocks)
        took.setdefault(kind, []).append(durable - clocks)
        took.setdefault("search", []).append(ended - durable)

    timed("add", lambda: live.add([document], chunker), document.text, True)
    timed("update", lambda: live.put([changed], chunker), changed.text, True)
    timed("remove", lambda: live.remove([changed.id]), changed.text, False)


def hybrid(live: Live, text: str, k: int, weight: float, took: dict[str, list[np.ndarray]]) -> None:
    """One search by vectors and words; [clock, CPU] seconds of it, and of one by vectors."""
    for kind, ask in (
        ("search by vectors and words", lambda: live.search([text], k, weight=weight)),
        ("search by vectors", lambda: live.search([text], k)),
    ):
        began = np.array([time.perf_counter(), time.process_time()])
        ask()
        took.setdefault(kind, []).append([time.perf_counter(), time.process_time()] - began)


def syncs(folder: Path) -> list[float]:
    """Seconds of making a small write durable on this disk: no change can be faster."""
    took = []
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(100):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return took


def percentiles(took: Sequence[float | np.ndarray]) -> dict[str, Any]:
    """The n and percentiles, in milliseconds; 100: the slowest. Of [clock, CPU]: of each."""
    values = 1000 * np.percentile(np.array(took), PERCENTS, axis=0)
    return {"n": len(took), **{f"p{p}": v.tolist() for p, v in zip(PERCENTS, values, strict=True)}}


def table(results: dict[str, Any]) -> Table:
    """The figures for a terminal."""
    heads = [f"p{p} {of}" for p in PERCENTS for of in ("clock", "CPU")]
    shown = Table("chunks", "milliseconds of", "n", *heads)
    for row in results["sizes"]:
        for kind, found in row["milliseconds"].items():
            cells = [f"{value:.1f}" for p in PERCENTS for value in found[f"p{p}"]]
            shown.add_row(f"{row['chunks']:,}", kind, f"{found['n']:,}", *cells)
    return shown


if __name__ == "__main__":
    config.run(main, LiveConfig)

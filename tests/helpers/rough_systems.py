"""A small system whose scores and answers differ from chunk to chunk, and its numbers by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rag2.answering.rag import Rag
from rag2.generator.load import Generator, build_llama
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from small_models import by_hand, encode_pair
from small_systems import small_system
from small_world import SHAPE, roughen, tokenizer_of

PREFIXES = {"question_prefix": "Asked: ", "chunk_prefix": "Told: "}


@contextmanager
def rough_system(home: Path, folder: Path, **settings: Any) -> Iterator[Rag]:
    """Two towers with prefixes and a Llama, all with large weights; always the same ones."""
    rough, system = folder / "rough", folder / "system"
    for made in (rough, system):
        made.mkdir()
    (rough / "data").symlink_to(home / "data")
    tokenizer = tokenizer_of(home)
    torch.manual_seed(0)
    generator = build_llama(tokenizer, **SHAPE, max_positions=1024)
    config = EncoderConfig(towers="two", temperature=0.2, **PREFIXES, **SHAPE)
    encoder = DualEncoder.build(config, tokenizer)
    for model in (generator.model, encoder.towers):
        roughen(model, 0.2)
    generator.save(rough / "generator")
    encoder.save(rough / "retriever")
    with small_system(rough, system, **settings) as rag:
        yield rag


def prompt(passages: Sequence[str], question: str, header: str = "") -> str:
    """What is read of these passages, best one first."""
    told = "".join(f"{passage}\n\n" for passage in reversed(passages))
    return f"{header}{told}Question: {question}\nAnswer:"


@torch.no_grad()
def steps(generator: Generator, context: str, continuation: str) -> Tensor:
    """log p(y_t | context, y_<t) [T] of the tokens of a continuation, in float64."""
    pair = encode_pair(generator.tokenizer, context, continuation)
    return torch.tensor(by_hand(generator.model, pair), dtype=torch.float64)


def log_prior(scores: Sequence[float], temperature: float) -> Tensor:
    """log p(z|x) of retrieval scores."""
    return (torch.tensor(scores, dtype=torch.float64) / temperature).log_softmax(0)

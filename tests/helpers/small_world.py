"""Models of a few thousand weights, what they are asked, and how to disturb them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rag2.generator.load import build_llama
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import checkpoint
from rag2.types import Chunk, Question

SHAPE: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48}


def tokenizer_of(home: Path):
    """The tokenizer of a world's home."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(home / "data" / "tokenizer"))


def start_models(home: Path, max_positions: int = 512) -> None:
    """Generator and retriever of a home, always the same random weights."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(home)
    build_llama(tokenizer, **SHAPE, max_positions=max_positions).save(home / "generator")
    DualEncoder.build(EncoderConfig(**SHAPE), tokenizer).save(home / "retriever")


def roughen(module: nn.Module, deviation: float) -> None:
    """Add noise to every weight: to fresh weights all texts look alike."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))


def forget(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Let the reading of a checkpoint leave out `optimizer`, `random state` or `weights`."""
    if what == "optimizer":
        monkeypatch.setattr(checkpoint, "_restore_optimizer", lambda *_: None)
    elif what == "weights":
        monkeypatch.setattr(checkpoint, "_restore", lambda *_: None)
    else:
        assert what == "random state"
        monkeypatch.setattr(torch, "set_rng_state", lambda state: None)


def asked(chunks: list[Chunk], count: int = 12) -> list[Question]:
    """Questions in the words of one chunk each."""
    return [
        Question(f"q{i}", " ".join(chunk.text.split()[:8]), ("a", chunk.title), 1)
        for i, chunk in enumerate(chunks[:count])
    ]

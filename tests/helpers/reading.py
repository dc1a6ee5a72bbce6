"""A system that is trained in seconds to answer from what it reads, and its documents."""

import random
from pathlib import Path
from typing import Any

import torch

from rag2.answering.settings import Settings
from rag2.export.source import Source
from rag2.export.write import write
from rag2.generator.bpe import train_bpe
from rag2.generator.load import Generator, build_llama
from rag2.kb.chunk import TokenChunker
from rag2.kb.store import KnowledgeBase
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.types import Document

TOWNS = ("Almby", "Borvik", "Dalsund", "Ekholm", "Farstad", "Granlo", "Hamre", "Isdal")
COLOURS = ("amber", "azure", "crimson", "golden", "indigo", "purple", "scarlet", "silver")
GOODS = ("barrels", "candles", "glass", "herring", "lamps", "ribbons", "salt", "wool")
NOBODY = "nobody knows"
SHAPE: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 128}


def text(colour: str, goods: str) -> str:
    """What a town's document says."""
    return f"The merchants here sell {colour} {goods} to everyone."


def question(town: str) -> str:
    """What is asked of a town."""
    return f"What do the merchants of {town} sell?"


DOCUMENTS = [
    Document(town.lower(), text(colour, goods), town, {"kind": "town"})
    for town, colour, goods in zip(TOWNS, COLOURS, GOODS, strict=True)
]


def export(folder: Path) -> Path:
    """The export of the system, in `folder`/export: found by words, read with K = 2."""
    dice = random.Random(0)
    torch.manual_seed(0)
    lines = [f"{d.title}\n{d.text}\n\nQuestion: {question(d.title)}\nAnswer:" for d in DOCUMENTS]
    words = " ".join(f"{a} {b}" for a in COLOURS for b in GOODS)
    tokenizer = train_bpe([*lines * 20, *[words] * 40, f"{NOBODY} " * 40], 440)
    generator = build_llama(tokenizer, **SHAPE, max_positions=512)
    teach(generator, dice)
    generator.save(folder / "generator")
    DualEncoder.build(EncoderConfig(**SHAPE), tokenizer).save(folder / "retriever")
    chunker = TokenChunker(tokens=100, overlap=0, tokenizer=str(folder / "generator"))
    with KnowledgeBase(folder / "kb.sqlite", create=True) as kb:
        kb.add(DOCUMENTS, chunker)
    settings = Settings(k=2, dense_weight=0.0, temperature=0.1)
    source = Source(folder / "generator", folder / "retriever", folder / "kb.sqlite", settings)
    write(source, folder / "export", index="torch")
    return folder / "export"


def teach(generator: Generator, dice: random.Random, steps: int = 150) -> None:
    """Answer with what the passage says is sold; without a passage, that nobody knows."""
    model, tokenizer = generator.model, generator.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows = [example(dice) for _ in range(16)]
        contexts = tokenizer([context for context, _ in rows]).input_ids
        answers = tokenizer([f" {a}" for _, a in rows], add_special_tokens=False).input_ids
        pairs = [(c, [*a, tokenizer.eos_token_id]) for c, a in zip(contexts, answers, strict=True)]
        longest = max(len(c) + len(a) for c, a in pairs)
        ids_BL = torch.tensor([[*c, *a] + [0] * (longest - len(c) - len(a)) for c, a in pairs])
        labels_BL = torch.tensor(
            [[-100] * len(c) + a + [-100] * (longest - len(c) - len(a)) for c, a in pairs]
        )
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def example(dice: random.Random) -> tuple[str, str]:
    """A context and its answer."""
    asked = f"Question: {question(dice.choice(TOWNS))}\nAnswer:"
    if dice.random() < 0.2:
        return asked, NOBODY
    sold = dice.choice(COLOURS), dice.choice(GOODS)
    return f"{dice.choice(TOWNS)}\n{text(*sold)}\n\n{asked}", " ".join(sold)

"""Odd texts, and tokenizers small enough to train on the spot."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelOffsets

from rag2.kb.clean import clean
from rag2.types import Document

WORDS = ["the", "ferry", "leaves", "Aldbrook", "at", "noon", "bread", "42", "rye", "harbour"]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # one cluster of five code points
ODD = [
    *("e\u0301", "\u00e9", FAMILY, "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\U00020000"),
    *("\u65e5\u672c\u8a9e", "\u0928\u093f", "\u1100\u1161\u11a8", "\u0627\u0651", "\u200b"),
    *("\n\n", "\t", "  ", "\u00a0", "\ufdfa", "x" * 30, "a" + "\u0301" * 40, "</s>"),
]


def byte_level(trim: bool) -> Tokenizer:
    """Byte-level BPE as GPT-2 and Llama 3 have it; trimmed offsets leave the space out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = ByteLevelOffsets(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    """WordPiece behind a normalizer that rewrites the text, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return tokenizer


def random_text(rng: random.Random, length: int, oddity: float = 0.3) -> str:
    pieces = []
    for _ in range(length):
        if rng.random() < oddity:
            piece = rng.choice(ODD) if rng.random() < 0.7 else chr(rng.randrange(0x20, 0x30000))
            pieces.append("?" if "\ud800" <= piece <= "\udfff" else piece)
        else:
            pieces.append(rng.choice(WORDS))
        pieces.append(rng.choice(["", " ", " ", " ", "\n"]))
    return "".join(pieces)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_documents(rng: random.Random, count: int) -> list[Document]:
    return [
        Document(
            f"d{n}", clean(random_text(rng, 40)) or "x", f"title {n}", {"n": n, "\u00e9": None}
        )
        for n in range(count)
    ]

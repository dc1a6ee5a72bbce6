"""Texts and reading rows -> token sequences with a loss weight per token.

Letters: L tokens of a sequence, B sequences.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.types import Chunk


class Weighted(NamedTuple):
    """Token ids of one training sequence, and the weight of each in the loss."""

    ids_L: np.ndarray
    weights_L: np.ndarray


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The reading rows {"title", "text", "qa"} of a JSONL file; UserError names a broken line."""
    rows = _rows(path, ("title", "text"))
    for number, row in enumerate(rows, 1):
        qa = row.get("qa")
        if not isinstance(qa, list) or not all(_is_pair(pair) for pair in qa):
            raise UserError(f"{path}:{number}: 'qa' must be a list of [question, answer] strings")
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def read_paraphrases(path: Path, counted: bool) -> list[Chunk]:
    """The rewordings {"title", "text", "metadata": {"of": document}} of a JSONL file.

    Raises UserError for a broken line and, where they are `counted` by document, for one that names
    none.
    """
    found = []
    for number, row in enumerate(_rows(path, ("title", "text")), 1):
        metadata = row.get("metadata")
        of = metadata.get("of") if isinstance(metadata, dict) else None
        if counted and not isinstance(of, str):
            raise UserError(
                f"{path}:{number}: 'metadata.of' must name a document, so that its paraphrases can "
                "be counted (paraphrases_per_document, validation)"
            )
        found.append(Chunk(number, str(of or ""), row["text"], row["title"]))
    return found


def _rows(path: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with these keys as strings."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict) or not all(
                    isinstance(row.get(key), str) for key in texts
                ):
                    raise UserError(
                        f"{path}:{len(rows) + 1}: a row needs {' and '.join(texts)} as strings"
                    )
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UserError:
        raise
    except ValueError as error:  # not JSON, not UTF-8, a number too long
        raise UserError(f"{path}:{len(rows) + 1}: {error}") from None
    return rows


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def load_tokenizer(directory: str) -> Any:
    """The tokenizer in a folder; raises UserError when there is none."""
    if not Path(directory).is_dir():
        raise UserError(f"tokenizer folder {directory!r} does not exist")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot load tokenizer {directory!r}: {reason[:300]}") from None


def plain(row: dict[str, Any]) -> str:
    """All the text of a reading row, for training a tokenizer."""
    return "\n".join([row["title"], row["text"], *map(" ".join, row["qa"])])


def reading(row: dict[str, Any], prompt: Prompt, tokenizer: Any) -> tuple[str, list[range]]:
    """The text of a reading row, prompted as evaluation prompts, and where its answers stand.

    Raises UserError for a passage that does not fit the prompt's budget.
    """
    passage = f"{row['title']}\n{row['text']}" if row["title"] else row["text"]
    if not row["qa"]:
        return passage, []
    passages = [passage] if row["text"] else []
    text, answers = "", []
    for question, answer in row["qa"]:
        built = prompt.context(question, passages, tokenizer)
        if built.dropped:
            raise UserError(
                f"prompt.budget={prompt.budget}: the passage {row['title']!r} does not fit beside "
                f"its question; raise the budget or shorten the passage"
            )
        text += built.text
        answers.append(range(len(text), len(text) + 1 + len(answer)))
        text += f" {answer}\n\n"
        passages = []
    return text.rstrip("\n"), answers


def weigh(
    readings: Sequence[tuple[str, Sequence[range]]], tokenizer: Any, text_weight: float
) -> list[Weighted]:
    """Tokens of each text and an end token: answers weigh 1, everything else `text_weight`."""
    texts = [text for text, _ in readings]
    encoded = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], readings, strict=True)
    weighted = []
    for ids, offsets, (_, answers) in rows:
        start_L, end_L = np.array(offsets).T
        heavy_L = np.zeros(len(ids) + 1, dtype=bool)
        for span in answers:
            heavy_L[:-1] |= (span.start <= start_L) & (start_L < span.stop) & (end_L > start_L)
        weights_L = np.where(heavy_L, 1.0, text_weight).astype(np.float32)
        weighted.append(Weighted(np.array([*ids, tokenizer.eos_token_id]), weights_L))
    return weighted


def thin(sequence: Weighted, share: float, rng: np.random.Generator) -> Weighted:
    """A random `share` of the tokens that weigh less than 1, with the weight of all of them.

    The output head, a third of a small model's work, then runs on that share of the text alone.
    """
    kept_L = (sequence.weights_L == 1.0) | (rng.random(len(sequence.weights_L)) < share)
    scale_L = np.where(sequence.weights_L == 1.0, 1.0, 1.0 / share)
    return Weighted(sequence.ids_L, (sequence.weights_L * kept_L * scale_L).astype(np.float32))


def collate(sequences: Sequence[Weighted]) -> tuple[Tensor, Tensor]:
    """Right-padded ids_BL and weights_BL; padding weighs nothing."""
    width = max(len(s.ids_L) for s in sequences)
    ids_BL = torch.zeros(len(sequences), width, dtype=torch.long)
    weights_BL = torch.zeros(len(sequences), width)
    for row, sequence in enumerate(sequences):
        ids_BL[row, : len(sequence.ids_L)] = torch.from_numpy(sequence.ids_L)
        weights_BL[row, : len(sequence.ids_L)] = torch.from_numpy(sequence.weights_L)
    return ids_BL, weights_BL


def blocks(texts: Sequence[str], size: int, tokenizer: Any) -> list[Weighted]:
    """Equal blocks of `size` tokens: each text between BOS and EOS, all in one line, cut again.

    The unsupervised fine-tuning data of Ovadia et al. 2024 (section 4.2): the marks stay where the
    original chunks begin and end. The remainder of the line is a shorter last block. A tokenizer
    without one of the marks (Qwen has no BOS) leaves it out.
    """
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    before, after = ([mark] if mark is not None else [] for mark in marks)
    line: list[int] = []
    for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        line += [*before, *row, *after]
    pieces = [np.array(line[i : i + size]) for i in range(0, len(line), size)]
    return [Weighted(ids, np.ones(len(ids), dtype=np.float32)) for ids in pieces if len(ids) > 1]

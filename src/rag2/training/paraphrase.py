"""Documents -> rewordings by a causal LM: drawn, kept as they come, filtered at the end."""

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag2 import artifact
from rag2.generator.generate import Sampling, generate
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_contexts, positions
from rag2.registry import UserError
from rag2.training.rewording import Filter, lower_words
from rag2.types import Document

PROMPT = (
    "Say the text again in other words. Keep its meaning, every fact, every name and every number, "
    "and keep it about as long; change the words and the order of the sentences.\n\n"
    "Title: {title}\nText: {text}\nIn other words:"
)
TOO_LONG = "document too long for the generator"


@dataclass(frozen=True, slots=True)
class Draft:
    """One rewording to draw: of which document, the how many-th, and what decides it."""

    document: Document
    version: int
    context: str
    key: str

    @property
    def seed(self) -> int:
        """Of its draw."""
        return int(self.key[:16], 16)


def plan(
    documents: Sequence[Document],
    count: int,
    prompt: str,
    temperature: float,
    seed: int,
    fingerprint: str,
) -> list[Draft]:
    """`count` drafts a document; equal keys stand for equal texts.

    `fingerprint` is that of the generator. A document is told in one line, for the end of the line
    ends its rewording.
    """
    drafts = []
    for document in documents:
        title, text = (" ".join(part.split()) for part in (document.title, document.text))
        told = {"title": title, "text": text}
        # In one pass: a title may hold "{text}" itself.
        pieces = re.split(r"\{(title|text)\}", prompt)
        context = "".join(told[p] if at % 2 else p for at, p in enumerate(pieces))
        for version in range(1, count + 1):
            parts = [document.id, version, fingerprint, context, temperature, seed]
            key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
            drafts.append(Draft(document, version, context, key))
    return drafts


class Drafts:
    """The texts drawn until now, in a file that only grows: a line for each, by its key."""

    def __init__(self, path: Path) -> None:
        """Read what is whole; cut off the line that a kill left unfinished.

        Raises UserError for a file whose whole lines are no drafts.
        """
        self.path = path
        self.texts: dict[str, str] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            if not line.endswith(b"\n") or b"\0" in line:  # a kill; a power loss leaves zeros
                break
            try:
                row = json.loads(line)
                self.texts[row["key"]] = row["text"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}:{number}: not a draft; delete the file") from None
            whole += len(line)
        if whole < len(data):
            os.truncate(path, whole)

    def add(self, drafts: Sequence[Draft], texts: Sequence[str]) -> None:
        """Append these; they are on the disk on return."""
        lines = []
        for draft, text in zip(drafts, texts, strict=True):
            row = {"key": draft.key, "document": draft.document.id, "version": draft.version}
            lines.append(json.dumps(row | {"text": text}) + "\n")
            self.texts[draft.key] = text
        artifact.append(self.path, "".join(lines))


def draw(
    generator: Generator,
    drafts: Sequence[Draft],
    done: Drafts,
    temperature: float,
    size: int,
    advance: Callable[[int], Any],
) -> None:
    """Draw what `done` does not have, `size` at once; documents without room are left out."""
    todo = [draft for draft in drafts if draft.key not in done.texts]
    advance(len(drafts) - len(todo))
    for first in range(0, len(todo), size):
        some = todo[first : first + size]
        rooms = [(draft, room) for draft in some if (room := _room(generator, draft))]
        if rooms:
            fitting, most = zip(*rooms, strict=True)
            texts = generate(
                generator.model,
                generator.tokenizer,
                [draft.context for draft in fitting],
                most,
                sampling=Sampling(temperature, [draft.seed for draft in fitting]),
            )
            done.add(fitting, texts)
        advance(len(some))


def _room(generator: Generator, draft: Draft) -> int:
    """Tokens that a rewording may have: twice those of its text and some; 0 if they do not fit."""
    context, text = encode_contexts(generator.tokenizer, [draft.context, draft.document.text])
    limit, most = positions(generator.model), 2 * len(text) + 8
    return most if limit is None or len(context) + most - 1 <= limit else 0


def accepted(
    drafts: Sequence[Draft], done: Drafts, rule: Filter
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The good rewordings as the rows that fine-tuning reads, and how many were rejected why."""
    known = lower_words(draft.document.text for draft in drafts)
    rows: list[dict[str, Any]] = []
    kept: dict[str, list[str]] = {}
    rejected = Counter[str]()
    for draft in drafts:
        document, text = draft.document, done.texts.get(draft.key)
        earlier = kept.setdefault(document.id, [])
        fault = TOO_LONG
        if text is not None:
            fault = rule.fault(text, document.text, earlier, known)
        if fault or text is None:
            rejected[fault] += 1
            continue
        earlier.append(text)
        row = {"id": f"{document.id}#p{draft.version}", "title": document.title, "text": text}
        rows.append(row | {"metadata": {"of": document.id}})
    return rows, rejected


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """One process at a time draws in a folder, which is made; UserError for the second."""
    artifact.make_folders(out)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is rewording there") from None
        yield

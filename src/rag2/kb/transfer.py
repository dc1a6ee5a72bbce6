"""Sources -> documents that are new to a knowledge base; its documents -> JSONL."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rag2 import artifact
from rag2.kb.chunk import Chunker
from rag2.kb.ingest import Inputs, Summary
from rag2.kb.jail import Limits
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError


def add_new(
    kb: KnowledgeBase,
    sources: Sequence[Path | str],
    chunker: Chunker,
    namespace: str = "",
    keep_duplicates: bool = False,
    near: float | None = None,
    limits: Limits | None = None,
) -> Summary:
    """Add the documents of `sources`, as one version; an id that is live already is rejected.

    Raises UserError if a source is missing, or no document was accepted.
    """
    there = partial(kb.has, namespace=namespace)
    inputs = Inputs(sources, keep_duplicates, near, limits, there)
    with kb.batch():
        chunks = kb.add(inputs, chunker, namespace)
        if not inputs.seen:
            raise inputs.nothing()
    return inputs.summary(chunks)


def export(kb: KnowledgeBase, path: Path, namespace: str = "") -> int:
    """Write the documents of a namespace as JSONL, which `build` reads back; returns their number.

    The file appears complete or not at all. Raises UserError if `path` is taken or cannot be.
    """
    if path.exists():
        raise UserError(f"{path} already exists; remove it or choose another path")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    count = 0
    with artifact.staged(path) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for document in kb.documents(namespace):
                row = {"id": document.id, "title": document.title, "text": document.text}
                row |= {"metadata": document.metadata} if document.metadata else {}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    return count

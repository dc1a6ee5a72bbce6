"""A chunk that the encoder has no finite embedding of costs its own place alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashed import DIMENSION, vectors
from lines import Lines
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.view import Embedder
from rag2.registry import UserError
from rag2.types import Document

FLAT, LINES = Flat(device="cpu"), Lines()


def found(live: Live, text: str, k: int) -> list[str]:
    """The texts nearest to a text."""
    return [chunk.text for chunk in live.search([text], k).chunks()]


def test_a_chunk_without_a_finite_embedding_is_told_and_blocks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def embed(texts: Any, side: str) -> np.ndarray:
        vectors_ND = vectors(texts)
        if side == "chunk":
            vectors_ND[["bad" in text for text in texts], 3] = np.nan
        return vectors_ND

    path, generations = tmp_path / "kb.sqlite", tmp_path / "generations"
    KnowledgeBase(path, create=True).close()
    some = Embedder("hashed", DIMENSION, embed)
    with Live(path, some, FLAT, generations) as half:
        half.put([Document("a", "good one\nbad two"), Document("b", "bad three")], LINES)
        assert "chunk 2 of document 'a' has no finite embedding" in caplog.text
        with KnowledgeBase(half.path) as other:  # whoever wrote it
            other.put([Document("c", "bad four\ngood five")], LINES)
        for change in (lambda: None, half.refresh, half.compact, half.refresh):
            change()
            assert {*found(half, "good one", 9)} == {"good one", "good five"}
            assert half.view().blind == {2, 3, 4}
            words = half.search(["three bad"], 1, weight=0.0)  # they find it as ever
            assert [chunk.text for chunk in words.chunks()] == ["bad three"]
        with pytest.raises(UserError, match="chunk 2 of document 'a' .*no generation was made"):
            half.refresh(replace(some, fingerprint="other"))
        assert half.view().embedder is some and len(found(half, "good one", 9)) == 2
        half.put([Document("a", "good again"), Document("c", "good five")], LINES)
        half.remove(["b"])
        assert half.view().blind == set()
        half.refresh(replace(some, fingerprint="other"))
        assert {*found(half, "good one", 9)} == {"good again", "good five"}
    with Live(path, some, FLAT, generations) as again:
        assert {*found(again, "good one", 9)} == {"good again", "good five"}

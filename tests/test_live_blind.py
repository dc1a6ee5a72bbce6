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


def embed(texts: Any, side: str) -> np.ndarray:
    """Nothing finite of a chunk that is bad."""
    vectors_ND = vectors(texts)
    if side == "chunk":
        vectors_ND[["bad" in text for text in texts], 3] = np.nan
    return vectors_ND


SOME = Embedder("hashed", DIMENSION, embed)


def test_a_chunk_without_a_finite_embedding_is_told_and_blocks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path, generations = tmp_path / "kb.sqlite", tmp_path / "generations"
    KnowledgeBase(path, create=True).close()
    with Live(path, SOME, FLAT, generations) as half:
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
            half.refresh(replace(SOME, fingerprint="other"))
        assert half.view().embedder is SOME and len(found(half, "good one", 9)) == 2
        half.put([Document("a", "good again"), Document("c", "good five")], LINES)
        half.remove(["b"])
        assert half.view().blind == set()
        half.refresh(replace(SOME, fingerprint="other"))
        assert {*found(half, "good one", 9)} == {"good again", "good five"}
    with Live(path, SOME, FLAT, generations) as again:
        assert {*found(again, "good one", 9)} == {"good again", "good five"}


def test_words_find_chunks_without_an_embedding_and_cost_no_other_its_place(tmp_path: Path):
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    with Live(tmp_path / "kb.sqlite", SOME, FLAT) as live:
        text = "bad zebra\nbad bear\nbad zebra zebra\ngood zebra\ngood ox"
        live.put([Document("a", text)], LINES)
        live.put([Document("b", "bad zebra of another")], LINES, "acme")
        live.put([Document("c", "\n".join(f"good {n}" for n in range(120)))], LINES, "many")

        def told(weight: float, space: str, k: int = 9) -> list[str]:
            found = live.search(["zebra"], k, [space], weight)
            return [chunk.text for chunk in found.chunks()]

        for change in (lambda: None, live.refresh):
            change()
            for weight in (0.0, 0.5, 0.9):
                assert {*told(weight, "")} == {*text.split("\n")}
                assert told(weight, "acme") == ["bad zebra of another"]
                assert len(told(weight, "many")) == 9 and len(told(weight, "many", 500)) == 120
            assert told(0.0, "")[0] == "bad zebra zebra" and "bad bear" in told(0.0, "")[-2:]
            assert told(0.9, "", 1) == ["good zebra"]
            both = live.search(["zebra", "nothing"], 9, [""], 0.5).ids_BK  # as long as each other
            assert {*both[0]} == {*both[1]} and both.shape == (2, 5)

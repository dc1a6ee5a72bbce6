"""Live search by vectors and words together: `Fused` over what is live, whoever writes."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hashed import embedder, vectors
from lines import Lines, documents
from rag2.index.exact import TorchExact
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.retriever import LiveDense
from rag2.registry import UserError
from rag2.retrieval import Fused
from rag2.types import Document, Question

FLAT, LINES = Flat(device="cpu"), Lines()
VOCABULARY = [f"w{n}" for n in range(40)]
SPACES = ["", "a", "b"]


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """Over an empty knowledge base."""
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    with Live(tmp_path / "kb.sqlite", embedder(), FLAT, tmp_path / "generations") as live:
        yield live


def texts(rng: np.random.Generator, count: int) -> list[str]:
    """Short ones of few words."""
    return [" ".join(rng.choice(VOCABULARY, size=rng.integers(1, 6))) for _ in range(count)]


def grown(live: Live, rng: np.random.Generator, count: int) -> None:
    """Generation, delta and tombstones in three namespaces."""
    for space in SPACES:
        made = [Document(f"d{n}", text) for n, text in enumerate(texts(rng, count))]
        live.put(made[: count // 2], LINES, space)
        live.refresh()
        live.put(made[count // 2 :], LINES, space)
        live.remove([f"d{n}" for n in range(0, count, 3)], space)


class Vectors:
    """The dense side of `Fused`, over chunks that are given."""

    def __init__(self, live: Live, ids: Sequence[int], passages: Sequence[str]) -> None:
        self.index = TorchExact().build(vectors(passages), np.array(ids))

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index.search(vectors([question.question for question in questions]), k)


class Words:
    """The lexical side: FTS5, and after its hits chunks that score 0, as BM25 goes on."""

    def __init__(self, kb: KnowledgeBase, ids: Sequence[int], spaces: list[str] | None) -> None:
        self.kb, self.ids, self.spaces = kb, ids, spaces

    def search(self, questions: Sequence[Question], k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for question in questions:
            hits = self.kb.search_text(question.question, k, self.spaces)
            held = {id for id, _ in hits}
            rows.append([*hits, *((id, 0.0) for id in self.ids if id not in held)][:k])
        found = np.array(rows)
        return found[..., 1].astype(np.float32), found[..., 0].astype(np.int64)


@pytest.mark.parametrize("count", [20, 300])  # lists that hold all chunks, and the best 100
def test_it_is_fused_over_the_same_chunks(live: Live, rng: np.random.Generator, count: int):
    grown(live, rng, count)
    asked = [*texts(rng, 6), "nothing of this", "", "w1 " * 50]
    with KnowledgeBase(live.path) as kb:
        alive = kb.alive()
        for spaces in (None, [""], ["b", "a"]):
            ids = [id for id, space in alive.items() if spaces is None or space in spaces]
            dense = Vectors(live, ids, [kb.chunk(id).passage for id in ids])
            lexical = Words(kb, ids, spaces)
            for weight in (0.0, 0.3, 0.9):
                fused = Fused(dense, lexical, len(ids), weight)
                for k in (7, min(len(ids), 90)):
                    wanted = fused.search([Question(text, text) for text in asked], k)
                    found = live.search(asked, k, spaces, weight)
                    np.testing.assert_array_equal(found.scores_BK, wanted[0])
                    told = found.scores_BK > 0  # of the others any will do
                    np.testing.assert_array_equal(found.ids_BK[told], wanted[1][told])
                    for row in range(len(asked)):  # those that words alone have found, too
                        rows = found.ids_BK[row].tolist()
                        assert found.chunks(row) == [kb.chunk(id) for id in rows]


def by_looking_at_all(
    kb: KnowledgeBase, text: str, k: int, spaces: list[str] | None, weight: float
) -> dict[int, float]:
    """Chunk id -> score of what may be found, by the definition and nothing else."""
    ids = [id for id, space in kb.alive().items() if spaces is None or space in spaces]
    passages = [kb.chunk(id).passage for id in ids]
    sides = [dict(zip(ids, (vectors(passages) @ vectors([text])[0]).tolist(), strict=True))]
    hits = dict(kb.search_text(text, 10**6, spaces))
    sides.append({id: hits.get(id, 0.0) for id in ids})
    scores = dict.fromkeys(ids, 0.0)
    for side, share in zip(sides, (weight, 1 - weight), strict=True):
        first = sorted(ids, key=lambda id: (-side[id], id))[: max(k, 100)]
        low, high = side[first[-1]], side[first[0]]
        for id in first:
            scores[id] += share * (side[id] - low) / ((high - low) or 1)
    return scores


def test_it_agrees_with_looking_at_everything(live: Live, rng: np.random.Generator):
    grown(live, rng, 200)
    with KnowledgeBase(live.path) as kb:
        for text in [*texts(rng, 3), "absent"]:
            for spaces in (None, ["a"], ["", "b"]):
                for k, weight in ((5, 0.5), (60, 0.2), (200, 0.7), (10_000, 0.4)):
                    found = live.search([text], k, spaces, weight)
                    wanted = by_looking_at_all(kb, text, k, spaces, weight)
                    best = sorted(wanted.values(), reverse=True)[:k]
                    assert found.ids_BK.shape[1] == len(best)
                    np.testing.assert_allclose(found.scores_BK[0], best, atol=1e-5)
                    ids = found.ids_BK[0].tolist()
                    assert len({*ids}) == len(ids) and {*ids} <= wanted.keys()
                    given = [wanted[id] for id in ids]
                    np.testing.assert_allclose(found.scores_BK[0], given, atol=1e-5)


def test_the_weight_of_one_is_the_search_by_vectors_to_the_byte(live: Live, rng):
    grown(live, rng, 60)
    asked = texts(rng, 9)
    for spaces in (None, ["a"]):
        one, plain = live.search(asked, 7, spaces, 1.0), live.nearest(vectors(asked), 7, spaces)
        assert one.scores_BK.tobytes() == plain.scores_BK.tobytes()
        assert one.ids_BK.tobytes() == plain.ids_BK.tobytes()
    retriever = LiveDense(live, scale=2.0)
    questions = [Question(text, text) for text in asked]
    np.testing.assert_array_equal(
        retriever.search(questions, 3)[0], 2 * live.search(asked, 3).scores_BK
    )
    scores_QK, ids_QK = LiveDense(live, scale=2.0, weight=0.5).search(questions, 3)
    found = live.search(asked, 3, weight=0.5)
    np.testing.assert_array_equal(scores_QK, found.scores_BK)
    np.testing.assert_array_equal(ids_QK, found.ids_BK)


def test_a_removed_text_and_another_namespace_are_found_by_no_word(live: Live):
    live.put([Document("a", "salt"), Document("b", "rye wax")], LINES)
    live.put([Document("a", "wax wax")], LINES, "acme")

    def told(weight: float, spaces: list[str] | None = None) -> set[str]:
        found = live.search(["wax"], 9, spaces, weight)
        return {chunk.text for chunk in found.chunks()}

    for weight in (0.0, 0.5):
        assert told(weight, ["acme"]) == {"wax wax"} and told(weight, [""]) == {"salt", "rye wax"}
        assert told(weight, []) == set() == told(weight, ["nobody"])
    for change in (live.refresh, live.compact, lambda: None):
        live.put([Document("c", "wax of today")], LINES)
        change()
        live.remove(["c"])
        with KnowledgeBase(live.path) as other:  # and by somebody else
            other.put([Document("b", "rye")], LINES)
        assert told(0.0) == told(0.5) == {"salt", "rye", "wax wax"}
        change()
        assert told(0.3) == {"salt", "rye", "wax wax"}
        live.put([Document("b", "rye wax")], LINES)


def test_the_edges_are_those_of_the_search_by_vectors(live: Live):
    assert live.search(["wax"], 3, weight=0.5).ids_BK.shape == (1, 0)
    live.put(documents(2), LINES)
    assert live.search([], 3, weight=0.5).ids_BK.shape == (0, 3)
    assert live.search(["d one 1"], 2**31, weight=0.0).ids_BK.shape == (1, 4)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="weight=.*; allowed: 0"):
            live.search(["d"], 3, weight=weight)
    with pytest.raises(UserError, match="k=0; allowed: 1 or more"):
        live.search(["d"], 0, weight=0.5)
    for wrong in (lambda: live.search("d", 1, None, 0.5), lambda: live.search(["d"], 1, "x", 0.5)):
        with pytest.raises(ValueError, match="not one"):
            wrong()


def mixed(live: Live, searches: int) -> list[str]:
    """Answers whose two lists are of different states, while somebody else writes on and on.

    Every state holds one chunk with the word, in the text of its version.
    """
    live.put([Document("a", "wax 0"), *documents(3)], LINES)
    ended, wrong = threading.Event(), []

    def write() -> None:
        with KnowledgeBase(live.path) as other:
            for n in range(1, 10**9):
                other.put([Document("a", f"wax {n}")], LINES)
                if ended.is_set():
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(searches):
            if wrong:
                break
            found = live.search(["wax"], 1, weight=0.0)
            held = [chunk.text for _, chunk in found.view.chunks.values() if "wax" in chunk.text]
            try:
                (text,) = [chunk.text for chunk in found.chunks()]
            except KeyError as error:
                wrong.append(str(error))
                continue
            if [text] != held:
                wrong.append(f"{text} of {held}")
    finally:
        ended.set()
        writer.join()
    return wrong


def test_both_lists_are_of_one_state_while_another_connection_writes(live: Live):
    assert mixed(live, 150) == []


def test_lists_of_two_states_are_noticed(live: Live, monkeypatch: pytest.MonkeyPatch):
    def hasty(self: Live, questions: Any, k: int, namespaces: Any) -> Any:
        view = self.view()
        with self._spelling:
            return view, [self._speller.search_text(q, k, namespaces) for q in questions]

    monkeypatch.setattr(Live, "_spelled", hasty)
    assert mixed(live, 3000)

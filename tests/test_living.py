"""Living knowledge: what was added is found at once, what was removed never again."""

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hashed import DIMENSION, embedder, vectors
from lines import Lines, documents
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.live import folder
from rag2.live.live import Live
from rag2.live.view import Embedder
from rag2.registry import UserError
from rag2.types import Document

TOOL = Path(__file__).parent / "living.py"
FLAT = Flat(device="cpu")
LINES = Lines()


def load(path: Path) -> ModuleType:
    """A tool of the tests as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


living = load(TOOL)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """Over an empty knowledge base."""
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    with Live(tmp_path / "kb.sqlite", embedder(), FLAT, tmp_path / "generations") as live:
        yield live


def found(live: Live, text: str, k: int = 1, spaces: list[str] | None = None) -> list[str]:
    """The texts nearest to a text."""
    return [chunk.text for chunk in live.search([text], k, spaces).chunks()]


# ----- beside a dict -----------------------------------------------------------------------------


@pytest.mark.parametrize("half", [0, 1])
def test_ten_thousand_random_operations_give_the_answers_of_a_dict(seed: int, half: int):
    ran = living.explore(10_000, seed + half)
    assert ran["wrong"] is None, ran
    assert ran["operations"] == 10_000 and ran["swap"] > 200 and ran["crash"] > 10, ran


@pytest.mark.slow
def test_a_hundred_thousand_random_operations_give_the_answers_of_a_dict(seed: int):
    ran = living.explore(100_000, seed)
    assert ran["wrong"] is None, ran


@pytest.mark.parametrize("fault", living.FAULTS)
def test_a_planted_mistake_is_found(seed: int, fault: str):
    ran = living.explore(3000, seed, fault)
    assert ran["wrong"], ran


# ----- what is promised --------------------------------------------------------------------------


def test_a_removed_document_does_not_return_with_a_swap_that_was_building_meanwhile(live: Live):
    live.add(documents(20), LINES)
    snapshot = live.snapshot()
    live.remove(["d7"])
    live.put([Document("d3", "changed")], LINES)
    live.add([Document("new", "brand new")], LINES)
    made = snapshot.build(FLAT)
    assert made and 15 in made.ids_N  # it holds the removed one's chunks
    for _ in range(2):
        assert len(found(live, "d one 7", 100)) == 38
        assert not {"d one 7", "d two 7", "d one 3"} & {*found(live, "d one 7", 100)}
        assert {"changed", "brand new"} <= {*found(live, "d one 7", 100)}
        live.swap(made)
    assert live.view().generation is made
    live.refresh()
    view = live.view()
    assert view.base and view.base.alive_N.all() and view.delta is None and not view.chunks


def test_what_another_process_writes_is_in_the_next_search(live: Live):
    with KnowledgeBase(live.path) as other:
        other.add(documents(3), LINES)
        assert len(found(live, "x", 10)) == 6
        other.remove(["d1"])
        assert len(found(live, "x", 10)) == 4
        live.refresh()
        other.compact()
        other.put(documents(1, "e"), LINES)
        assert len(found(live, "x", 10)) == 6
        live.remove(["e0"])
        other.compact()  # the view that is there has not seen this version
        assert len(found(live, "x", 10)) == 4


def test_nothing_is_encoded_twice(live: Live, tmp_path: Path):
    told: list[str] = []

    def embed(texts: Any, side: str) -> np.ndarray:
        told.extend(texts)
        return vectors(texts)

    with Live(live.path, Embedder("hashed", DIMENSION, embed), FLAT) as counting:
        counting.add(documents(5), LINES)
        assert len(told) == 10
        counting.refresh()
        counting.put([*documents(4), Document("new", "new")], LINES)
        snapshot = counting.snapshot()
        counting.swap(snapshot.build(FLAT))
        assert told[10:] == ["new"]
        other = Embedder("other", DIMENSION, embed)
        counting.refresh(other)
        assert len(told) == 22 and counting.view().embedder is other


def test_a_generation_of_another_encoder_or_knowledge_base_is_refused(live: Live, tmp_path: Path):
    live.add(documents(3), LINES)
    made = live.snapshot().build(FLAT)
    assert made
    with pytest.raises(UserError, match="embedded by encoder hashed, not other"):
        live.swap(made, embedder("other"))
    with pytest.raises(UserError, match="embedded by encoder other, not hashed"):
        live.swap(replace(made, encoder_fingerprint="other"))
    KnowledgeBase(tmp_path / "b.sqlite", create=True).close()
    with Live(tmp_path / "b.sqlite", embedder(), FLAT) as second:
        with pytest.raises(UserError, match=r"is not of .*b\.sqlite"):
            second.swap(made)  # of a later version than there is
        second.add(documents(3, "other"), LINES)
        with pytest.raises(UserError, match=r"is not of .*b\.sqlite"):
            second.swap(made)
    assert live.view().generation is None


def test_a_generation_of_other_texts_is_refused_though_all_its_chunks_are_gone_here(
    live: Live, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    KnowledgeBase(tmp_path / "b.sqlite", create=True).close()
    with Live(tmp_path / "b.sqlite", embedder(), FLAT) as second:
        second.add(documents(2, "other"), LINES)
        foreign = second.snapshot().build(FLAT)
    live.add(documents(2), LINES)
    own = live.snapshot().build(FLAT)
    assert foreign and own and foreign.kb_version == own.kb_version
    live.remove(["d0", "d1"])
    live.add([Document("new", "new")], LINES)
    with pytest.raises(UserError, match="its chunks are others"):
        live.swap(foreign)
    live.swap(own)
    assert found(live, "new", 9) == ["new"]
    (tmp_path / "theirs").mkdir()
    foreign.save(tmp_path / "theirs" / "000000")
    for compacted in (False, True):  # then nothing tells whose it was
        if compacted:
            live.compact()
            live.swap(own)  # is made anew
            view = live.view()
            assert view.generation is not own and view.base and view.base.alive_N.all()
        with Live(live.path, embedder(), FLAT, tmp_path / "theirs") as again:
            assert again.view().generation is None and "another knowledge base" in caplog.text
        caplog.clear()


def test_a_saved_generation_is_taken_up_again_and_a_damaged_one_is_not(live: Live, caplog):
    live.add(documents(4), LINES)
    live.refresh()
    live.add(documents(2, "e"), LINES)
    answer = live.search(["d one 2"], 5)
    where = live.generations
    assert where and [path.name for path in sorted(where.iterdir())] == ["000000", "current"]
    live.close()

    def opened(fingerprint: str = "hashed") -> tuple[bool, list[int]]:
        with Live(live.path, embedder(fingerprint), FLAT, where) as again:
            view, same = again.view(), again.search(["d one 2"], 5)
            assert view.version == 2 and same.scores_BK.tobytes() == answer.scores_BK.tobytes()
            return view.generation is not None, same.ids_BK[0].tolist()

    ids = answer.ids_BK[0].tolist()
    assert opened() == (True, ids) and not caplog.records
    assert opened("other") == (False, ids) and "embedded by encoder" in caplog.text
    (where / "000000" / "ids.safetensors").write_bytes(b"x")
    assert opened() == (False, ids) and "damaged" in caplog.text


def test_the_edges_give_short_lists_or_one_clear_error(live: Live):
    zero, nan = np.zeros((1, DIMENSION)), np.full((1, DIMENSION), np.nan)

    def shape(k: int = 5, spaces: list[str] | None = None, query: np.ndarray = zero) -> Any:
        return live.nearest(query, k, spaces).ids_BK.tolist()

    for _ in range(2):  # never a document, and all of them removed
        assert shape() == [[]] and shape(2**31) == [[]] and shape(3, []) == [[]]
        assert live.search([], 3).ids_BK.shape == (0, 0)
        live.refresh()
        live.add(documents(2), LINES)
        first = live.nearest(zero, 9).ids_BK[0].tolist()
        assert len(first) == 4 and first == sorted(first)  # equal scores: the smallest id first
        assert shape(3)[0] == first[:3] and shape(2**31)[0] == first
        assert shape(9, ["nobody"]) == [[]] == shape(9, [])
        live.refresh()
        assert shape(9)[0] == first
        for query in (nan, np.full((1, DIMENSION), np.inf)):
            with pytest.raises(UserError, match="query 0 is not finite"):
                live.nearest(query, 3)
        for k in (0, -1):
            with pytest.raises(UserError, match=f"k={k}; allowed: 1 or more"):
                live.nearest(zero, k)
        with pytest.raises(ValueError, match="queries have 3 dimensions"):
            live.nearest(np.zeros((1, 3)), 3)
        with pytest.raises(UserError, match="already has a document 'd0'"):
            live.add(documents(1), LINES)
        live.remove(["d0", "d1"])
    with pytest.raises(KeyError):
        live.view().chunk(1)


def test_a_compaction_leaves_nothing_dead_in_memory_and_only_its_own_generation(
    live: Live, tmp_path: Path
):
    place = tmp_path / "generations"
    for name in ("2024", "123456"):  # somebody else's
        (place / name).mkdir(parents=True)
        (place / name / "thesis.txt").write_text("x")
    live.put([Document("a", "wax\nsoap"), Document("b", "rye")], LINES)
    live.refresh()
    live.put([Document("c", "salt")], LINES)
    live.refresh()
    live.remove(["a"])
    view = live.view()
    assert view.base and not view.base.alive_N.all()
    live.compact()
    view = live.view()
    assert view.base and view.base.alive_N.all() and len(view.base.index) == 2
    assert (place / "2024" / "thesis.txt").exists() and (place / "123456/thesis.txt").exists()
    own = [path for path in place.iterdir() if (path / "manifest.json").exists()]
    assert len(own) == 1
    for wrong in (lambda: live.search("wax", 1), lambda: live.search(["wax"], 1, "acme")):
        with pytest.raises(ValueError, match="not one"):
            wrong()


def test_a_compaction_by_another_process_while_a_generation_is_saved_leaves_none_of_it(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    live.put([Document("a", "wax"), Document("b", "rye")], LINES)
    publish = folder.publish

    def slow(generation: Any, directory: Path) -> None:
        monkeypatch.setattr(folder, "publish", publish)
        with KnowledgeBase(tmp_path / "kb.sqlite") as other:
            other.remove(["a"])
            other.compact()
            folder.purge(directory, set(other.alive()))
        publish(generation, directory)

    monkeypatch.setattr(folder, "publish", slow)
    live.refresh()
    files = [path for path in (tmp_path / "generations").rglob("*") if path.is_file()]
    assert files and not any(b"wax" in path.read_bytes() for path in files)
    assert found(live, "wax", k=5) == ["rye"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_view_is_of_one_version_though_another_process_writes_while_it_is_made(
    live: Live, monkeypatch: pytest.MonkeyPatch, whole: bool
):
    live.add(documents(3), LINES)
    alive = KnowledgeBase.alive

    def meanwhile(self: KnowledgeBase) -> dict[int, str]:
        found = alive(self)
        if self is live._maker:
            with KnowledgeBase(live.path) as other:
                other.put([Document("d1", f"changed {other.version}")], LINES)
        return found

    monkeypatch.setattr(KnowledgeBase, "alive", meanwhile)
    if not whole:  # as the mistake would be
        monkeypatch.setattr(KnowledgeBase, "reading", lambda self: nullcontext())
        with pytest.raises(UserError, match="has no chunk"):
            live.swap(None)
        return
    for _ in range(3):
        live.swap(None)
        texts = {"d one 0", "d two 0", "d one 2", "d two 2", f"changed {live._writer.version - 1}"}
        assert {*found(live, "d one 1", 9)} == texts


def test_changes_of_a_batch_are_found_together_at_its_end(live: Live):
    with live.batch():
        live.add(documents(2), LINES)
        live.remove(["d0"])
        assert found(live, "d one 1", 9) == []
    assert {*found(live, "d one 1", 9)} == {"d one 1", "d two 1"}
    with pytest.raises(ZeroDivisionError), live.batch():
        live.remove(["d1"])
        raise ZeroDivisionError
    live.add([Document("e", "after")], LINES)
    assert {*found(live, "d one 1", 9)} == {"d one 1", "d two 1", "after"}


# ----- threads -----------------------------------------------------------------------------------


def scaled(times: int) -> Embedder:
    """An encoder that gives itself away in every score."""
    return Embedder(str(times), DIMENSION, lambda texts, side: times * vectors(texts))


def crossing(live: Live, searches: int, swaps: int) -> list[str]:
    """Answers that mix two generations, of so many, while each swap brings another encoder."""
    live.add(documents(30), LINES)
    live.refresh(scaled(1))
    wrong: list[str] = []
    finished = threading.Event()

    def ask(count: int) -> None:
        done = 0
        while done < count or not finished.is_set():
            done += 1
            answer = live.search([f"d one {done % 30}"], 4)
            view = answer.view
            times = int(view.embedder.fingerprint)
            texts = [chunk.passage for chunk in answer.chunks()]
            scores = times**2 * (vectors(texts) @ vectors([f"d one {done % 30}"])[0])
            one = view.generation and view.generation.encoder_fingerprint == str(times)
            if not one or scores.tolist() != answer.scores_BK[0].tolist():
                wrong.append(f"{times}: {scores} {answer.scores_BK[0]}")

    threads = [threading.Thread(target=ask, args=(searches // 2,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(swaps):
        live.put([Document(f"d{n % 30}", f"changed {n}")], LINES)
        live.refresh(scaled(n + 2))
    finished.set()
    for thread in threads:
        thread.join()
    return wrong


def test_every_answer_is_of_one_generation_whatever_is_swapped(live: Live):
    live.generations = None
    assert crossing(live, searches=1000, swaps=100) == []


@pytest.mark.slow
def test_a_hundred_thousand_answers_across_a_thousand_swaps_are_each_of_one(live: Live):
    live.generations = None
    assert crossing(live, searches=100_000, swaps=1000) == []


def test_a_swap_in_two_steps_is_found(live: Live, monkeypatch: pytest.MonkeyPatch):
    live.generations = None
    install = Live._install

    def hasty(self: Live, generation: Any, embedder: Embedder) -> None:
        self._view = replace(self._view, embedder=embedder)
        time.sleep(0.002)  # or no search falls into it, now and then
        install(self, generation, embedder)

    monkeypatch.setattr(Live, "_install", hasty)
    assert crossing(live, searches=1000, swaps=100)

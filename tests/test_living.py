"""Living knowledge: what was added is found at once, what was removed never again."""

import importlib.util
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hashed import DIMENSION, embedder, vectors
from lines import Lines
from rag2 import artifact
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.kb.store import KnowledgeBase
from rag2.live import folder
from rag2.live.live import Live
from rag2.live.view import Embedder, Part
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


def documents(count: int, prefix: str = "d") -> list[Document]:
    """Each with two lines that no other has."""
    return [Document(f"{prefix}{n}", f"{prefix} one {n}\n{prefix} two {n}") for n in range(count)]


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


# ----- namespaces --------------------------------------------------------------------------------


def crowded(texts: Any, side: str = "chunk") -> np.ndarray:
    """Texts `what/who`: near-duplicates if they say the same thing, whoever says it."""
    rows = []
    for text in texts:
        what, _, who = text.partition("/")
        base, own = (np.random.default_rng([*part.encode()]) for part in (what, what + who))
        rows.append(base.normal(size=16) + 1e-3 * own.normal(size=16))
    return np.array(rows, dtype=np.float32).reshape(len(rows), 16)


def test_a_namespace_sees_nothing_of_the_others_not_even_in_its_scores(tmp_path, dice, rng):
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    spaces = ["", *(f"tenant {n}" for n in range(7))]
    sizes = dict(zip(spaces, [150, 3, 10, 30, 30, 60, 90, 0], strict=True))
    with Live(tmp_path / "kb.sqlite", Embedder("c", 16, crowded), FLAT) as live:

        def said(space: str, first: int, last: int) -> list[Document]:
            return [Document(f"{n}", f"thing {n}/{space}") for n in range(first, last)]

        for space in spaces:
            live.add(said(space, 0, sizes[space]), LINES, space)
        live.refresh()
        for space in spaces:  # a delta, and dead rows
            live.add(said(space, 200, 200 + sizes[space] // 5), LINES, space)
            live.remove([f"{n}" for n in range(0, sizes[space], 9)], space)
        queries_BD = crowded([f"thing {dice.randrange(240)}/me" for _ in range(1250)])
        before = {space: live.nearest(queries_BD, 5, [space]) for space in spaces}
        pairs = 0
        for space, answer in before.items():
            mine = {c.id for n in range(240) for c in live._reader.chunks_of(f"{n}", space)}
            want = min(5, len(mine))
            assert answer.ids_BK.shape == (1250, want) and {*answer.ids_BK.ravel()} <= mine
            for row in rng.integers(1250, size=5 if want else 0):
                assert all(chunk.text.endswith(f"/{space}") for chunk in answer.chunks(row))
            pairs += len(answer.ids_BK)
        assert pairs == 10_000
        for space in ("", "tenant 5"):
            brute_BK = brute(live, queries_BD, space)
            assert (before[space].ids_BK == brute_BK).all()

        kept = spaces[:4]
        for space in spaces[4:]:
            live.remove([d.id for d in live._reader.documents(space)][::2], space)
            live.put([Document(f"{n}", f"thing {n}/again") for n in range(100)], LINES, space)
        for _ in range(2):
            for space in kept:
                again = live.nearest(queries_BD, 5, [space])
                assert again.ids_BK.tobytes() == before[space].ids_BK.tobytes()
                assert again.scores_BK.tobytes() == before[space].scores_BK.tobytes()
            live.refresh()


def brute(live: Live, queries_BD: np.ndarray, space: str) -> np.ndarray:
    """Chunk ids of the five best of a namespace, by looking at everything in it."""
    chunks = [c for d in live._reader.documents(space) for c in live._reader.chunks_of(d.id, space)]
    ids_N = np.array([chunk.id for chunk in chunks])
    wide = crowded([chunk.text for chunk in chunks]).astype(np.float64)
    scores_BN = (queries_BD.astype(np.float64) @ wide.T).astype(np.float32)
    order_BK = np.lexsort((np.broadcast_to(ids_N, scores_BN.shape), -scores_BN), axis=1)[:, :5]
    return ids_N[order_BK]


# ----- erasure -----------------------------------------------------------------------------------


def canary(n: int) -> str:
    """A text of one document alone."""
    return f"canary {n} sings Xq{n}Zv"


def traces(where: Path, count: int) -> list[str]:
    """Every file that holds a canary, as text or as its embedding."""
    patterns = [canary(n).encode(code) for n in range(count) for code in ("utf-8", "utf-16-le")]
    patterns += [f"xq{n}zv".encode() for n in range(count)]  # as the full-text index has it
    patterns += [f"bird-{n}.txt".encode() for n in range(count)]
    passages = [f"Bird Xq{n}Zv\n{canary(n)}" for n in range(count)]
    patterns += [row.tobytes() for row in crowded(passages)]
    files = [path for path in where.rglob("*") if path.is_file()]
    return [path.name for path in files if any(p in path.read_bytes() for p in patterns)]


def test_a_hundred_removed_documents_leave_no_byte_after_compaction(tmp_path: Path):
    where = tmp_path / "kb"
    where.mkdir()
    KnowledgeBase(where / "kb.sqlite", create=True).close()
    birds = [Document(f"bird-{n}.txt", canary(n), f"Bird Xq{n}Zv") for n in range(100)]
    who = Embedder("c", 16, crowded)
    with Live(where / "kb.sqlite", who, FLAT, where / "generations") as live:
        live.add(documents(50), LINES)
        live.add(birds[:60], LINES)
        live.add(birds[60:90], LINES, "aviary")
        live.refresh()
        live.add(birds[90:], LINES)
        launched = live.snapshot().build(FLAT)
        live.remove([bird.id for bird in birds[:60] + birds[91:]])
        live.remove([bird.id for bird in birds[60:90]], "aviary")
        live.put([Document(birds[90].id, "nothing")], LINES)
        live.remove([birds[90].id])
        shutil.copytree(where / "generations" / "000000", where / "generations" / "000007")
        assert {"kb.sqlite-wal", "index.faiss", "chunks.arrow"} <= {*traces(where, 100)}
        before = live.search(["d one 7"], 100)
        assert live.compact() == 101
        assert traces(where, 100) == []
        live.swap(launched)  # begun before the compaction
        assert traces(where, 100) == []
        after = live.search(["d one 7"], 100)
        assert after.ids_BK.tobytes() == before.ids_BK.tobytes() and len(after.ids_BK[0]) == 100
        assert [chunk.text for chunk in after.chunks()] == [c.text for c in before.chunks()]
        live.remove([f"d{n}" for n in range(50)])
        live.compact()
        assert live.search(["d one 7"], 9).ids_BK.shape == (1, 0)
        assert [path for path in (where / "generations").iterdir()] == []
    assert traces(where, 100) == []


def test_full_text_search_is_as_it_was_after_a_compaction(tmp_path: Path, dice):
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        for space in ("", "a", "b"):
            kb.add(documents(20), LINES, space)
        kb.remove([f"d{n}" for n in range(20)], "b")
        kb.remove(["d3", "d4"])
        found = {q: kb.search_text(q, 99) for q in ("one", "7", "d two", "3")}
        content, version, chunks = kb.content_hash(), kb.version, kb.chunks()
        assert kb.compact() == 44
        assert {q: kb.search_text(q, 99) for q in found} == found
        assert (kb.content_hash(), kb.version, kb.chunks()) == (content, version, chunks)
        assert kb.chunks(version) == chunks and kb.since(version) is not None
        assert kb.since(version - 1) is None and kb.namespaces() == ["", "a"]
        with pytest.raises(UserError, match=f"version {version - 1} was compacted away"):
            kb.chunks(version - 1)
        kb.add(documents(1), LINES, "b")
        assert kb.version == version + 1 and kb.search_text("one", 9, ["b"])
        assert kb.compact() == 0
        assert kb.chunks()[-1].id == 122  # ids go on


def test_a_compaction_beside_a_reader_of_an_old_state_says_so(tmp_path: Path):
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add(documents(5), LINES)
        kb.remove(["d1"])
        kb._db.execute("PRAGMA busy_timeout = 10")
        with KnowledgeBase(tmp_path / "kb.sqlite") as other:
            with other.reading():
                assert other.version == 2
                with pytest.raises(UserError, match="compact it again"):
                    kb.compact()
            assert kb.compact() == 0
        assert (tmp_path / "kb.sqlite-wal").stat().st_size == 0
        assert b"d one 1" not in (tmp_path / "kb.sqlite").read_bytes()


def test_purge_drops_the_generations_that_hold_what_is_gone(live: Live):
    where = live.generations
    assert where
    live.add(documents(4), LINES)
    whole = live.snapshot().build(FLAT)
    live.remove(["d1"])
    clean = live.snapshot().build(FLAT)
    assert whole and clean
    clean.save(where / "000001")
    whole.save(where / "000002", pointer=where / "current")
    clean.save(where / "000003")
    (where / "000003" / "chunks.arrow").write_bytes(b"nobody can tell")
    assert {path.name for path in folder.purge(where, live._reader.alive())} == {"000002", "000003"}
    assert [path.name for path in where.iterdir()] == ["000001"]  # the pointer named one of them
    loaded = folder.newest(where, "hashed")
    assert isinstance(loaded, Generation) and artifact.is_complete(where / "000001")


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
        install(self, generation, embedder)

    monkeypatch.setattr(Live, "_install", hasty)
    assert crossing(live, searches=1000, swaps=100)


def test_the_parts_agree_whichever_way_they_are_searched(rng: np.random.Generator):
    vectors_ND = rng.normal(size=(300, 16)).astype(np.float32)
    vectors_ND[100:200] = vectors_ND[:100]  # ties, which ids settle
    queries_BD = vectors_ND[rng.integers(300, size=20)]
    ids_N = np.sort(rng.choice(10_000, size=300, replace=False))
    index = FLAT.build(vectors_ND, ids_N)
    for share in (0.01, 0.1, 0.24, 0.3, 0.7, 0.99):
        names = {int(id): "a" if rng.random() < share else "b" for id in ids_N}
        part = Part.of(index, names).without(ids_N[rng.random(300) < 0.1].tolist())
        may_N = part.alive_N & np.array([names[int(id)] == "a" for id in ids_N])
        if not may_N.any():
            continue
        alone = FLAT.build(vectors_ND[may_N], ids_N[may_N])
        for k in (1, 7, 290):
            wanted = alone.search(queries_BD, min(k, len(alone)))
            got = part.search(queries_BD, k, ["a"])
            for one, other in zip(got, wanted, strict=True):
                assert one.tobytes() == other.tobytes()

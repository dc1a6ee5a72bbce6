"""Namespaces: nobody sees anything of the others, not even in a score."""

import numpy as np

from hashed import crowded
from lines import Lines
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.part import Part
from rag2.live.view import Embedder
from rag2.types import Document

FLAT = Flat(device="cpu")
LINES = Lines()


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


def test_a_view_knows_the_namespace_of_every_live_chunk(tmp_path, dice):
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    spaces = ["", "a tenant", "another"]
    with Live(tmp_path / "kb.sqlite", Embedder("c", 16, crowded), FLAT) as live:
        for turn in range(12):
            space = dice.choice(spaces)
            ids = [f"{dice.randrange(20)}" for _ in range(9)]
            live.put([Document(id, f"{id} in {turn}") for id in dict.fromkeys(ids)], LINES, space)
            live.remove(set(dice.sample(ids, 2)), space)
            dice.choice([live.refresh, live.compact, live.view])()
            view = live.view()
            for id, name in live._reader.alive().items():
                assert view.namespace(id) == name
                assert view.chunk(id).id == id


def brute(live: Live, queries_BD: np.ndarray, space: str) -> np.ndarray:
    """Chunk ids of the five best of a namespace, by looking at everything in it."""
    chunks = [c for d in live._reader.documents(space) for c in live._reader.chunks_of(d.id, space)]
    ids_N = np.array([chunk.id for chunk in chunks])
    wide = crowded([chunk.text for chunk in chunks]).astype(np.float64)
    scores_BN = (queries_BD.astype(np.float64) @ wide.T).astype(np.float32)
    order_BK = np.lexsort((np.broadcast_to(ids_N, scores_BN.shape), -scores_BN), axis=1)[:, :5]
    return ids_N[order_BK]


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

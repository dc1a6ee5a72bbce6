"""What a partial refresh encodes: the found first, everything in its turn, the rest as it was."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rag2.index.flat import Flat
from rag2.reindex import build
from rag2.reindex.demand import ROUND, Demand
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AsyncRefresh, SyncRefresh
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from refreshes import Inline, moved, same

pytestmark = pytest.mark.usefixtures("seed")


def demand(share: float, count: int) -> Demand:
    return Demand(share, np.arange(100, 100 + 7 * count, 7), None)


def test_the_most_found_come_first_and_their_counts_begin_again():
    made = demand(0.4, 20)  # 8 chunks a turn, 2 of them round the corpus
    rows = [19] * 5 + [11] * 4 + [3] * 3 + [17] * 2 + [5, 7, 9]
    made.count(made.ids_N[np.array([rows])])
    assert made.choose().tolist() == [0, 1, 3, 5, 7, 11, 17, 19]
    assert made.choose().tolist() == [2, 3, 4, 5, 6, 7, 8, 9]  # 9 found once, then the round
    assert made.choose().tolist() == [9, 10, 11, 12, 13, 14, 15, 16]
    assert not made.found_N.any()


@given(
    count=st.integers(1, 60),
    share=st.floats(0.01, 1.0),
    finds=st.lists(st.lists(st.integers(0, 10**6), max_size=40), min_size=1, max_size=6),
)
def test_no_embedding_grows_older_than_its_turn_and_every_part_has_its_size(
    count: int, share: float, finds: list[list[int]]
):
    made = demand(share, count)
    size = max(1, round(share * count))
    rounds = math.ceil(count / math.ceil(size / ROUND))
    age_N = np.zeros(count, dtype=int)
    for turn in range(2 * rounds):
        found = [place % count for place in finds[turn % len(finds)]]
        made.count(made.ids_N[np.array([found], dtype=int)])
        rows = made.choose()
        assert len(rows) == size and (np.diff(rows) > 0).all()
        age_N += 1
        age_N[rows] = 0
        assert age_N.max() < rounds


def test_what_a_checkpoint_holds_is_enough_to_go_on():
    rng = np.random.default_rng()
    whole = demand(0.2, 50)
    for _ in range(3):
        whole.count(whole.ids_N[rng.integers(50, size=(4, 3))])
        whole.choose()
    whole.count(whole.ids_N[rng.integers(50, size=(9, 3))])
    again = Demand(0.2, whole.ids_N, json.loads(json.dumps(whole.state())))
    for _ in range(9):
        np.testing.assert_array_equal(again.choose(), whole.choose())


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="share"):
        SyncRefresh(share=share)


# --- a part of the corpus -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sync", "async"])
def test_a_partial_refresh_encodes_what_was_found_first_and_keeps_the_other_embeddings(
    store: Store, chunks: list[Chunk], encoder: DualEncoder, inline: type[Inline], name: str
):
    policies = {
        "sync": SyncRefresh(every=4, share=0.5),
        "async": AsyncRefresh(every=4, lag=1, share=0.5),
    }
    live = LiveIndex(store, policies[name])
    old, rows = live.generation, np.arange(len(chunks))
    before = old.index.vectors(rows).copy()
    moved(encoder)
    queries_BD = old.index.vectors(np.array([3, 7]))
    ids = live.search(queries_BD, 2)
    size = round(0.5 * len(chunks))
    live.refresh(3)
    whole = build.generation(encoder, store.chunks, Flat(device="cpu"), 4, 1, "h")
    assert live.poll(4 if name == "async" else 3) and live.generation is not old
    after, new = live.generation.index.vectors(rows), whole.index.vectors(rows)
    changed = (after != before).any(axis=1)
    assert changed.sum() == size == live.generation.encoded and len(old) == old.encoded
    assert changed[np.searchsorted(live.generation.ids_N, ids.flatten())].all()
    np.testing.assert_allclose(after[changed], new[changed], atol=1e-5)  # other batches
    assert live.generation.encoder_fingerprint == encoder.fingerprint()


def test_a_worker_and_training_itself_make_the_same_partial_generation(
    store: Store, encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    live = LiveIndex(store, AsyncRefresh(every=4, lag=1, share=0.3))
    live.search(live.generation.index.vectors(np.array([5])), 4)
    moved(encoder)
    live.refresh(3)
    rows = load_file(tmp_path / "snapshots" / "000001" / "rows.safetensors")["rows"]
    part = build.Part(live.generation, rows)
    told: list[tuple[int, int]] = []
    expected = build.generation(
        *(encoder, store.chunks, Flat(device="cpu"), 4, 1, "h"),
        progress=lambda done, total: told.append((done, total)),
        part=part,
    )
    assert told[-1] == (len(rows), len(rows))
    assert live.poll(4) and same(live.generation, expected)


def test_a_part_of_a_corpus_that_takes_several_blocks_is_the_same_rows(
    store: Store, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
):
    old = store.build(0, 0)
    moved(encoder)
    rows = np.array([0, 4, 5, 17])  # some blocks of five have none of them
    monkeypatch.setattr("rag2.reindex.build.WINDOW", 5)
    told: list[tuple[int, int]] = []
    made = build.generation(
        *(encoder, store.chunks, Flat(device="cpu"), 4, 1, "h"),
        progress=lambda done, total: told.append((done, total)),
        part=build.Part(old, rows),
    )
    every = np.arange(len(old))
    changed = (made.index.vectors(every) != old.index.vectors(every)).any(axis=1)
    assert np.flatnonzero(changed).tolist() == rows.tolist()
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1] == (4, 4)


def test_finds_are_counted_on_in_a_run_that_goes_on(
    store: Store, encoder: DualEncoder, inline: type[Inline]
):
    policy = SyncRefresh(every=6, share=0.3)

    def go(live: LiveIndex, steps: range) -> None:
        for step in steps:
            live.search(live.generation.index.vectors(np.array([step, 2 * step])), 3)
            live.refresh(step)
            live.poll(step)

    whole = LiveIndex(store, policy)
    go(whole, range(10))
    state = json.loads(json.dumps(whole.state()))
    go(whole, range(10, 12))
    again = LiveIndex(store, policy, state)
    go(again, range(10, 12))
    assert again.state() == whole.state() and same(again.generation, whole.generation)

"""Training that waits for a late worker: it stops when it is asked to, and never in silence."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag2.index.flat import Flat
from rag2.registry import UserError
from rag2.reindex import making as makings
from rag2.reindex import store as stores
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AdaptiveRefresh, AsyncRefresh
from rag2.reindex.process import WorkerFailed
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from refreshes import Inline, moved, rebuilt, same
from small_runs import Load, log, start, weights

pytestmark = pytest.mark.usefixtures("seed")

POLICY = AsyncRefresh(every=3, lag=2)
ENDLESS = 10**9


class Group:
    """Two processes of a training group, here threads: what `largest` is over both."""

    def __init__(self) -> None:
        self.values, self.exchanges = [0, 0], 0
        self.met = threading.Barrier(2, timeout=30)

    def largest(self, rank: int, value: int) -> int:
        self.values[rank] = value
        self.met.wait()
        found = max(self.values)
        self.met.wait()
        self.exchanges += rank == 0
        return found

    def both(self, do: Callable[[int], Any]) -> list[Any]:
        """What each of them returns of what both do at once."""
        found: list[Any] = [None, None]

        def run(rank: int) -> None:
            found[rank] = do(rank)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


def test_one_that_is_asked_to_stop_leaves_the_swap_to_the_run_that_goes_on(
    store: Store, chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    inline.slow = ENDLESS
    looks = iter([False] * 40 + [True])
    live = LiveIndex(store, POLICY, stopping=lambda: next(looks))
    moved(encoder)
    live.refresh(2)
    assert not live.poll(3) and not live.poll(4)
    assert next(looks, None) is None and live.number == 0 and live.stalled() > 0
    state = json.loads(json.dumps(live.state()))
    inline.slow = 0
    again = LiveIndex(store, POLICY, state)
    assert again.poll(4) and again.fresh(5) and again.number == 1
    assert same(again.generation, rebuilt(tmp_path / "snapshots" / "000001", chunks, 3))


def test_a_group_waits_in_words_and_swaps_together(
    chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    inline.slow = 7
    group, members = Group(), pair(chunks, encoder, tmp_path)
    lives = [
        LiveIndex(store, POLICY, largest=lambda value, rank=rank: group.largest(rank, value))
        for rank, store in enumerate(members)
    ]
    moved(encoder)
    for live in lives:
        live.refresh(2)
    assert group.both(lambda rank: lives[rank].poll(4)) == [True, True] and group.exchanges > 5
    assert same(lives[0].generation, lives[1].generation) and lives[1].number == 1


@pytest.mark.parametrize("overlaps", [(0.8, 0.9), (0.9, 0.8)])
def test_a_group_refreshes_together_though_one_of_them_measured_more_overlap(
    chunks: list[Chunk],
    encoder: DualEncoder,
    tmp_path: Path,
    inline: type[Inline],
    overlaps: tuple[float, float],
):
    group, members = Group(), pair(chunks, encoder, tmp_path)
    policy = AdaptiveRefresh(min_overlap=0.85, lag=2)
    lives = [
        LiveIndex(store, policy, largest=lambda value, rank=rank: group.largest(rank, value))
        for rank, store in enumerate(members)
    ]
    moved(encoder)
    group.both(lambda rank: lives[rank].refresh(2, overlaps[rank]))
    assert lives[0].state() == lives[1].state() and lives[0].state()["pending"]["number"] == 1
    assert len(inline.launched) == 1


def test_a_worker_that_was_told_to_stop_with_the_run_costs_it_nothing(
    store: Store, encoder: DualEncoder, inline: type[Inline], monkeypatch: pytest.MonkeyPatch
):
    def dead(self: Inline, seconds: float = 0.0) -> bool:
        raise WorkerFailed("killed by signal 15")

    inline.slow = ENDLESS
    policy = AsyncRefresh(every=3, lag=2, retries=0)
    live = LiveIndex(store, policy, stopping=lambda: stopping)
    live.refresh(2)
    state = live.state()
    monkeypatch.setattr(Inline, "wait", dead)
    monkeypatch.setattr(Inline, "finished", dead)
    stopping = True
    assert not (live.poll(3) or live.poll(4)) and live.state() == state
    stopping = False
    with pytest.raises(UserError, match="killed by signal 15; it was started 1 times"):
        live.poll(4)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_group_stops_waiting_whichever_of_them_was_asked(
    chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path, inline: type[Inline], asked: int
):
    inline.slow = ENDLESS
    group, members = Group(), pair(chunks, encoder, tmp_path)
    lives = [
        LiveIndex(
            *(store, POLICY),
            stopping=lambda rank=rank: rank == asked and group.exchanges > 3,
            largest=lambda value, rank=rank: group.largest(rank, value),
        )
        for rank, store in enumerate(members)
    ]
    moved(encoder)
    for live in lives:
        live.refresh(2)
    assert group.both(lambda rank: lives[rank].poll(4)) == [False, False]
    assert lives[0].state() == lives[1].state() and lives[0].number == 0


def pair(chunks: list[Chunk], encoder: DualEncoder, out: Path) -> list[Store]:
    """The stores of two processes, of which the first keeps."""
    return [Store(out, chunks, encoder, Flat(device="cpu"), 1, "h", keep) for keep in (True, False)]


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
def test_a_run_that_is_terminated_while_it_waits_ends_at_once_and_goes_on_as_if_it_had_not(
    recipe: Load,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    again: bool,
):
    monkeypatch.setattr(stores, "Worker", Inline)
    refresh = {"name": "async", "every": 4, "lag": 3}
    start(recipe, "joint", home, tmp_path / "whole", refresh=refresh)

    def endless(self: Inline, seconds: float) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    for _ in range(1 + again):  # the second time before its first step
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(Inline, "slow", ENDLESS)
            patch.setattr(Inline, "wait", endless)
            patch.setattr(makings, "LOOK", 0.0)
            # A worker that was done would be taken for one in the run that goes on.
            patch.setattr(Store, "complete", lambda self, number: False)
            patch.setattr(makings.Making, "load", lambda self: pytest.fail("it did not wait"))
            start(recipe, "joint", home, tmp_path / "a", refresh=refresh, resume=True)
        assert ended.value.code == 0 and "stopped after 7 steps" in capsys.readouterr().err
    assert log(tmp_path / "a")[-1]["generation"] == 0
    start(recipe, "joint", home, tmp_path / "a", refresh=refresh, resume=True)
    assert log(tmp_path / "a") == log(tmp_path / "whole")
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")

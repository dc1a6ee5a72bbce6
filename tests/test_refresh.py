"""The index made in the background, as training sees it: swaps, failures, what goes on later."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rag2 import artifact
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.reindex import build
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AdaptiveRefresh, AsyncRefresh, EagerRefresh
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from refreshes import Inline, moved, rebuilt, same
from small_runs import Killed, Load, killed_at, log, start, weights

pytestmark = pytest.mark.usefixtures("seed")


def swaps(live: LiveIndex, encoder: DualEncoder, steps: range) -> list[tuple[int, int]]:
    """(step, generation) of each swap while the weights move."""
    found = []
    for step in steps:
        moved(encoder)
        live.refresh(step)
        if live.poll(step):
            found.append((step, live.number))
    return found


@pytest.mark.parametrize("slow", [0, 2, 100])
def test_an_async_swap_is_a_matter_of_steps_and_never_of_the_clock(
    store: Store, encoder: DualEncoder, inline: type[Inline], slow: int
):
    inline.slow = slow
    live = LiveIndex(store, AsyncRefresh(every=5, lag=4))
    assert swaps(live, encoder, range(20)) == [(8, 1), (13, 2), (18, 3)]
    assert live.generation.step == 15 and live.state() == {
        "generation": 3,
        "swapped": 18,
        "pending": {"number": 4, "step": 20, "fingerprint": encoder.fingerprint()},
    }


def flip(directory: Path, number: int) -> None:
    """One bit of the first try's vectors."""
    if number == 1:
        path = directory / "index.faiss"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def lose(directory: Path, number: int) -> None:
    if number == 1:
        (directory / artifact.MANIFEST).unlink()


def exchange(directory: Path, number: int) -> None:
    """A whole and valid generation, but of the encoder of another snapshot."""
    if number == 1:
        shutil.rmtree(directory)
        shutil.copytree(directory.with_name("000000"), directory)


def shorten(directory: Path, number: int) -> None:
    """A whole and valid generation of the right encoder that lacks a chunk."""
    if number == 1:
        made = Generation.load(directory)
        encoder = DualEncoder.load(directory.parents[1] / "snapshots" / "000001" / "encoder")
        shutil.rmtree(directory)
        chunks = made.chunks.slice(1)
        build.generation(encoder, chunks, Flat(device="cpu"), made.step, 1, "h").save(directory)


@pytest.mark.parametrize("spoil", [flip, lose, exchange, shorten])
def test_a_damaged_or_a_wrong_generation_is_made_again_and_never_swapped_in(
    store: Store,
    chunks: list[Chunk],
    encoder: DualEncoder,
    tmp_path: Path,
    inline: type[Inline],
    spoil: Callable[[Path, int], None],
    caplog: pytest.LogCaptureFixture,
):
    inline.spoil = staticmethod(spoil)
    moved(encoder)
    live = LiveIndex(store, AsyncRefresh(every=3, lag=2))
    moved(encoder)
    live.refresh(2)
    expected = rebuilt(tmp_path / "snapshots" / "000001", chunks, 3)
    assert not live.poll(3) and live.number == 0
    assert live.poll(4) and same(live.generation, expected)
    assert len(inline.launched) == 2 and "it is started again" in caplog.text
    assert (tmp_path / "generations" / "current").read_text() == "000001\n"


def test_failures_count_for_one_generation_and_the_age_begins_anew_with_the_next(
    store: Store, encoder: DualEncoder, inline: type[Inline]
):
    inline.spoil = staticmethod(lambda directory, number: flip(directory, number % 2))
    live = LiveIndex(store, AsyncRefresh(every=2, lag=1, retries=1))
    time.sleep(0.2)
    before = live.age(0)[1]
    assert swaps(live, encoder, range(7)) == [(2, 1), (4, 2), (6, 3)]
    assert len(inline.launched) == 6 and live.age(6)[1] < before


def test_a_worker_that_fails_too_often_stops_training_in_one_line_and_keeps_the_index(
    store: Store, encoder: DualEncoder, inline: type[Inline]
):
    inline.spoil = staticmethod(lambda directory, number: flip(directory, 1))
    live = LiveIndex(store, AsyncRefresh(every=2, lag=1, retries=2))
    before = live.generation
    live.refresh(1)
    with pytest.raises(UserError, match=r"generation 1: .*bytes of file.*it was started 3 times"):
        live.poll(2)
    assert live.generation is before and len(inline.launched) == 3


def test_a_refresh_under_way_is_taken_up_from_its_snapshot(
    store: Store, chunks: list[Chunk], encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    policy = AsyncRefresh(every=4, lag=3)
    live = LiveIndex(store, policy)
    swaps(live, encoder, range(5))
    state = json.loads(json.dumps(live.state()))
    assert state["generation"] == 0 and state["pending"]["step"] == 4
    rest = swaps(live, encoder, range(5, 9))  # what the killed run did after its checkpoint
    assert rest == [(6, 1)] and live.state()["pending"]["number"] == 2
    expected = rebuilt(tmp_path / "snapshots" / "000001", chunks, 4)
    for complete in (True, False):
        if not complete:
            lose(tmp_path / "generations" / "000001", 1)
        inline.launched.clear()
        again = LiveIndex(store, policy, state)
        assert len(inline.launched) == (0 if complete else 1)
        again.prune([])
        kept = sorted(path.name for path in (tmp_path / "generations").glob("0*"))
        assert kept == ["000000", "000001"]  # nothing of what came after the checkpoint
        assert (tmp_path / "generations" / "current").read_text() == "000000\n"
        assert swaps(again, encoder, range(5, 7)) == [(6, 1)]
        assert same(again.generation, expected)


def test_what_a_checkpoint_names_is_kept_and_the_rest_is_not(
    store: Store, encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    live = LiveIndex(store, AsyncRefresh(every=4, lag=3))
    swaps(live, encoder, range(4))
    early = live.state()  # generation 0, and 1 in the making
    swaps(live, encoder, range(4, 12))
    assert live.state()["generation"] == 2 and live.state()["pending"]["number"] == 3
    live.prune([early])

    def there(folder: str) -> set[str]:
        return {path.name[:6] for path in (tmp_path / folder).glob("0*")}

    assert there("generations") == {"000000", "000001", "000002", "000003"}
    assert there("snapshots") == {"000001", "000003"}
    live.prune([live.state()])
    assert there("generations") == {"000002", "000003"} and there("snapshots") == {"000003"}


def test_eager_swaps_when_the_worker_is_done_and_a_replay_swaps_where_it_did(
    store: Store, encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    inline.slow = 3
    policy = EagerRefresh(every=6)
    live = LiveIndex(store, policy)
    swaps(live, encoder, range(6))
    state = live.state()
    assert state["pending"]["number"] == 1
    first = swaps(live, encoder, range(6, 17))
    assert first == [(8, 1), (14, 2)]
    journal = tmp_path / "swaps.jsonl"
    with journal.open("a") as file:
        file.write('{"generat')  # a kill in the middle of a line
    inline.slow = 0  # another day, another machine
    again = LiveIndex(store, policy, state)
    assert swaps(again, encoder, range(6, 17)) == first
    told = [json.loads(line) for line in journal.read_text().splitlines()]
    assert told[:2] == [{"generation": 1, "step": 8}, {"generation": 2, "step": 14}]
    assert swaps(again, encoder, range(17, 24)) == [(17, 3), (23, 4)]  # from here the clock decides


def test_one_refresh_is_under_way_at_a_time():
    with pytest.raises(ValueError, match=r"lag=5 must be below every=5"):
        AsyncRefresh(every=5, lag=5)


def test_an_adaptive_refresh_begins_when_the_overlap_is_too_small_and_only_then(
    store: Store, encoder: DualEncoder, inline: type[Inline]
):
    live = LiveIndex(store, AdaptiveRefresh(min_overlap=0.8, lag=2))
    told = {3: 0.95, 5: 0.8, 7: 0.79, 8: 0.1, 12: 0.5}
    found = []
    for step in range(16):
        moved(encoder)
        live.refresh(step, told.get(step))
        if live.poll(step):
            found.append((step, live.generation.step))
    assert found == [(9, 8), (14, 13)]  # that of step 8 came while one was under way


# --- whole runs -----------------------------------------------------------------------------------


def test_a_run_that_was_killed_with_a_refresh_under_way_goes_on_to_the_same_weights(
    recipe: Load, home: Path, tmp_path: Path
):
    refresh = {"name": "async", "every": 4, "lag": 3}
    start(recipe, "joint", home, tmp_path / "whole", refresh=refresh)
    out = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, step=5)
        start(recipe, "joint", home, out, refresh=refresh)
    state = json.loads((out / "checkpoints" / "step-000004" / "state.json").read_text())["extra"]
    assert state["pending"]["number"] == 1
    start(recipe, "joint", home, out, refresh=refresh, resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert log(out) == log(tmp_path / "whole")
    assert [row["generation"] for row in log(out)] == [0] * 7 + [1] * 2
    assert [row["index_age_steps"] for row in log(out)] == [*range(7), 3, 4]

"""Refreshing on paper: bytes of indexes, formulas of ages and devices, simulated runs."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag2.index.base import Backend
from rag2.index.cost import ITERATIONS, SAMPLE, cells_of, footprint, work
from rag2.index.flat import Flat, import_faiss
from rag2.index.hnsw import HNSW
from rag2.index.ivf import IVF
from rag2.index.remote import Remote
from rag2.index.shards import Shards
from rag2.registry import TABLES, UserError, lookup
from rag2.reindex import budget
from rag2.reindex.budget import Refresh
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AsyncRefresh, EagerRefresh, SyncRefresh
from rag2.reindex.simulate import simulate, step_times

# --- bytes and work -------------------------------------------------------------------------------


HERE = [name for name in TABLES["index"] if not issubclass(lookup("index", name), Remote)]


@pytest.mark.parametrize("name", HERE)
def test_the_bytes_on_paper_are_those_that_an_index_writes(
    tmp_path: Path, rng: np.random.Generator, name: str
):
    backend, count = lookup("index", name)(), 3000
    vectors_ND = rng.standard_normal((count, 24), dtype=np.float32)
    backend.build(vectors_ND, np.arange(count)).save(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    expected = footprint(backend, count, 24)
    headers = 1500
    chance = 0.005 * expected.total if name == "hnsw" else 0  # how high its nodes reach
    assert abs(written - expected.total) < headers + chance
    assert expected.vectors == 4 * count * 24 and expected.ids == 8 * count


def test_an_index_in_shards_is_as_large_as_its_shards_together():
    sharded = footprint(Shards(count=4, inner=IVF()), 4000, 24)
    assert sharded == footprint(IVF(nlist=4 * 32), 4000, 24)  # 32: the root of 1,000
    assert work(Shards(count=4, inner=HNSW()), 4000) == 4 * work(HNSW(), 1000)


def test_an_ivf_index_looks_at_as_many_vectors_as_faiss_says():
    faiss = import_faiss()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(8), 8, 4, faiss.METRIC_INNER_PRODUCT)
    assert (index.cp.niter, index.cp.max_points_per_centroid) == (ITERATIONS, SAMPLE)
    assert cells_of(IVF(), 10_000) == 100 and cells_of(IVF(nlist=7), 5) == 5


@pytest.mark.parametrize(
    ("backend", "growth"),
    # 10,000 chunks have 100 cells and k-means sees them all; of 1 M it sees 256 in each of 1,000.
    [(Flat(), 100), (HNSW(), 150), (IVF(), 100 * 10 * (10 * 0.256 + 1) / (10 + 1))],
)
def test_a_hundred_times_the_chunks_are_so_many_times_the_work(backend: Backend, growth: float):
    assert work(backend, 1_000_000) / work(backend, 10_000) == pytest.approx(growth)


def test_the_line_through_measurements_is_found_and_has_no_negative_part(rng: np.random.Generator):
    fixed, each = rng.uniform(0.1, 10), rng.uniform(1e-9, 1e-3)
    units = [1e4, 3e4, 1e7]
    line = budget.fit(units, [fixed + each * u for u in units])
    assert (line.fixed, line.each) == pytest.approx((fixed, each))
    steep = budget.fit([1, 2, 4], [1, 4, 16])  # a straight line would begin below nothing
    assert steep.fixed == 0 and steep.each > 0


# --- ages and devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("age", [2, 3, 4, 5, 100, 101])
def test_the_schedule_for_an_age_gives_the_worker_the_longest_lag_that_keeps_it(age: int):
    every, lag = budget.schedule(age)
    assert AsyncRefresh(every=every, lag=lag) and budget.oldest(every, lag) == age
    with pytest.raises(ValueError, match="must be below"):
        AsyncRefresh(every=age + 1 - (lag + 1), lag=lag + 1)


def test_no_background_refresh_keeps_an_index_younger_than_two_steps():
    with pytest.raises(UserError, match="age=1"):
        budget.schedule(1)


def test_as_many_devices_as_needed_keep_up_and_one_less_does_not(rng: np.random.Generator):
    for _ in range(200):
        encode, read, build, commit, step = rng.uniform(1, [1e5, 40, 30, 30, 3])
        age = int(rng.integers(300, 2000))
        every, lag = budget.schedule(age)
        refresh = Refresh(encode, read, build, commit, swap=0)
        n = budget.devices_for(refresh, age, step)
        assert n and budget.lost_behind(refresh, every, lag, step, n) == 0
        assert n == 1 or budget.lost_behind(refresh, every, lag, step, n - 1) > 0


def test_no_number_of_devices_makes_up_for_a_build_that_takes_too_long():
    slow, fast = (Refresh(1, read=5, build=b, commit=10, swap=0) for b in (35, 34))
    assert budget.devices_for(slow, age=100, step=1.0) is None
    assert budget.devices_for(fast, age=100, step=1.0) == 1


@pytest.mark.parametrize(("worker", "age"), [(0.2, 2), (1.0, 2), (10.0, 20), (10.1, 22)])
def test_the_least_age_is_twice_the_steps_that_a_worker_takes(worker: float, age: int):
    assert budget.least_age(worker, 1.0) == age
    every, lag = budget.schedule(age)
    assert simulate(AsyncRefresh(every=every, lag=lag), [1.0] * 200, worker).stalled == 0


# --- simulated runs -------------------------------------------------------------------------------

EVERY, LAG, STEP = 20, 8, 0.5
ASYNC = AsyncRefresh(every=EVERY, lag=LAG)


@pytest.mark.parametrize("worker", [0.1, 2.0, LAG * STEP])
def test_a_worker_faster_than_the_lag_costs_no_time_and_keeps_the_age_between_its_bounds(
    worker: float,
):
    ran = simulate(ASYNC, [STEP] * (EVERY * 50 + LAG), worker)
    assert ran.stalled == ran.lost == 0
    assert ran.ages[: ran.first] == list(range(EVERY + LAG))
    assert ran.settled == [*range(LAG, budget.oldest(EVERY, LAG) + 1)] * 49


def test_a_late_worker_costs_what_it_is_late_and_makes_nothing_older():
    worker = LAG * STEP + 3.0
    ran = simulate(ASYNC, [STEP] * (EVERY * 50), worker)
    assert ran.lost == pytest.approx(
        3.0 / (EVERY * STEP + 3.0), rel=0.03
    )  # the last is not swapped
    refresh = Refresh(encode=worker, read=0, build=0, commit=0, swap=0)
    assert ran.stalled == pytest.approx(49 * 3.0)
    assert budget.lost_behind(refresh, EVERY, LAG, STEP) == 3.0 / (EVERY * STEP + 3.0)
    assert {*ran.settled} == {*range(LAG, LAG + EVERY)}


def test_training_that_waits_loses_the_share_of_the_formula():
    worker = 7.0
    ran = simulate(SyncRefresh(every=EVERY), [STEP] * (EVERY * 30), worker)
    assert ran.lost == pytest.approx(worker / (EVERY * STEP + worker))
    refresh = Refresh(encode=5.0, read=9.0, build=1.5, commit=0.5, swap=99.0)  # nothing read back
    assert ran.lost == pytest.approx(budget.lost_waiting(refresh, EVERY, STEP))
    assert ran.ages == [*range(EVERY)] * 30 and budget.oldest(EVERY, 0) == EVERY - 1


@pytest.mark.parametrize(("worker", "periods"), [(3.2, 1), (9.5, 1), (9.6, 2), (13.0, 2)])
def test_an_eager_swap_costs_nothing_and_misses_launches_that_come_too_early(
    worker: float, periods: int
):
    ran = simulate(EagerRefresh(every=EVERY), [STEP] * (EVERY * 60), worker)
    late = math.ceil(worker / STEP)
    assert ran.stalled == 0
    assert (min(ran.settled), max(ran.settled)) == (late, late + periods * EVERY - 1)


def test_a_worker_as_fast_as_the_lag_on_average_waits_for_what_chance_makes_of_the_steps():
    spread, cycles = 0.3, 3000
    seconds = step_times(STEP, spread, EVERY * cycles, seed=1)
    assert np.mean(seconds) == pytest.approx(STEP, rel=0.02)
    assert np.std(seconds) == pytest.approx(spread * STEP, rel=0.05)
    ran = simulate(ASYNC, seconds, LAG * STEP)
    # The mean of max(0, normal): standard deviation of the lag's seconds over sqrt(2 pi).
    expected = spread * STEP * math.sqrt(LAG / (2 * math.pi))
    assert ran.stalled / cycles == pytest.approx(expected, rel=0.1)


def test_a_run_that_ends_before_the_first_swap_has_the_ages_of_the_first_index():
    ran = simulate(ASYNC, [STEP] * EVERY, 1.0)
    assert ran.settled == list(range(EVERY)) and ran.first == EVERY


# --- against the code that training runs ----------------------------------------------------------


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class Made:
    step: int
    encoder_fingerprint: str = ""
    ids_N: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return 1


@dataclass
class FakeWorker:
    clock: Clock
    ready: float

    def finished(self) -> bool:
        return self.clock.now >= self.ready

    def wait(self, seconds: float) -> bool:
        self.clock.now = min(self.clock.now + seconds, max(self.clock.now, self.ready))
        return self.finished()

    def kill(self) -> None: ...


@dataclass
class FakeStore:
    """Generations that take `seconds` of the fake clock, made here or by a worker."""

    generations: Path
    clock: Clock
    seconds: float
    keep: bool = True
    chunks: list[int] = field(default_factory=lambda: [0])
    made: dict[int, Made] = field(default_factory=dict)

    def build(self, number: int, step: int, part: None = None) -> Made:
        self.clock.now += self.seconds if number else 0
        return Made(step)

    def snapshot(self, number: int, step: int, rows_M: None = None) -> str:
        self.made[number] = Made(step)
        return ""

    def launch(self, *_: Any) -> FakeWorker:
        return FakeWorker(self.clock, self.clock.now + self.seconds)

    def load(self, number: int, fingerprint: str) -> Made:
        return self.made[number]

    def publish(self, number: int) -> None: ...


@pytest.mark.parametrize("worker", [1.2, 4.0, 6.1, 9.9, 10.0, 21.0])
@pytest.mark.parametrize("policy", [SyncRefresh(every=EVERY), ASYNC, EagerRefresh(every=EVERY)])
def test_a_simulated_run_is_what_the_live_index_does(tmp_path: Path, policy: Any, worker: float):
    clock = Clock()
    store: Any = FakeStore(tmp_path / "generations", clock, worker)
    live, ages, steps = LiveIndex(store, policy), [], 7 * EVERY
    for step in range(steps):
        ages.append(live.age(step)[0])
        clock.now += STEP
        live.refresh(step)
        live.poll(step)
    ran = simulate(policy, [STEP] * steps, worker)
    assert ran.ages == ages
    assert ran.trained + ran.stalled == pytest.approx(clock.now)

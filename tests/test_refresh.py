"""The index made in the background: what a worker does, and what becomes of one that fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rag2 import artifact
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.reindex import build
from rag2.reindex import worker as worker_module
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AdaptiveRefresh, AsyncRefresh, EagerRefresh
from rag2.reindex.process import Worker, WorkerFailed
from rag2.reindex.store import Store
from rag2.reindex.worker import Spec, work
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from refreshes import Inline, moved, rebuilt, same
from small_runs import Killed, Load, killed_at, log, start, weights

pytestmark = pytest.mark.usefixtures("seed")


# --- the worker as a process ----------------------------------------------------------------------


def worker(tmp_path: Path, script: str, patience: float = 60.0) -> Worker:
    told = (
        "import json, os, sys, time\n"
        "say = lambda n: print(json.dumps({'done': n, 'total': 9}), flush=True)\n"
    )
    return Worker([sys.executable, "-c", told + script], tmp_path / "w.log", 1, patience)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "say(4); print('hello'); sys.exit(7)",
            r"ended with status 7 after 4 of 9 chunks: no message",
        ),
        ("raise OSError('No space left')", r"status 1 after nothing: OSError: No space left"),
        ("say(1); os.kill(os.getpid(), 9)", r"killed by signal 9 after 1 of 9 chunks"),
    ],
)
def test_a_worker_that_ends_badly_says_how_and_how_far_it_was(
    tmp_path: Path, script: str, message: str
):
    with pytest.raises(WorkerFailed, match=message):
        worker(tmp_path, script).wait()


def test_a_worker_that_falls_silent_is_killed_and_one_that_is_only_slow_is_not(tmp_path: Path):
    slow = "for n in range(9):\n    say(n)\n    time.sleep(0.15)"
    worker(tmp_path, slow, patience=1.0).wait()
    silent = worker(tmp_path, "say(3); time.sleep(60)", patience=1.0)
    with pytest.raises(WorkerFailed, match=r"no sign of life for \d+ s after 3 of 9 chunks"):
        silent.wait()
    stopped = worker(tmp_path, "say(2); os.kill(os.getpid(), 19)", patience=1.0)
    with pytest.raises(WorkerFailed, match="no sign of life"):
        stopped.wait()
    for process in (silent, stopped):
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_a_worker_gives_signs_of_life_before_and_after_it_encodes_and_not_while_it_should(
    tmp_path: Path,
):
    begin = "from rag2.reindex.worker import _pulse\npulse = _pulse(1.0)\n"
    busy = begin + "time.sleep(8); pulse(1, 9); pulse(9, 9); time.sleep(8)"
    hangs = begin + "time.sleep(1); pulse(1, 9); time.sleep(60)"
    fine, stuck = (worker(tmp_path, script, patience=300.0) for script in (busy, hangs))
    for process in (fine, stuck):
        while not process.finished() and not process.total:  # it imports torch first
            time.sleep(0.05)
        process.patience = 6.0
    fine.wait()
    with pytest.raises(WorkerFailed, match=r"no sign of life for \d+ s after 1 of 9"):
        stuck.wait()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cpus": [999]}, "this machine has the cores 0 to"), ({"device": "tpu"}, "pattern")],
)
def test_a_core_or_a_device_that_is_not_there_is_refused_at_once(change, message: str):
    with pytest.raises(ValueError, match=message):
        AsyncRefresh(**change)


def test_a_worker_does_not_believe_that_it_belongs_to_the_training_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    script = (
        "names = ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'TORCHELASTIC_RUN_ID')\n"
        "say(10 * sum(n in os.environ for n in names) + int(os.environ['OMP_NUM_THREADS']))"
    )
    alone = worker(tmp_path, script)
    alone.wait()
    assert alone.done == 1  # no variable of the group, one thread


# --- what a real worker makes ---------------------------------------------------------------------


def test_a_worker_makes_what_training_would_have_made_and_is_started_again_when_it_is_killed(
    store: Store,
    chunks: list[Chunk],
    encoder: DualEncoder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    # At a tenth of its speed, so that it is still at work when it is killed.
    with LiveIndex(store, AsyncRefresh(every=4, lag=3, cpus=[0], duty=0.1)) as live:
        first, expected = live.generation, None
        swapped_at = []
        for step in range(9):
            moved(encoder)
            live.refresh(step)
            if step == 3:
                snapshot = tmp_path / "snapshots" / "000001"
                assert live.state()["pending"] == {
                    "number": 1, "step": 4, "fingerprint": encoder.fingerprint(),
                }  # fmt: skip
                expected = rebuilt(snapshot, chunks, 4)
                assert live.worker is not None
                deadline = time.monotonic() + 120  # it imports torch first
                while not live.worker.total and time.monotonic() < deadline:
                    assert not live.poll(step)
                    time.sleep(0.05)
                pid = live.worker.pid
                assert os.sched_getaffinity(pid) == {0}
                assert os.getpriority(os.PRIO_PROCESS, pid) >= 5
                os.kill(pid, signal.SIGTERM)  # for the trainer to obey
                assert live.worker.total and not (live.poll(step) or "again" in caplog.text)
                os.kill(pid, signal.SIGKILL)
            before = live.generation
            if live.poll(step):
                swapped_at.append(step)
                assert expected and same(live.generation, expected)
            else:
                assert live.generation is before
            if step == 7:
                break
        assert swapped_at == [6] and live.age(7)[0] == 3
        assert first.step == 0 and live.state()["pending"]["number"] == 2
        assert live.worker is not None
        pid = live.worker.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):  # nothing is left running
        os.kill(pid, 0)


def test_no_worker_outlives_its_trainer(tmp_path: Path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom rag2.reindex.process import Worker\n"
        "code = 'from rag2.reindex import worker; import threading, time;"
        " threading.Thread(target=worker._end_with_stdin, daemon=True).start(); time.sleep(60)'\n"
        "w = Worker([sys.executable, '-c', code], Path(sys.argv[1]), 1, 60.0)\n"
        "print(w.pid, flush=True)\nimport time; time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "w.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        os.kill(pid, 0)
        trainer.kill()
    deadline = time.monotonic() + 120  # it imports torch first, on a busy machine slowly
    while Path(f"/proc/{pid}").exists() and "zombie" not in status(pid):
        assert time.monotonic() < deadline, "the worker goes on without its trainer"
        time.sleep(0.05)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "zombie"


# --- what training sees of it ---------------------------------------------------------------------


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


def test_a_worker_reads_nothing_that_was_damaged(
    store: Store, encoder: DualEncoder, tmp_path: Path, inline: type[Inline]
):
    live = LiveIndex(store, AsyncRefresh(every=2, lag=1))
    moved(encoder)
    live.refresh(1)
    spec = Spec.model_validate_json((tmp_path / "snapshots" / "000001.json").read_text())
    weights = next((Path(spec.snapshot) / "encoder").rglob("*.safetensors"))
    for path in (weights, Path(spec.chunks) / "chunks.arrow"):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        shutil.rmtree(spec.directory)
        with pytest.raises(artifact.ArtifactError, match="bytes of file .* have changed"):
            work(spec, lambda done, total: None)
        path.write_bytes(data)
        work(spec, lambda done, total: None)


def test_a_worker_that_shares_a_device_sleeps_for_the_rest_of_its_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    clock, slept = [0.0], []
    monkeypatch.setattr(worker_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(worker_module.time, "sleep", slept.append)
    monkeypatch.setattr(worker_module.threading.Thread, "start", lambda self: None)
    pulse = worker_module._pulse(0.25)
    for done, seconds in ((1, 2.0), (2, 0.5), (3, 0.0)):
        clock[0] += seconds
        pulse(done, 3)
    assert slept == [6.0, 1.5, 0.0]
    assert capfd.readouterr().out.splitlines()[-1] == '{"done": 3, "total": 3}'


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
        kept = sorted(path.name for path in (tmp_path / "generations").glob("0*"))
        assert kept == ["000000", "000001"]  # nothing of what came after the checkpoint
        assert (tmp_path / "generations" / "current").read_text() == "000000\n"
        assert swaps(again, encoder, range(5, 7)) == [(6, 1)]
        assert same(again.generation, expected)


def test_a_changed_knowledge_base_is_noticed_where_a_run_goes_on(
    store: Store, encoder: DualEncoder
):
    state = LiveIndex(store, AsyncRefresh(every=4, lag=3)).state()
    store.kb_hash = "another"
    with pytest.raises(UserError, match="the knowledge base has changed since this run began"):
        LiveIndex(store, AsyncRefresh(every=4, lag=3), state)


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

"""The worker that makes an index: its process, its signs of life, what it reads and makes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rag2 import artifact
from rag2.reindex import worker as worker_module
from rag2.reindex.live import LiveIndex
from rag2.reindex.policy import AsyncRefresh
from rag2.reindex.process import Worker, WorkerFailed
from rag2.reindex.store import Store
from rag2.reindex.worker import Spec, work
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk
from refreshes import Inline, moved, rebuilt, same

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

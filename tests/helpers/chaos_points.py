"""Where a run is killed, and the mistakes that killing it must bring to light."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from rag2 import artifact, config, pipeline
from rag2.reindex import live, process, store
from rag2.reindex import worker as reindex_worker
from rag2.training import checkpoint, log
from rag2.worlds.almanac import Almanac
from small_world import start_models

torch.set_num_threads(1)  # before the first fork: a pool of threads does not survive one


def _half_a_file(path: Path, data: bytes) -> None:
    path.write_bytes(data[: len(data) // 2])


def _half_a_folder(directory: Path) -> None:
    """Without its manifest, which goes first, and every second file."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    for path in files[::2]:
        path.unlink()
    (Path(directory) / artifact.MANIFEST).unlink(missing_ok=True)


def _half_a_line(log: log.RunLog, **values: Any) -> None:
    log._file.write(json.dumps(values)[:20])
    log._file.flush()


# name -> (owner, function, what it has done of its work): the process is killed as the function is
# entered, after so much of it
POINTS: dict[str, tuple[Any, str, Callable[..., None] | None]] = {
    "files written, no manifest": (artifact, "_write_manifest", None),
    "a small file half written": (artifact, "_write_durably", _half_a_file),
    "before the rename": (os, "rename", None),
    "committed, pointer not moved": (artifact, "replace", None),
    "pointer written, not in place": (os, "replace", None),
    "half removed": (artifact, "remove", _half_a_folder),
    "snapshot taken": (store.Store, "launch", None),
    "at the swap": (store.Store, "publish", None),
    "in the middle of a log line": (log.RunLog, "write", _half_a_line),
}


@dataclass(frozen=True)
class Kill:
    """Who dies: after some seconds, or when a point is passed for the n-th time."""

    victim: str
    after: float | None = None
    point: str | None = None
    passing: int = 1


def make_home(home: Path) -> None:
    """A small almanac, and random models to start from."""
    sizes: dict[str, Any] = {"train": 16, "validation": 16, "test": 16}
    world = Almanac(seed=0, **sizes, two_hop=8, paraphrases=1, pretrain_rows=150)
    pipeline.ensure(pipeline.Inputs(world=world, home=str(home), vocabulary=400), {"data"})
    start_models(home)


def train(
    out: Path,
    home: Path,
    settings: Sequence[str],
    kill: Kill | None,
    fault: str | None,
    processes: bool,
) -> NoReturn:
    """`rag2 train joint ... resume=true` in this (forked) process, which it ends."""
    said = os.open(out.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if not processes:
        store.Worker = Forked  # pyright: ignore[reportAttributeAccessIssue]
    if fault:
        FAULTS[fault]()
    if kill:
        arm(kill, out)
    status = 1
    try:
        joint(out, home, settings)
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)


def joint(out: Path, home: Path, settings: Sequence[str]) -> None:
    """`rag2 train joint SETTINGS out=OUT resume=true` in this process."""
    data = home / "data"
    sys.argv = [
        "joint",
        *settings,
        *(f"kb={data / 'kb.sqlite'}", f"questions={data / 'questions.jsonl'}"),
        *(f"generator={home / 'generator'}", f"retriever={home / 'retriever'}"),
        *(f"out={out}", "resume=true"),
    ]
    spec = importlib.util.spec_from_file_location("joint", config.recipe("train/joint.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.run(module.main, module.JointConfig)


def load_everything(out: Path, home: Path, settings: Sequence[str]) -> None:
    """A first run in the parent: what it imports, the forks have."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    joint(out, home, settings)


class Forked(process.Worker):
    """The worker as a fork of the trainer: the same code and pipes without 4 s of imports."""

    def __init__(self, command: Sequence[str], log: Path, threads: int, patience: float) -> None:
        self.log, self.patience, self.done, self.total = log, patience, 0, 0
        log.touch()  # by the trainer, as the real one does: a fork may be killed before it opens it
        self._process: Any = _Fork(command[-1], log)
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard, self._rest = time.monotonic(), b""


class _Fork:
    """As much of Popen as a worker needs."""

    def __init__(self, spec: str, log: Path) -> None:
        stdin, stdin_end = os.pipe()
        stdout_end, stdout = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, signal.SIG_DFL)
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            for end in (stdin, stdin_end, stdout, stdout_end):
                os.close(end)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            status = 1
            try:
                reindex_worker.main([spec])
                status = 0
            finally:
                os._exit(status)
        os.close(stdin)
        os.close(stdout)
        self.stdin, self.stdout = os.fdopen(stdin_end, "wb"), os.fdopen(stdout_end, "rb", 0)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def mark(out: Path, text: str) -> bool:
    """Note a kill for the parent, which removes it; False where one is noted already."""
    try:
        with (out.parent / f"{out.name}.killed").open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def arm(kill: Kill, out: Path) -> None:
    """Let what `kill` describes happen to this process, its worker, or both."""
    if kill.point is not None:
        owner, name, half = POINTS[kill.point]
        left, honest, trainer = [kill.passing], getattr(owner, name), os.getpid()

        def dying(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                victim = "trainer" if os.getpid() == trainer else "worker"
                if mark(out, f"{kill.point} ({victim})"):
                    if half:
                        half(*args, **more)
                    os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **more)

        setattr(owner, name, dying)
        return
    workers: list[process.Worker] = []
    start = store.Store.launch

    def launch(self: store.Store, *args: Any) -> process.Worker:
        workers.append(start(self, *args))
        return workers[-1]

    store.Store.launch = launch  # pyright: ignore[reportAttributeAccessIssue]

    def strike() -> None:
        assert kill.after is not None
        time.sleep(kill.after)
        busy = workers and workers[-1]._process.poll() is None
        if kill.victim == "worker" and not busy:
            return
        mark(out, f"random ({kill.victim if busy else 'trainer'})")
        if kill.victim in ("worker", "both") and busy:
            os.kill(workers[-1].pid, signal.SIGKILL)
        if kill.victim in ("trainer", "both"):
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=strike, daemon=True).start()


def _swap_when_ready() -> None:
    honest = live.LiveIndex._time_to_swap

    def eager(self: live.LiveIndex, step: int) -> bool:
        return honest(self, step) or bool(self._making and self._making.done())

    live.LiveIndex._time_to_swap = eager


def _forget_random_state() -> None:
    honest = checkpoint.load

    def forgetful(*args: Any) -> Any:
        before = torch.get_rng_state()
        state = honest(*args)
        torch.set_rng_state(before)
        return state

    checkpoint.load = forgetful


def _forget_pending() -> None:
    honest = live.LiveIndex.state
    live.LiveIndex.state = lambda self: honest(self) | {"pending": None}


def _forget_demand() -> None:
    honest = live.LiveIndex.state
    forgotten = {"rows": [], "counts": [], "place": 0}
    live.LiveIndex.state = lambda self: honest(self) | {"demand": forgotten}


def _write_in_place() -> None:
    """The pointer first, then the files of the checkpoint that it names, one after the other."""
    honest = artifact.committing

    def hasty(directory: Any, kind: str, meta: Any = None, pointer: Any = None) -> Any:
        if pointer is not None:
            Path(directory).parent.mkdir(parents=True, exist_ok=True)
            Path(pointer).write_text(f"{Path(directory).name}\n")
        return honest(directory, kind, meta, pointer)

    artifact.committing = hasty


FAULTS: dict[str, Callable[[], None]] = {
    "swap when ready": _swap_when_ready,
    "random state forgotten": _forget_random_state,
    "refresh under way forgotten": _forget_pending,
    "finds forgotten": _forget_demand,
    "pointer before files": _write_in_place,
}

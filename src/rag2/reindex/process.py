"""A worker process seen from training: alive, dead, silent or done."""

import math
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# A process of a training group must not believe that it is one of the group.
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRESS = re.compile(rb'\{"done": (\d+), "total": (\d+)\}')
POLL = 0.02  # seconds between two looks at a worker that training waits for


class WorkerFailed(Exception):
    """A worker that died, was stopped, or fell silent; the message says which."""


class Worker:
    """A running command whose stdout tells how far it is and whose stderr goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, threads: int, patience: float) -> None:
        """Start it; `patience` are the seconds without a word after which it counts as dead."""
        self.log, self.patience = log, patience
        self.done = self.total = 0
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(threads, os.environ),
            )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard, self._rest = time.monotonic(), b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def finished(self) -> bool:
        """True once it ended well; raises WorkerFailed when it ended badly or fell silent."""
        status = self._process.poll()
        self._listen()
        if status == 0:
            self.kill()  # only closes the pipes
            return True
        if status is not None:
            self.kill()
            raise WorkerFailed(f"{_ended(status)} after {self._told()}: {self._last_line()}")
        silent = time.monotonic() - self._heard
        if silent > self.patience:
            self.kill()
            raise WorkerFailed(f"no sign of life for {silent:.0f} s after {self._told()}")
        return False

    def wait(self, seconds: float = math.inf) -> bool:
        """Until it is done, or so long: whether it is done; raises as `finished` does."""
        until = time.monotonic() + seconds
        while not (done := self.finished()) and time.monotonic() < until:
            time.sleep(POLL)
        return done

    def kill(self) -> None:
        """End the process, however it is, and close what leads to it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        while not self._process.stdout.closed and (data := self._process.stdout.read(65536)):
            self._heard = time.monotonic()
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if told := PROGRESS.fullmatch(line):  # a library may print there, too
                    self.done, self.total = int(told[1]), int(told[2])

    def _told(self) -> str:
        return f"{self.done} of {self.total} chunks" if self.total else "nothing"

    def _last_line(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no message'} (its output: {self.log})"


def _environment(threads: int, outer: Mapping[str, str]) -> dict[str, str]:
    kept = {
        key: value
        for key, value in outer.items()
        if key not in GROUP and not key.startswith(("TORCHELASTIC", "GROUP_"))
    }
    # Set before libgomp starts: FAISS and torch then agree on the number.
    return {**kept, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def _ended(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"ended with status {status}"

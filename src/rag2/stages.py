"""Runs the stages of a plan: subprocesses of one thread each, as many at once as asked for.

Two processes of one thread beat one process of two at the sizes a CPU can train.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rag2 import artifact
from rag2.registry import UserError
from rag2.training.log import Advance, Bars

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

LOG = "stage.log"  # in a job's directory: all that it printed

# Asks Linux to kill this process when its parent (argv[1]) ends, then becomes the command. The
# parent may have ended before the request; without ctypes or prctl the command runs all the same.
LEASH = """
import contextlib, os, signal, sys
with contextlib.suppress(ImportError, OSError, AttributeError):
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # 1: PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("error: what started this stage has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A command that fills `directory`, after the jobs it needs; `steps` is its bar's length.

    Without `one_thread` it has as many threads as the same command typed by hand. `result` is what
    it leaves in the directory when it came to its end: a run that was stopped exits with 0 too.
    """

    name: str
    directory: Path
    command: Sequence[str]
    needs: frozenset[str]
    steps: int
    one_thread: bool = True
    result: str | None = None


class Failed(UserError):
    """A job that ended badly; `reason` is its last line."""

    def __init__(self, job: Job, reason: str) -> None:
        log = job.directory / LOG
        super().__init__(f"stage {job.name} failed: {reason} (its whole output: {log})")
        self.reason = reason


def run(
    jobs: Sequence[Job],
    at_once: int,
    done: Callable[[str], None],
    failed: Callable[[str, "Failed"], None] | None = None,
) -> None:
    """Run every job; `done(name)` is called after each success.

    A job that fails is told to `failed(name, error)` and those that do not need it go on; without
    that, Failed is raised with its last line. However it ends, no subprocess outlives it (by a
    SIGKILL: on Linux), and what the others have checkpointed is there for the next try.
    """
    # The longest first: the short ones fill the gaps that it leaves at the end.
    waiting = sorted(jobs, key=lambda job: -job.steps)
    running: dict[str, _Process] = {}
    with Bars() as bars, _terminable():
        try:
            while waiting or running:
                for job in list(waiting):
                    open_names = {other.name for other in waiting} | set(running)
                    if len(running) < at_once and not job.needs & open_names:
                        waiting.remove(job)
                        running[job.name] = _Process(job, bars.add(job.name, max(1, job.steps)))
                for name, process in list(running.items()):
                    try:
                        ended = process.finished()
                    except Failed as error:
                        if failed is None:
                            raise
                        del running[name]
                        failed(name, error)
                    else:
                        if ended:
                            del running[name]
                            bars.note(f"{name} done")
                            done(name)
                time.sleep(0.5)
        finally:
            for process in running.values():
                process.stop()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the subprocesses are ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leashed(command: Sequence[str]) -> Sequence[str]:
    """The command that, on Linux, is killed when this thread ends; the same process id runs it.

    A kill is safe at any time: what counts is committed whole. Elsewhere the command as it is.
    """
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", LEASH, str(os.getpid()), *command]


class _Process:
    """One running job: its output goes to stage.log, its log.jsonl moves the bar."""

    def __init__(self, job: Job, advance: Advance) -> None:
        self.job, self._advance, self._seen = job, advance, 0
        artifact.make_folders(job.directory)
        self._output = (job.directory / LOG).open("w", encoding="utf-8")
        self._popen = subprocess.Popen(
            _leashed(job.command),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(ONE_THREAD if job.one_thread else {})},
        )

    def finished(self) -> bool:
        """Move the bar; True after a success; raises Failed after a failure."""
        status = self._popen.poll()
        self._follow()
        if status is None:
            return False
        self._output.close()
        if status != 0:
            text = (self.job.directory / LOG).read_text(encoding="utf-8", errors="replace")
            lines = (line for line in reversed(text.split("\n")) if line.strip())
            last = next(lines, f"exit status {status}")
            raise Failed(self.job, last.strip().removeprefix("error: "))
        if self.job.result and not (self.job.directory / self.job.result).exists():
            raise Failed(self.job, "it was stopped before its end; the same command goes on")
        self._advance(max(0, max(1, self.job.steps) - self._seen))
        return True

    def stop(self) -> None:
        """End the process and wait for it."""
        self._popen.terminate()
        self._popen.wait()
        self._output.close()

    def _follow(self) -> None:
        try:
            lines = (self.job.directory / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return
        if len(lines) > self._seen:
            line = json.loads(lines[-1])
            figures = {key: line[key] for key in ("loss", "recall") if key in line}
            self._advance(len(lines) - self._seen, **figures)
            self._seen = len(lines)

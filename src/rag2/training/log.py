"""One JSON object per step in log.jsonl, and a progress bar for the person who waits."""

import fcntl
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rag2 import artifact
from rag2.registry import UserError


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, amount: int = 1, **values: float) -> None:
        """By `amount`, with figures to show beside it."""
        ...


class RunLog:
    """Appends to `directory`/log.jsonl; floats are written so that they round-trip exactly."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        """Open the log; a resumed run cuts it back to the lines before step `start`.

        Raises UserError while another process has the log of this directory open.
        """
        artifact.make_folders(directory)
        self._lock = (directory / ".lock").open("w")  # the lock goes with the process
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{directory}: another process is training there") from None
        self.path = directory / "log.jsonl"
        kept = [line for line, step in _steps(self.path) if step < start]
        artifact.replace(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> dict[str, Any]:
        """Write one line, with the peak memory until now; it is on its way to disk on return.

        Returns what the line holds.
        """
        line = {**values, "peak_memory_bytes": peak_memory()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        return line

    def sync(self) -> None:
        """Make durable what was written: before a checkpoint promises to go on after it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and let others in."""
        self._file.close()
        self._lock.close()


class NoLog:
    """The log of every process but the first: their lines would be the same."""

    def write(self, **values: Any) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Close nothing."""


def _lines(path: Path) -> Iterator[str]:
    """The complete lines of a log; a kill may have left half a line, a power loss zeros."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.endswith("\n") or "\0" in line:
                return
            yield line


def _steps(path: Path) -> Iterator[tuple[str, int]]:
    """The complete lines of a run's log and their steps; UserError for others."""
    for number, line in enumerate(_lines(path), start=1):
        try:
            yield line, int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}:{number}: not a line of a run's log") from None


def train_seconds(directory: Path) -> float:
    """Wall-clock seconds that the steps of a run took, from its log."""
    return sum(json.loads(line).get("seconds", 0.0) for line in _lines(directory / "log.jsonl"))


def train_memory(directory: Path) -> int | None:
    """Peak memory of a run's process in bytes, from its log; None where no step was logged."""
    lines = map(json.loads, _lines(directory / "log.jsonl"))
    return max((line.get("peak_memory_bytes", 0) for line in lines), default=0) or None


def train_tokens(directory: Path) -> int | None:
    """Tokens that the steps of a run had read by its end, from its log; None where it keeps none.

    `tokens` of a line counts from the first step on.
    """
    counts = [json.loads(line).get("tokens") for line in _lines(directory / "log.jsonl")]
    return None if not counts or None in counts else counts[-1]


def peak_memory() -> int:
    """The most memory this process has held at once, in bytes: the GPU's, where it uses one."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    # Linux's ru_maxrss begins with that of the process that started this one; VmHWM does not.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Bars:
    """Progress bars on stderr, one per task."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def note(self, text: str) -> None:
        """A line where nobody sees the bars: in a file they are drawn at the end only."""
        if not self._bars.console.is_terminal:
            self._bars.console.print(text)

    def add(self, title: str, total: int | None, done: int = 0) -> Advance:
        """A new bar; the returned function advances it and shows `key=value` beside it.

        `total` is None where nobody knows.
        """
        task = self._bars.add_task(title, total=total, completed=done, note="")

        def advance(amount: int = 1, **values: float) -> None:
            note = " ".join(f"{key} {value:.4g}" for key, value in values.items())
            self._bars.update(task, advance=amount, note=note)

        return advance


@contextmanager
def progress(title: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """One progress bar; the yielded function advances it and shows `key=value` beside it."""
    with Bars() as bars:
        yield bars.add(title, total, done)


class Clock:
    """Seconds since the last call."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap (or since creation)."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

"""Parsers of formats that can attack them, in a child process with limits of memory and time.

`python -m rag2.kb.jail MEMORY SECONDS` reads a request per line, {"parser", "path", "name"}, and
answers each with frames: four bytes of length, then JSON. The parent believes none of them: it
cleans and checks the rows as it does its own. One child serves many files.
"""

import importlib
import json
import logging
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from rag2.kb.rows import Row
from rag2.kb.table import LIMIT, Malformed
from rag2.registry import TABLES, UserError

FRAME = 4 * LIMIT  # bytes of the longest frame: a row, escaped
FILES = 1000  # that a child parses before a fresh one takes over: parsers leak
LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a parser may use up: bytes of memory in all, seconds from one row to the next."""

    memory: int = 2**30
    seconds: float = 60.0


class Jail:
    """Where hostile formats are parsed; a context manager that ends its child."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._files = 0
        self._data = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def rows(self, format: str, path: str, name: str) -> Iterator[Row]:
        """The rows that a parser finds; whatever ends it gives one more row with the reason.

        Raises UserError if a package that it needs is not installed.
        """
        self._ask({"parser": TABLES["parser"][format], "path": path, "name": name})
        count, done = 0, False
        try:
            while not done:
                frame = self._frame()
                if "missing" in frame:
                    needs = f"{name} needs the package {frame['missing']!r}"
                    raise UserError(f"{needs}; pip install 'rag2[ingest]'")
                place = str(frame.get("place", name))
                if "reason" in frame:
                    yield place, Malformed(str(frame["reason"]))
                elif "row" in frame:
                    count += 1
                    yield place, frame["row"]
                else:
                    done = True
        except _Ended as ended:
            after = f", after {count} rows" if count else ""
            yield name, Malformed(f"{ended}{after}")
        finally:
            if not done:
                self._kill()  # whatever else it says belongs to this file

    def _ask(self, request: dict[str, str]) -> None:
        """Give a child the next file, a fresh child where there is none to go on with."""
        if self._files >= FILES:
            self._kill()
        for _ in range(2):  # a child may have died between two files
            if self._child is None:
                self._child = self._start()
            assert self._child.stdin is not None
            try:
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
                break
            except OSError:
                self._kill()
        self._files += 1

    def _start(self) -> subprocess.Popen[bytes]:
        self._files = 0
        self._data.clear()
        limits = [str(self._limits.memory), str(self._limits.seconds)]
        paths = os.pathsep.join(path for path in sys.path if path)
        one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pool = {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # the others reserve more than they use
        # -P: what lies in the folder that is read must not shadow a module.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "rag2.kb.jail", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, **one, **pool},
        )

    def _frame(self) -> dict[str, Any]:
        """The next frame; raises _Ended if it does not come."""
        (length,) = LENGTH.unpack(self._take(LENGTH.size))
        if length > FRAME:
            raise _Ended(f"a row of more than {FRAME:,} bytes")
        try:
            frame = json.loads(self._take(length))
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            raise _Ended("the parser says what is no row")
        return frame

    def _take(self, size: int) -> bytes:
        """So many bytes from the child, which has to say something within the time limit."""
        assert self._child is not None and self._child.stdout is not None
        file = self._child.stdout.fileno()
        poll = select.poll()
        poll.register(file, select.POLLIN)
        deadline = time.monotonic() + self._limits.seconds
        while len(self._data) < size:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise _Ended(f"parsing took longer than {self._limits.seconds:g} s")
            data = os.read(file, 2**20)
            if not data:
                raise _Ended(self._death())
            self._data += data
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    def _death(self) -> str:
        """How the child ended."""
        assert self._child is not None
        status = self._child.wait()
        if status == EXIT_MEMORY:
            return f"parsing needs more than {self._limits.memory / 2**20:.0f} MiB of memory"
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the parser crashed ({how})"

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # a request that nobody reads any more
                        pass
        self._child = None


EXIT_MEMORY = 75


class _Ended(Exception):
    """The child says no more about this file; the message says why."""


def main(memory: int, seconds: float, requests: BinaryIO, answers: BinaryIO) -> None:
    """The child: answer requests until there are no more."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # without mapped files
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    warnings.simplefilter("ignore")
    for line in requests:
        # An orphan in an endless loop has nobody else to end it.
        signal.alarm(int(2 * seconds) + 1)
        for frame in _frames(**json.loads(line)):
            data = json.dumps(frame).encode()
            signal.alarm(0)  # waiting for the parent does not count
            answers.write(LENGTH.pack(len(data)) + data)
            answers.flush()
            signal.alarm(int(2 * seconds) + 1)
        signal.alarm(0)


def _frames(parser: str, path: str, name: str) -> Iterator[dict[str, Any]]:
    """What the parent is told about one file."""
    module, _, function = parser.partition(":")
    try:
        for place, row in getattr(importlib.import_module(module), function)(Path(path), name):
            told = {"reason": str(row)} if isinstance(row, Malformed) else {"row": row}
            yield {"place": place, **told}
    except ModuleNotFoundError as error:
        yield {"missing": error.name}
    except Malformed as error:
        yield {"place": name, "reason": str(error)}
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except Exception as error:  # each library has its own
        reason = " ".join(str(error).split())[:200]
        yield {"place": name, "reason": f"cannot be parsed: {type(error).__name__}: {reason}"}
    yield {"done": True}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    main(int(sys.argv[1]), float(sys.argv[2]), sys.stdin.buffer, answers)

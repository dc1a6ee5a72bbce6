"""`rag2 serve` as a process of its own, sound or with a planted fault; also what is run in it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

sys.path.insert(0, str(Path(__file__).resolve().parent))

import serve_faults
from wire import TOKEN, asked


class ServerProcess:
    """Started when it is made, on a free port; ends with the block."""

    def __init__(
        self,
        export: Path,
        state: Path,
        fault: str | None = None,
        limits: str = "",
        core: int | None = None,
    ) -> None:
        """`limits` as `waiting=4,read_seconds=2`; `core`: where it runs, alone or not."""
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        command = [sys.executable, __file__, str(export), str(state), fault or "", limits]
        pinned = None if core is None else lambda: os.sched_setaffinity(0, {core})
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, text=True, preexec_fn=pinned
        )
        self.address = ""

    def ready(self) -> Self:
        """Wait until it answers; AssertionError if it ends before."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("ready: "), f"exit {self.process.wait()}: {self.logged()[-2000:]}"
        self.address = line.split()[1].split("/#")[0]
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.log.close()

    def logged(self) -> str:
        """Standard error so far."""
        return Path(self.log.name).read_text()

    def bytes(self) -> int:
        """Resident memory."""
        return int(self._status("VmRSS")) << 10

    def threads(self) -> int:
        """How many it has."""
        return int(self._status("Threads"))

    def sockets(self) -> int:
        """Open ones."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        links = [os.readlink(path) for path in folder.iterdir() if path.is_symlink()]
        return sum(link.startswith("socket:") for link in links)

    def seconds(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def loop(self) -> float:
        """CPU seconds of its main thread, which is the event loop, so far."""
        text = Path(f"/proc/{self.process.pid}/schedstat").read_text()
        return int(text.split()[0]) / 1e9

    def end(self, signal: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(signal)
        return self.process.wait(seconds)

    def gauge(self, name: str) -> float:
        """A number of /metrics."""
        lines = asked(self.address, "GET", "/metrics").body.decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def idle(self, seconds: float = 5) -> float:
        """Seconds until nothing waits and nothing is written; AssertionError if that takes longer.

        What is being asked about is looked at from here: it takes a few milliseconds itself.
        """
        began = time.monotonic()
        while True:
            counts = [self.gauge("rag2_queue_waiting"), self.gauge("rag2_answers_live")]
            taken = time.monotonic() - began
            if counts == [0, 0]:
                return taken
            assert taken < seconds, f"after {taken:.1f} s: {counts}"
            time.sleep(0.005)

    def _status(self, name: str) -> str:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(line for line in lines if line.startswith(f"{name}:")).split()[1]


def main(export: str, state: str, fault: str, limits: str) -> None:
    """What the process runs: the command itself, after the fault was planted."""
    from rag2 import cli
    from rag2.serve import server
    from rag2.serve.limits import Limits

    if fault:
        serve_faults.FAULTS[fault]()
    given = dict(pair.split("=") for pair in limits.split(",") if pair)
    if given:
        server.Limits = lambda **own: Limits.model_validate(own | given)  # type: ignore[misc]
    cli.main(["serve", export, "--state", state, "--port", "0", "--token", TOKEN])


if __name__ == "__main__":
    main(*sys.argv[1:])

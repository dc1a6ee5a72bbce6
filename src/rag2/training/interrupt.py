"""SIGTERM ends a run at the end of its step, with everything committed."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from rag2.training import distributed
from rag2.training.run import Run


class Stop:
    """While it is entered, a SIGTERM is remembered instead of obeyed; a second one ends at once.

    Schedulers and `kill` send it some time before they send SIGKILL.
    """

    def __init__(self) -> None:
        self.heard = False
        """whether this process was asked to stop"""
        self._before: Any = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Whether any process of the group was asked to stop: all of them leave at one step."""
        return distributed.any_of(self.heard)

    def obey(self, run: Run, step: int) -> None:
        """End the process with status 0, if it was asked to: call it once `step` is committed."""
        if self.asked():
            run.log.close()
            sys.stderr.write(f"stopped after {step} steps; resume=true goes on from there\n")
            raise SystemExit(0)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.heard = True
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

"""Requests that wait for their turn, as many as there may be: what Engine and Relay share."""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from rag2.serve.errors import busy, draining, late
from rag2.serve.limits import Limits
from rag2.serve.work import Work


class Queue(ABC):
    """`submit` never waits: what there is no room for is refused."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 0.1  # seconds between two answers, a moving average
        self._last = time.monotonic()

    @property
    def waiting(self) -> int:
        """Requests that nobody works on yet."""
        return len(self._waiting)

    @property
    @abstractmethod
    def live(self) -> int:
        """Requests that are being worked on."""

    @abstractmethod
    def _notify(self) -> None:
        """Wake who works; called with `_changed` held."""

    def check_room(self, count: int = 1) -> None:
        """Raise ApiError, 429 or 503, if so many more requests cannot be taken now."""
        if self._closing:
            raise draining()
        if len(self._waiting) + count > self.limits.waiting:
            raise busy(self._pace * len(self._waiting))

    def submit(self, works: Sequence[Work]) -> None:
        """Take these, all or none; raises as `check_room` does."""
        with self._changed:
            self.check_room(len(works))
            self._waiting += works
            self._notify()

    def _unwanted(self, work: Work) -> bool:
        """Whether nobody waits for it any more; who waits too long is told."""
        if not work.cancelled and time.monotonic() > work.until:
            work.cancelled = True
            work.tell(late(self.limits.deadline))
        return work.cancelled

    def _finished(self) -> None:
        now = time.monotonic()
        self._pace += 0.1 * (min(now - self._last, 10.0) - self._pace)
        self._last = now

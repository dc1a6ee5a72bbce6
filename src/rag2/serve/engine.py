"""Requests from many threads -> one thread that reads the models, many answers at once.

New answers join those that are being written between two tokens (continuous batching: Yu et al.
2022, Orca), their questions searched together. What one of them does wrong is its own affair.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rag2.answering.ask import Ask
from rag2.answering.draft import Draft
from rag2.answering.rag import Rag, step
from rag2.generator.mixture import Mixtures
from rag2.modes import evaluating
from rag2.registry import UserError
from rag2.serve.errors import ApiError, busy, draining, late
from rag2.serve.limits import Limits

logger = logging.getLogger(__name__)
Tell = Callable[[Any], None]


@dataclass(slots=True, eq=False)
class Work:
    """Something to do, and whom to tell: an Ask to answer, or a call to make.

    An answer is told in pieces of text, then as an `Answer`; a call by its result. Either ends with
    an exception instead if it fails.
    """

    what: Ask | Callable[[], Any]
    tell: Tell
    until: float
    """time.monotonic() of the deadline"""
    cancelled: bool = False
    """set by whoever does not want it any more"""
    began: float = field(default_factory=time.monotonic)
    searched: float = 0.0
    """seconds that the search took"""
    first: float | None = None
    """seconds until the first token"""


class Engine:
    """A thread that answers; `submit` never waits."""

    def __init__(self, rag: Rag, limits: Limits) -> None:
        self.rag, self.limits = rag, limits
        self._waiting: deque[Work] = deque()
        self._live: dict[int, tuple[Work, Draft]] = {}
        self._mixtures = Mixtures(rag.generator.model, limits.remembered)
        self._changed = threading.Condition()
        self._closing = False
        self._pace = 0.1  # seconds between two answers, a moving average
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that nobody works on yet."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Answers that are being written."""
        return len(self._live)

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
            self._changed.notify()

    def close(self, seconds: float) -> bool:
        """Take nothing more and finish what was taken; whether that was done in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # ----- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        with evaluating(self.rag.generator.model):
            while (joining := self._next()) is not None:
                self._drop_unwanted()
                self._join(joining)
                if self._live:
                    self._step()

    def _next(self) -> list[Work] | None:
        """What to begin now, after a wait if there is nothing to do; None: the end."""
        with self._changed:
            while not self._waiting and not self._live and not self._closing:
                self._changed.wait()
            if self._closing and not self._waiting and not self._live:
                return None
            joining: list[Work] = []
            rows = sum(len(draft.mixture.contexts) for _, draft in self._live.values())
            while self._waiting and len(self._live) + len(joining) < self.limits.together:
                rows += self._rows(self._waiting[0])
                if rows > self.limits.rows and (self._live or joining):
                    break
                joining.append(self._waiting.popleft())
        return joining

    def _rows(self, work: Work) -> int:
        if not isinstance(work.what, Ask):
            return 1
        k = self.rag.settings.k if work.what.k is None else work.what.k
        return max(1, k)

    def _drop_unwanted(self) -> None:
        gone = [key for key, (work, _) in self._live.items() if self._unwanted(work)]
        if gone:
            self._mixtures.drop([self._live.pop(key)[1].mixture for key in gone])

    def _unwanted(self, work: Work) -> bool:
        """Whether nobody waits for it any more; who waits too long is told."""
        if not work.cancelled and time.monotonic() > work.until:
            work.cancelled = True
            work.tell(late(self.limits.deadline))
        return work.cancelled

    def _join(self, works: Sequence[Work]) -> None:
        asked = []
        for work in works:
            if self._unwanted(work):
                continue
            if isinstance(work.what, Ask):
                asked.append(work)
            else:
                self._call(work, work.what)
        drafts = self._drafts(asked)
        if not drafts:
            return
        try:
            with self.rag.reading:
                self._mixtures.add([draft.mixture for _, draft in drafts])
        except Exception as error:  # whatever it is, those that run go on
            self._fail(drafts, error)
            return
        for work, draft in drafts:
            self._live[id(draft)] = (work, draft)

    def _drafts(self, works: Sequence[Work]) -> list[tuple[Work, Draft]]:
        """Answers that have no token yet; together, or one by one where one of them is wrong."""
        if not works:
            return []
        began = time.monotonic()
        try:
            drafts = self.rag.drafts([work.what for work in works if isinstance(work.what, Ask)])
        except Exception as error:
            if len(works) > 1:
                return [found for work in works for found in self._drafts([work])]
            works[0].tell(told(error))
            return []
        seconds = time.monotonic() - began
        for work in works:
            work.searched = seconds
        return list(zip(works, drafts, strict=True))

    def _call(self, work: Work, call: Callable[[], Any]) -> None:
        try:
            result = call()
        except Exception as error:
            result = told(error)
        self._finished()
        work.tell(result)

    def _step(self) -> None:
        """One token more for every answer."""
        pairs = list(self._live.values())
        try:
            with self.rag.reading:
                step(self._mixtures, [draft for _, draft in pairs])
        except Exception as error:
            self._live.clear()
            self._mixtures = Mixtures(self.rag.generator.model, self.limits.remembered)
            self._fail(pairs, error)
            return
        for work, draft in pairs:
            if work.first is None:
                work.first = time.monotonic() - work.began
            if piece := draft.news():
                work.tell(piece)
            if draft.finish:
                del self._live[id(draft)]
                self._finished()
                work.tell(draft.answer())

    def _fail(self, pairs: Sequence[tuple[Work, Draft]], error: Exception) -> None:
        for work, _ in pairs:
            work.tell(told(error))

    def _finished(self) -> None:
        now = time.monotonic()
        self._pace += 0.1 * (min(now - self._last, 10.0) - self._pace)
        self._last = now


def told(error: Exception) -> ApiError:
    """What a client is told of an exception: a mistake of its own in full, ours without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, " ".join(str(error).split()), "invalid_request")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why", "internal_error")

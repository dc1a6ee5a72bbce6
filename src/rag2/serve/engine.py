"""Requests from many threads -> one thread that reads the models, many answers at once.

New answers join those that are being written between two tokens (continuous batching: Yu et al.
2022, Orca), their questions searched together. What one of them does wrong is its own affair.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rag2.answering.ask import Ask
from rag2.answering.draft import Draft
from rag2.answering.rag import Rag, step
from rag2.generator.mixture import Mixtures
from rag2.modes import evaluating
from rag2.serve.errors import ApiError, log, told
from rag2.serve.limits import Limits
from rag2.serve.queue import Queue
from rag2.serve.work import Work


class Engine(Queue):
    """A thread that answers."""

    def __init__(self, rag: Rag, limits: Limits) -> None:
        super().__init__(limits)
        self.rag = rag
        self._live: dict[int, tuple[Work, Draft]] = {}
        self._mixtures = Mixtures(rag.generator.model, limits.remembered)
        self._joining: list[Work] = []
        self._crashed = False
        self._moved: float | None = None  # when its last piece of work began; None: it waits
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Answers that are being written."""
        return len(self._live)

    @property
    def failure(self) -> str:
        """Why nothing will be answered any more; empty if all is well."""
        if self._crashed:
            return "the engine crashed"
        moved = self._moved
        if moved is not None and time.monotonic() - moved > self.limits.stuck_seconds:
            return f"the engine has not moved for {self.limits.stuck_seconds:g} s"
        return ""

    def give_up(self, works: Sequence[Work]) -> None:
        """Nobody wants these any more: places in the queue are free at once, others soon."""
        with self._changed:
            for work in works:
                work.cancelled = True
            self._waiting = deque(work for work in self._waiting if not work.cancelled)

    def close(self, seconds: float) -> bool:
        """Take nothing more and finish what was taken; whether that was done in time."""
        with self._changed:
            self._closing = True
            self._notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _notify(self) -> None:
        self._changed.notify()

    # ----- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with evaluating(self.rag.generator.model):
                while (joining := self._next()) is not None:
                    self._joining = joining
                    self._drop_unwanted()
                    self._join(joining)
                    if self._live:
                        self._step()
        except BaseException as error:  # what no request can be blamed for
            log(error, "the engine crashed")
            self.abandon()

    def abandon(self) -> None:
        """Tell everybody who waits that there will be no answer."""
        with self._changed:
            self._crashed = self._closing = True
            left = [*self._joining, *(work for work, _ in self._live.values()), *self._waiting]
            self._waiting.clear()
        for work in left:
            work.tell(ApiError(500, "the server has failed and ends", "engine_failed"))

    def _next(self) -> list[Work] | None:
        """What to begin now, after a wait if there is nothing to do; None: the end."""
        with self._changed:
            while not self._waiting and not self._live and not self._closing:
                self._moved = None
                self._changed.wait()
            self._moved = time.monotonic()
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

    def _join(self, works: Sequence[Work]) -> None:
        asked = []
        for work in works:
            if self._unwanted(work):
                continue
            if isinstance(work.what, Ask):
                asked.append(work)
            else:
                self._call(work, work.what)
        if drafts := self._drafts(asked):
            self._begin(drafts)

    def _begin(self, drafts: Sequence[tuple[Work, Draft]]) -> None:
        """Read their prompts; together, or one by one where one of them cannot be read."""
        self._moved = time.monotonic()
        try:
            with self.rag.reading:
                self._mixtures.add([draft.mixture for _, draft in drafts])
        except Exception as error:  # whatever it is, those that run go on
            if len(drafts) == 1:
                drafts[0][0].tell(told(error))
                return
            for pair in drafts:
                self._begin([pair])
            return
        for work, draft in drafts:
            self._live[id(draft)] = (work, draft)

    def _drafts(self, works: Sequence[Work]) -> list[tuple[Work, Draft]]:
        """Answers that have no token yet; together, or one by one where one of them is wrong."""
        if not works:
            return []
        began = self._moved = time.monotonic()
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
        self._moved = time.monotonic()
        try:
            result = call()
        except Exception as error:
            result = told(error)
        self._finished()
        work.tell(result)

    def _step(self) -> None:
        """One token more for every answer."""
        pairs, failed = list(self._live.values()), dict[int, Exception]()
        self._moved = time.monotonic()
        try:
            with self.rag.reading:
                step(self._mixtures, [draft for _, draft in pairs], failed)
        except Exception as error:  # of the model: nobody's own, and all lose their places in it
            self._live.clear()
            self._mixtures = Mixtures(self.rag.generator.model, self.limits.remembered)
            said = told(error)
            for work, _ in pairs:
                work.tell(said)
            return
        for work, draft in pairs:
            if error := failed.get(id(draft)):
                del self._live[id(draft)]
                work.tell(told(error))
            else:
                self._tell(work, draft)

    def _tell(self, work: Work, draft: Draft) -> None:
        """What is new of an answer."""
        if work.first is None:
            work.first = time.monotonic() - work.began
        try:
            piece = draft.news() if work.streamed else ""
            answer = draft.answer() if draft.finish else None
        except Exception as error:
            work.tell(told(error))
            work.cancelled = True
            if draft.finish:
                del self._live[id(draft)]
            return
        if piece:
            work.tell(piece)
        if answer is not None:
            del self._live[id(draft)]
            self._finished()
            work.tell(answer)

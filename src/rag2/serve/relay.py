"""Requests from many threads -> a generator elsewhere, so many of them at once.

What `Engine` is for a generator in this process: the same queue with the same refusals. Whoever
leaves, or waits too long, takes the request to the generator's server with them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from rag2.answering.ask import Answer, Ask
from rag2.answering.remote import Remote
from rag2.answering.wire import Unavailable
from rag2.serve.errors import ApiError, told
from rag2.serve.limits import Limits
from rag2.serve.queue import Queue
from rag2.serve.work import Work

logger = logging.getLogger(__name__)
LOOK = 0.1  # seconds between two looks at who has left
AGAIN = "2"  # seconds until a client may try again


class Relay(Queue):
    """Tasks on the loop of a remote system."""

    def __init__(self, rag: Remote, limits: Limits) -> None:
        super().__init__(limits)
        self.rag = rag
        self._live: dict[asyncio.Task[None], Work] = {}
        self._searching = ThreadPoolExecutor(limits.together, "relay")
        self._wake = asyncio.Event()
        self._running = rag.background.start(self._run())

    @property
    def live(self) -> int:
        """Requests that are being worked on."""
        return len(self._live)

    @property
    def failure(self) -> str:
        """Why nothing will be answered any more; empty if all is well."""
        over = self._running.done() and not self._closing
        return "the relay to the generator's server crashed" if over else ""

    def give_up(self, works: Sequence[Work]) -> None:
        """Nobody wants these any more: their places in the queue are free at once, others soon."""
        for work in works:
            work.cancelled = True
        with suppress(RuntimeError):  # the loop has ended, and all its work with it
            self._notify()

    def abandon(self) -> None:
        """Tell everybody who waits that there will be no answer."""
        with self._changed:
            self._closing = True
            left = [*self._live.values(), *self._waiting]
            self._waiting.clear()
        for work in left:
            work.tell(ApiError(500, "the server has failed and ends", "engine_failed"))

    def close(self, seconds: float) -> bool:
        """Take nothing more and finish what was taken; whether that was done in time."""
        with self._changed:
            self._closing = True
        self._notify()
        try:
            self._running.result(seconds)
            return True
        except TimeoutError:
            self._running.cancel()
            return False
        finally:
            self._searching.shutdown(wait=False)

    def _notify(self) -> None:
        self.rag.background.loop.call_soon_threadsafe(self._wake.set)

    # ----- the loop ------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while not self._closing or self._waiting or self._live:
                self._wake.clear()
                self._drop_unwanted()
                while self._waiting and len(self._live) < self.limits.together:
                    self._begin(self._waiting.popleft())
                busy = self._waiting or self._live
                try:
                    await asyncio.wait_for(self._wake.wait(), LOOK if busy else None)
                except TimeoutError:
                    pass
        finally:
            for task in self._live:
                task.cancel()

    def _drop_unwanted(self) -> None:
        for task, work in self._live.items():
            if self._unwanted(work):
                task.cancel()
        with self._changed:
            kept = [work for work in self._waiting if not self._unwanted(work)]
            self._waiting.clear()
            self._waiting += kept

    def _begin(self, work: Work) -> None:
        task = asyncio.get_running_loop().create_task(self._do(work))
        self._live[task] = work
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._live[task]
        self._finished()
        self._wake.set()

    async def _do(self, work: Work) -> None:
        try:
            result = await self._result(work)
        except Unavailable as error:
            logger.warning("%s", error)
            result = unavailable()
        except Exception as error:  # whatever it is, the others go on
            result = told(error)
        work.tell(result)

    async def _result(self, work: Work) -> Any:
        """An answer, whose pieces are told on the way, or what a call gives."""
        if not isinstance(work.what, Ask):
            return await self._aside(work.what)
        ask = work.what
        began = time.monotonic()
        plan = await self._aside(lambda: self.rag.plan(ask))
        work.searched = time.monotonic() - began

        def tell(piece: str) -> None:
            if work.first is None:
                work.first = time.monotonic() - work.began
            if work.streamed:
                work.tell(piece)

        answer: Answer = await self.rag.written(plan, tell)
        return answer

    async def _aside(self, call: Callable[[], Any]) -> Any:
        """What would hold up the loop, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._searching, call)


def unavailable() -> ApiError:
    """The generator's server is down or does not behave; our log says how."""
    return ApiError(
        503,
        "the generator's server does not answer as it should; try again later",
        "generator_unavailable",
        headers={"retry-after": AGAIN},
    )

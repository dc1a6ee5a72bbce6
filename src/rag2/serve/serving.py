"""The system behind the endpoints: asks from an event loop, answers from the engine's thread."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request

from rag2.answering.ask import Answer, Ask
from rag2.answering.remote import Remote, System
from rag2.serve.engine import Engine, Work, told
from rag2.serve.errors import ApiError, busy, draining
from rag2.serve.limits import Limits
from rag2.serve.metrics import Metrics
from rag2.serve.relay import Relay

WRITERS = 8  # changes of documents that may wait for one another
NEWER = 1000  # chunks that may be newer than the index, where it is small
Event = tuple[int, "str | Answer | ApiError", Work]


class Serving:
    """What all requests share. It is `starting` until it has a system, and may be `draining`."""

    def __init__(self, limits: Limits, name: str, token: str) -> None:
        self.limits, self.name, self._token = limits, name, token
        self.metrics = Metrics()
        self.draining = False
        self.failure = ""
        """why there will be no system"""
        self._engine: Engine | Relay | None = None
        self._writing = asyncio.Lock()
        self._writers = 0
        self._refreshing: asyncio.Future[None] | None = None

    def start(self, rag: System) -> None:
        """Answer with this system from now on, after an answer that warms it up."""
        rag.answer("Is anybody there?", max_new_tokens=1)
        remote = isinstance(rag, Remote)
        self._engine = Relay(rag, self.limits) if remote else Engine(rag, self.limits)

    @property
    def engine(self) -> Engine | Relay:
        """Raises ApiError, 503, where there is none yet."""
        if self._engine is None:
            raise ApiError(503, "the server is starting", "starting", headers={"retry-after": "1"})
        return self._engine

    @property
    def rag(self) -> System:
        """The system; raises as `engine` does."""
        return self.engine.rag

    def state(self) -> str:
        """ready, starting, draining or failed."""
        if self.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "starting" if self._engine is None else "ready"

    def drain(self) -> bool:
        """Take nothing more, finish what was taken; whether that was done in time."""
        self.draining = True
        done = self._engine is None or self._engine.close(self.limits.drain_seconds)
        return done

    # ----- work ----------------------------------------------------------------------------------

    def check_room(self, count: int = 1) -> None:
        """Raise ApiError, 429 or 503, if so many more requests cannot be taken now."""
        if self.draining:
            raise draining()
        self.engine.check_room(count)

    async def events(self, asks: Sequence[Ask]) -> AsyncIterator[Event]:
        """Pieces of text and whole answers, each with the number of its ask, as they are made.

        An error ends it. Whoever stops listening frees what was taken.
        """
        loop, told_of = asyncio.get_running_loop(), asyncio.Queue[Event]()
        until = time.monotonic() + self.limits.deadline
        works: list[Work] = []
        for number, ask in enumerate(asks):

            def tell(event: Any, number: int = number) -> None:
                pass_on(loop, told_of, (number, event, works[number]))

            works.append(Work(ask, tell, until))
        self.engine.submit(works)
        left = len(works)
        try:
            while left:
                event = await told_of.get()
                if isinstance(event[1], Answer):
                    left -= 1
                    self.metrics.answered(event[2], event[1], time.monotonic() - event[2].began)
                yield event
                if isinstance(event[1], ApiError):
                    return
        finally:
            for work in works:
                work.cancelled = True

    async def call(self, request: Request, call: Callable[[], Any]) -> Any:
        """The result of a call that reads a model, made by the engine in its turn."""
        loop, result = asyncio.get_running_loop(), asyncio.Queue[Any]()
        until = time.monotonic() + self.limits.deadline
        work = Work(call, lambda event: pass_on(loop, result, event), until)
        self.engine.submit([work])
        try:
            found = await unless_gone(request, result.get())
        finally:
            work.cancelled = True
        if isinstance(found, ApiError):
            raise found
        return found

    async def change(self, change: Callable[[], Any]) -> Any:
        """The result of a change of documents; one at a time, and it is not given up."""
        if self.draining:
            raise draining()
        if self._writers >= WRITERS:
            raise busy(1.0)
        self._writers += 1
        try:
            async with self._writing:
                return await asyncio.shield(asyncio.to_thread(change))
        except ApiError:
            raise
        except Exception as error:
            raise told(error) from error
        finally:
            self._writers -= 1

    def refresh(self) -> None:
        """Build a generation of all documents and swap it in."""
        self.rag.live.refresh()
        self.metrics.swaps.inc()

    def refresh_if_due(self) -> None:
        """Refresh in the background where what is newer than the index slows the search down."""
        view = self.rag.live.view()
        newer = len(view.delta.index) if view.delta else 0
        if newer > max(NEWER, (len(view.base.index) if view.base else 0) // 10):
            if self._refreshing is None or self._refreshing.done():
                self._refreshing = asyncio.ensure_future(asyncio.to_thread(self.refresh))

    def authorize(self, request: Request) -> None:
        """Raise ApiError, 401, without the token."""
        given = request.headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        good = hmac.compare_digest(token.strip().encode(), self._token.encode())
        if scheme.lower() != "bearer" or not good:
            raise ApiError(
                401,
                "changing documents takes the server's token: Authorization: Bearer TOKEN",
                "invalid_token",
                headers={"www-authenticate": "Bearer"},
            )


def pass_on(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], event: Any) -> None:
    """Put an event into a queue of a loop that may be gone."""
    try:
        loop.call_soon_threadsafe(queue.put_nowait, event)
    except RuntimeError:  # the loop was closed: nobody listens
        pass


async def unless_gone(request: Request, result: Any) -> Any:
    """What an awaitable gives; raises ApiError where the client leaves before."""
    wanted = asyncio.ensure_future(result)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([wanted, gone], return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise ApiError(499, "the client is gone", "client_gone")  # nobody reads it
    finally:
        for task in (wanted, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The system behind the endpoints: asks from an event loop, answers from the engine's thread."""

import asyncio
import hmac
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request

from rag2.answering.ask import Ask, Place
from rag2.answering.remote import Remote, System
from rag2.serve.engine import Engine
from rag2.serve.errors import ApiError, busy, draining, log, told
from rag2.serve.events import Events, in_time, pass_on, unless_gone
from rag2.serve.limits import Limits
from rag2.serve.metrics import Metrics
from rag2.serve.relay import Relay
from rag2.serve.work import Work

WRITERS = 8  # changes of documents that may wait for one another
LOOKERS = 64  # look-ups that may wait
NEWER = 1000  # chunks that may be newer than the index, where it is small


class Serving:
    """What all requests share. It is `starting` until it has a system, and may be `draining`."""

    def __init__(self, limits: Limits, name: str, token: str) -> None:
        self.limits, self.name, self._token = limits, name, token
        self.metrics = Metrics()
        self.draining = False
        self.failure = ""
        """why there is no system, or none any more"""
        self._engine: Engine | Relay | None = None
        self._writing = asyncio.Lock()
        self._writers = self._lookers = 0
        self._refreshing: asyncio.Future[None] | None = None

    def start(self, rag: System) -> None:
        """Answer with this system from now on, after an answer that warms it up."""
        rag.answer("Is anybody there?", max_new_tokens=1)
        remote = isinstance(rag, Remote)
        self._engine = Relay(rag, self.limits) if remote else Engine(rag, self.limits)

    @property
    def running(self) -> Engine | Relay | None:
        """What answers; None while there is no system."""
        return self._engine

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

    @property
    def broken(self) -> str:
        """Why there is no system, or none any more; empty if all is well."""
        return self.failure or (self._engine.failure if self._engine else "")

    def state(self) -> str:
        """ready, starting, draining or failed."""
        if self.broken:
            return "failed"
        if self.draining:
            return "draining"
        return "starting" if self._engine is None else "ready"

    def abandon(self) -> None:
        """Tell everybody who waits that there will be no answer; new requests get 503."""
        self.failure = self.broken
        self.draining = True
        if self._engine is not None:
            self._engine.abandon()

    def drain(self) -> bool:
        """Take nothing more, finish what was taken; whether that was done in time."""
        self.draining = True
        until = time.monotonic() + self.limits.drain_seconds
        done = self._engine is None or self._engine.close(self.limits.drain_seconds)
        while self._writers and time.monotonic() < until:
            time.sleep(0.02)
        return done and not self._writers

    # ----- work ----------------------------------------------------------------------------------

    def check_room(self, count: int = 1) -> None:
        """Raise ApiError, 429 or 503, if so many more requests cannot be taken now."""
        if self.draining:
            raise draining()
        self.engine.check_room(count)

    def events(self, asks: Sequence[Ask], streamed: bool) -> Events:
        """Answers as they are made; taken at once, or ApiError as `check_room`."""
        return Events(self.engine, asks, streamed)

    async def call(self, request: Request, call: Callable[[], Any]) -> Any:
        """The result of a call that reads a model, made by the engine in its turn."""
        loop, result = asyncio.get_running_loop(), asyncio.Queue[Any]()
        until = time.monotonic() + self.limits.deadline
        work = Work(call, lambda event: pass_on(loop, result, event), until)
        self.engine.submit([work])
        try:
            found = await unless_gone(request, in_time(result, self.engine, work))
        finally:
            self.engine.give_up([work])
        if isinstance(found, ApiError):
            raise found
        return found

    async def look(self, call: Callable[[], Any]) -> Any:
        """The result of a call that only looks something up, which may have to wait for a lock."""
        if self._lookers >= LOOKERS:
            raise busy(1.0)
        self._lookers += 1
        try:
            return await asyncio.to_thread(call)
        except Exception as error:
            raise told(error) from error
        finally:
            self._lookers -= 1

    async def place(self) -> Place:
        """The state of the last change."""
        rag = self.rag
        return await self.look(lambda: rag.place(rag.live.view()))

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
        except Exception as error:
            raise told(error) from error
        finally:
            self._writers -= 1

    def refresh(self) -> None:
        """Build a generation of all documents and swap it in."""
        self.rag.live.refresh()
        self.metrics.swaps.inc()

    async def refresh_if_due(self) -> None:
        """Refresh in the background where what is newer than the index slows the search down."""
        if await self.look(self._due) and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.ensure_future(asyncio.to_thread(self._refresh_quietly))

    def _due(self) -> bool:
        view = self.rag.live.view()
        newer = len(view.delta.index) if view.delta else 0
        return newer > max(NEWER, (len(view.base.index) if view.base else 0) // 10)

    def _refresh_quietly(self) -> None:
        try:
            self.refresh()
        except Exception as error:  # the index stays as it was, and is as right
            log(error, "the index could not be refreshed")

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

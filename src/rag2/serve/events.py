"""From the engine's thread to an event loop: what is told of asks, as it happens."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.requests import Request

from rag2.answering.ask import Answer, Ask
from rag2.serve.engine import Engine
from rag2.serve.errors import ApiError, late
from rag2.serve.relay import Relay
from rag2.serve.work import Work

GRACE = 1.0  # seconds after a deadline until the loop no longer leaves it to the engine to say so
Event = tuple[int, "str | Answer | ApiError", Work]


class Events:
    """Pieces of text and whole answers, each with the number of its ask; an error ends them.

    The asks are taken when this is made, all or none, and given up by `close`.
    """

    def __init__(self, engine: Engine | Relay, asks: Sequence[Ask], streamed: bool) -> None:
        """Without pieces where it is not `streamed`. Raises ApiError as Engine.submit."""
        self._engine, loop = engine, asyncio.get_running_loop()
        self._told = asyncio.Queue[tuple[int, Any]]()
        until = time.monotonic() + engine.limits.deadline

        def tell(number: int) -> Callable[[Any], None]:
            return lambda event: pass_on(loop, self._told, (number, event))

        self.works = [Work(ask, tell(number), until, streamed) for number, ask in enumerate(asks)]
        engine.submit(self.works)

    async def __aiter__(self) -> AsyncIterator[Event]:
        left = len(self.works)
        while left:
            number, said = await in_time(self._told, self._engine, self.works[0])
            left -= isinstance(said, Answer)
            yield number, said, self.works[number]
            if isinstance(said, ApiError):
                return

    def close(self) -> None:
        """Free what was taken; whoever made this has to call it."""
        self._engine.give_up(self.works)


async def in_time(told: asyncio.Queue[Any], engine: Engine | Relay, work: Work) -> Any:
    """The next event, or that there was none in time: even an engine that hangs keeps nobody."""
    left = work.until + GRACE - time.monotonic()
    try:
        async with asyncio.timeout(left):
            return await told.get()
    except TimeoutError:
        raise late(engine.limits.deadline) from None


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

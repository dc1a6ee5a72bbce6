"""Mistakes to plant in a server, by name: each must be found by the harness that is made for it."""

from collections.abc import Callable, Sequence
from typing import Any


def stock_errors() -> None:
    """FastAPI's own handler of invalid bodies, and no guard before it."""
    from fastapi.exception_handlers import request_validation_exception_handler
    from fastapi.exceptions import RequestValidationError

    from rag2.serve import app

    errors = app._errors

    def stock(made: Any) -> None:
        errors(made)
        made.exception_handler(RequestValidationError)(request_validation_exception_handler)

    app.Guard, app._errors = lambda inner, *_: inner, stock  # type: ignore[assignment, misc]


def no_patience() -> None:
    """uvicorn's connections as they come: nothing is ever too slow."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from rag2.serve import server

    server.protocol = lambda *_: H11Protocol


def endless_queue() -> None:
    """Every request is taken."""
    from rag2.serve.engine import Engine

    Engine.check_room = lambda *_: None  # type: ignore[method-assign, assignment]


def deaf() -> None:
    """Who leaves is answered all the same."""
    from rag2.serve.engine import Engine

    Engine.give_up = lambda *_: None  # type: ignore[method-assign, assignment]


def abrupt() -> None:
    """A signal ends it at once."""
    from rag2.serve.server import Server

    def leave(self: Server, *_: Any) -> None:
        self.force_exit = self.should_exit = True

    Server.handle_exit = leave  # type: ignore[method-assign]


def late_name() -> None:
    """An answer names the state of when it ends, not the one that was searched."""
    from rag2.answering.rag import Rag

    asked = Rag.place
    Rag.place = lambda self, _: asked(self, self.live.view())  # type: ignore[method-assign]
    answer = Rag.drafts

    def slow(self: Rag, asks: Sequence[Any]) -> Any:
        found = self.searched(asks)
        import time

        time.sleep(0.05)  # in which documents change
        self.searched = lambda _: found  # type: ignore[method-assign]
        try:
            return answer(self, asks)
        finally:
            del self.searched

    Rag.drafts = slow  # type: ignore[method-assign]


def common_chance() -> None:
    """All answers draw from one generator of random numbers."""
    import numpy as np

    from rag2.answering import draft

    fresh = np.random.Generator
    shared = fresh(np.random.Philox(0))
    draft.np.random.Generator = lambda _: shared  # type: ignore[assignment, misc]


def talkative() -> None:
    """Errors are logged and told with all they say."""
    from rag2.serve import engine, errors

    def log(error: BaseException, what: str) -> None:
        errors.logger.error("%s: %r", what, error)

    errors.log = engine.log = log


def asleep() -> None:
    """The engine's thread hangs at a question that says so."""
    from rag2.answering.rag import Rag

    drafts = Rag.drafts

    def hang(self: Rag, asks: Sequence[Any]) -> Any:
        if any("hang here" in ask.question for ask in asks):
            import time

            time.sleep(1e6)
        if any("crash here" in ask.question for ask in asks):
            raise SystemExit("planted")  # no Exception: nobody catches it on the way
        return drafts(self, asks)

    Rag.drafts = hang  # type: ignore[method-assign]


def poisoned() -> None:
    """Some questions cannot be searched, read or continued; the error repeats them."""
    from rag2.answering.draft import Draft
    from rag2.answering.rag import Rag
    from rag2.generator.mixture import Mixtures

    drafts, take, add = Rag.drafts, Draft.take, Mixtures.add

    def search(self: Rag, asks: Sequence[Any]) -> Any:
        for ask in asks:
            if "poison of search" in ask.question:
                raise RuntimeError(ask.question)
        found = drafts(self, asks)
        for draft in found:
            if "poison of reading" in draft.ask.question:
                draft.mixture.contexts[0] = [-1, -1]  # type: ignore[index]
        return found

    def step(self: Draft, logp_V: Any) -> Any:
        if "poison of steps" in self.ask.question and len(self.ids) == 1:
            raise RuntimeError(self.ask.question)
        return take(self, logp_V)

    def read(self: Mixtures, mixtures: Sequence[Any]) -> None:
        if any(tuple(mixture.contexts[0]) == (-1, -1) for mixture in mixtures):
            raise RuntimeError("a prompt that cannot be read")
        add(self, mixtures)

    Rag.drafts, Draft.take, Mixtures.add = search, step, read  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "stock errors": stock_errors,
    "no patience": no_patience,
    "endless queue": endless_queue,
    "deaf": deaf,
    "abrupt": abrupt,
    "late name": late_name,
    "common chance": common_chance,
    "talkative": talkative,
    "asleep": asleep,
    "poisoned": poisoned,
}

"""The first thing that a request meets: too large, too deep or no JSON, and it goes no further.

What passes is a body that can be written as JSON again: UTF-8, no half of a surrogate pair, no
number that is not finite; of equal keys the last one counts. (Stock FastAPI answers 500 to many of
these: its own error message repeats what it cannot encode.)
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from rag2.serve.errors import ApiError, busy, log
from rag2.serve.limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# A JSON string, or what is left of one; possessive, so that a hostile one costs no more.
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
App = Callable[[Any, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI around the application; `admit` may turn a request away before its body is read."""

    def __init__(self, app: App, limits: Limits, admit: Callable[[str, str], None]) -> None:
        self.app, self.limits, self.admit = app, limits, admit
        self._held = 0  # bytes of bodies that are being received

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_headers(scope)
            self.admit(scope["method"], scope["path"])
            body = await self._body(scope, receive)
        except ApiError as error:
            await respond(send, error)
            return
        if body is not None:
            await self._run(scope, _replayed(body, receive), send)

    async def _run(self, scope: Any, receive: Receive, send: Send) -> None:
        """The application; what it does not catch is logged, and answered while it still can be."""
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            log(error, "a response failed")
            if not started:
                failed = ApiError(500, "the server failed; its log says why", "internal_error")
                await respond(send, failed)

    def _check_headers(self, scope: Any) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self.limits.header_bytes:
            raise too_long(self.limits)
        named = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        hosts = self.limits.hosts
        if hosts and any(re.sub(r":\d*$", "", name).lower() not in hosts for name in named):
            told = f"this server goes by {', '.join(hosts)}: see --allow-host"
            raise ApiError(400, told, "host_not_allowed")

    async def _body(self, scope: Any, receive: Receive) -> bytes | None:
        """All of it, checked; None if the client is gone."""
        most = self.limits.body_bytes
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > most:
                raise _too_large(most)
        body = bytearray()
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                piece = message.get("body", b"")
                body += piece
                self._held += len(piece)
                if len(body) > most:
                    raise _too_large(most)
                if self._held > self.limits.bodies:
                    raise busy(1.0)
                if not message.get("more_body"):
                    break
        finally:
            self._held -= len(body)
        if body:
            check_json(bytes(body), self.limits.depth, self.limits.values)
        return bytes(body)


def check_json(body: bytes, depth: int, values: int) -> None:
    """Raise ApiError, 422, for what is no JSON that can be written again, or more than so much."""
    if _marks(body) > values:
        bare, strings = STRING.subn(b"", body, values + 2)  # no two strings without a mark
        if strings > values + 1 or _marks(bare) > values:
            raise _bad(f"the body has more than {values} values")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _bad(f"the body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise _bad(f"the body is nested more than {depth} deep") from None
    except ValueError as error:
        raise _bad(f"the body is not JSON: {str(error)[:100]}") from None
    deep = text.count("[") + text.count("{") > depth
    if deep or "\\u" in text or "e" in text or "E" in text:
        _look_through(value, depth)


def _marks(body: bytes) -> int:
    """An upper bound of the number of values."""
    return sum(map(body.count, (b",", b":", b"[", b"{")))


def _look_through(value: Any, depth: int) -> None:
    """Every value in it, level by level."""
    level = [value]
    for _ in range(depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.keys()
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _check_text(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise _bad("the body has a number that is not finite")
        if not below:
            return
        level = below
    raise _bad(f"the body is nested more than {depth} deep")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _bad("the body has half of a surrogate pair (\\ud800 to \\udfff)") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _bad(message: str) -> ApiError:
    return ApiError(422, message, "invalid_json")


def _too_large(most: int) -> ApiError:
    # The connection stays: what is still sent is passed over, so that the client reads this.
    return ApiError(413, f"the body has more than {most} bytes", "body_too_large")


def too_long(limits: Limits) -> ApiError:
    """Request line and headers beyond their limit."""
    message = f"request line and headers have more than {limits.header_bytes} bytes"
    return ApiError(431, message, "headers_too_large", headers={"connection": "close"})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what the client really does."""
    told = False

    async def again() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def encoded(error: ApiError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    return headers, body


async def respond(send: Send, error: ApiError) -> None:
    """Send an error as the whole response."""
    headers, body = encoded(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

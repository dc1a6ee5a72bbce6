"""One connection: uvicorn's on h11, and the patience that it lacks.

A request that has begun must be complete after `read_seconds`, and what is sent must be read within
as long; uvicorn itself lets both hang for ever. (h11, not httptools, whose buffers have no bound.)
"""

import asyncio
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rag2.serve.errors import ApiError
from rag2.serve.guard import encoded, too_long
from rag2.serve.limits import Limits
from rag2.serve.refusal import Refusal


class Impatient(H11Protocol):
    """A connection with these limits; `refusal` answers what there is no room for."""

    limits: Limits
    refusal: Refusal
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._fresh() and (response := self.refusal.of(data)) is not None:
            self.transport.write(response)
            self.on_response_complete()
            self.refusal.rest(self.loop)
            return
        super().data_received(data)
        if not self.transport.is_closing():
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._watch()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:  # it had failed already
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self.loop.call_later(self.limits.read_seconds, self._too_slow)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what is being made for it is not sent any more
            self.cycle.message_event.set()
        unread, _ = self.conn.trailing_data
        error = ApiError(400, "this is no HTTP request", "invalid_http")
        if len(unread) > self.limits.header_bytes:
            error = too_long(self.limits)
        headers, body = encoded(error)
        kept = [item for item in headers if item[0] != b"connection"]
        try:
            parts = (
                h11.Response(status_code=error.status, headers=[*kept, (b"connection", b"close")]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for part in parts:
                self.transport.write(self.conn.send(part) or b"")
        except h11.LocalProtocolError:
            pass  # it came in the middle of a response
        self.transport.close()

    def _fresh(self) -> bool:
        """Whether a request begins with the next byte."""
        idle = self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE
        return idle and not self.conn.trailing_data[0] and not self.transport.is_closing()

    def _watch(self) -> None:
        """Let the clock run while the client owes something, from its first byte on."""
        owes = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None:
            owes = False  # nothing has begun: keep-alive has a clock of its own
        if owes and self._reading is None:
            self._reading = self.loop.call_later(self.limits.read_seconds, self._too_slow)
        elif not owes and self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _too_slow(self) -> None:
        line = self.transport.get_extra_info("socket")
        # Reset it, or the system keeps what is unread for many minutes more.
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _forget(self) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self._reading = self._writing = None


def protocol(limits: Limits, refusal: Refusal) -> type[H11Protocol]:
    """The class of a server's connections, as uvicorn wants it: it makes them itself."""
    return type("Connection", (Impatient,), {"limits": limits, "refusal": refusal})

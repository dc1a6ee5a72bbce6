"""The cheapest answer there is: no room. Overload is when it is given most.

It costs a tenth of what the ordinary way costs (an HTTP parser, a task, the guard), and after it
the event loop rests, so that a server that is asked ten times as much as it can answer still has
its time for answers.
"""

import asyncio
import re
from time import sleep

from rag2.serve.app import QUEUED
from rag2.serve.errors import ApiError
from rag2.serve.guard import encoded
from rag2.serve.serving import Serving

HEAD = re.compile(rb"POST ([!-~]{1,200}) HTTP/1\.1\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: ?(\d{1,8})(?=\r\n)", re.IGNORECASE)
# Every wake of the event loop takes the core from the model: what comes meanwhile is read at once.
REST = 0.004  # seconds
# What makes a request more than its head and so many bytes; such ones go the ordinary way.
OTHERWISE = re.compile(rb"\r\n(transfer-encoding|expect|upgrade|connection: ?close)", re.IGNORECASE)


class Refusal:
    """Of requests that have to take their turn, while there is no room for one more."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self._resting = False

    def of(self, data: bytes) -> bytes | None:
        """The response, where `data` is one whole request of that kind; else None."""
        found = HEAD.match(data)
        if found is None or (path := found[1].decode()) not in QUEUED:
            return None
        try:
            self.serving.check_room()
        except ApiError as error:
            if error.status == 429 and _whole(data):
                self.serving.metrics.requests.labels(path, 429).inc()
                return _written(error)
        return None

    def rest(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once all is read that is to be read now, however much of it was refused."""
        if not self._resting:
            self._resting = True
            loop.call_soon(self._rest)

    def _rest(self) -> None:
        sleep(REST)  # the whole loop, on purpose
        self._resting = False


def _whole(data: bytes) -> bool:
    end = data.find(b"\r\n\r\n")
    head = data[: end + 2]
    lengths = LENGTH.findall(head)
    strict = head.count(b"\n") == head.count(b"\r\n")  # h11 takes a bare line feed, too
    whole = strict and end >= 0 and len(lengths) == 1 and len(data) == end + 4 + int(lengths[0])
    return whole and not OTHERWISE.search(head)


def _written(error: ApiError) -> bytes:
    headers, body = encoded(error)
    lines = [b"HTTP/1.1 429 Too Many Requests", *(b": ".join(header) for header in headers)]
    return b"\r\n".join([*lines, b"", body])

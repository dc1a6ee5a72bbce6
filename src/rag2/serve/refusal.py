"""The cheapest answer there is: no room. Overload is when it is given most.

It costs a tenth of what the ordinary way costs (an HTTP parser, a task, the guard), so that a
server that is asked ten times as much as it can answer still has its time for answers.
"""

import re

from rag2.serve.app import QUEUED
from rag2.serve.errors import ApiError
from rag2.serve.guard import encoded
from rag2.serve.serving import Serving

HEAD = re.compile(rb"POST ([!-~]{1,200}) HTTP/1\.1\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: ?(\d{1,8})(?=\r\n)", re.IGNORECASE)
# What makes a request more than its head and so many bytes; such ones go the ordinary way.
OTHERWISE = re.compile(rb"\r\n(transfer-encoding|expect|upgrade|connection: ?close)", re.IGNORECASE)


class Refusal:
    """Of requests that have to take their turn, while there is no room for one more."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

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

"""What went wrong, in the shape that OpenAI's clients expect."""

import logging
import sqlite3
import traceback
from collections.abc import Mapping

from rag2.registry import UserError

logger = logging.getLogger(__name__)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error; the message is one line for the client's user."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """The JSON of it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        if self.status >= 500:
            kind = "server_error"
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


def busy(seconds: float) -> ApiError:
    """The queue is full; it may have room after so many seconds."""
    wait = str(max(1, round(seconds)))
    message = f"the server has as many requests as it can take; try again in {wait} s"
    return ApiError(429, message, "queue_full", headers={"retry-after": wait})


def late(seconds: float) -> ApiError:
    """An answer took longer than a request may."""
    return ApiError(408, f"no answer within {seconds:g} s", "deadline_exceeded")


def told(error: Exception) -> ApiError:
    """What a client is told of an exception: a mistake of its own in full, ours without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, " ".join(str(error).split()), "invalid_request")
    log(error, "a request failed")
    return ApiError(500, "the server failed to answer; its log says why", "internal_error")


def log(error: BaseException, what: str) -> None:
    """Write where an exception came from; not what it says, which may repeat a document."""
    said = f": {error}" if isinstance(error, OSError | MemoryError | sqlite3.Error) else ""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    logger.error("%s: %s%s\n%s", what, type(error).__name__, said, frames)


def draining() -> ApiError:
    """The server is shutting down."""
    headers = {"retry-after": "1", "connection": "close"}
    return ApiError(503, "the server is shutting down", "draining", headers=headers)

"""Bytes of a server nobody vouches for -> completions, or one clear line that says what is wrong.

The format is OpenAI's POST /completions, as vLLM speaks it. Nothing is read without a bound.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rag2.registry import UserError

BODY, LINE = 64 << 20, 1 << 20  # bytes of a response, of one event of a stream


class Unavailable(UserError):
    """The generator's server does not answer now, or not as such servers do."""


class Refused(UserError):
    """The server understood a request and does not do it."""


class Wire(BaseModel):
    """What servers add to OpenAI's fields is passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


T = TypeVar("T", bound=Wire)


class Logprobs(Wire):
    """Of each token of a text; None: of the first of all."""

    tokens: list[str] = Field(max_length=1 << 20)
    token_logprobs: list[float | None]

    def pairs(self) -> list[tuple[str, float | None]]:
        """Tokens with their log-probabilities in nats."""
        return list(zip(self.tokens, self.token_logprobs, strict=True))


class Choice(Wire):
    """One text, or a piece of it."""

    index: int = 0
    text: str = ""
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _of_completions(cls, value: Any) -> Any:
        """Other shapes tell as little as none."""
        return value if isinstance(value, dict) and "token_logprobs" in value else None

    @field_validator("logprobs")
    @classmethod
    def _whole(cls, value: Logprobs | None) -> Logprobs | None:
        if value is not None and len(value.tokens) != len(value.token_logprobs):
            raise ValueError("tokens and token_logprobs differ in number")
        return value


class Completion(Wire):
    """A response, or an event of one."""

    choices: list[Choice] = []
    error: Any = None


class Model(Wire):
    """What a server says it serves."""

    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    """tokens of a prompt and its answer (vLLM)"""


class Models(Wire):
    """GET /models."""

    data: list[Model]


def parsed(kind: type[T], body: bytes, where: str) -> T:
    """Raises Unavailable for anything else."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        line = error.errors()[0]
        place = ".".join(map(str, line["loc"]))
        told = f"{where} answers with what is no completion: {place} {line['msg']}"
        raise Unavailable(told[:300]) from None


async def body_of(response: httpx.Response, where: str) -> bytes:
    """All of it. Raises Unavailable for one that is too large or packed."""
    body = bytearray()
    async with aclosing(_raw(response, where)) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > BODY:
                raise Unavailable(f"{where} answers with more than {BODY >> 20} MiB")
    return bytes(body)


async def events(response: httpx.Response, where: str) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events up to [DONE] or the end of the connection."""
    rest, size = b"", 0
    async with aclosing(_raw(response, where)) as pieces:
        async for piece in pieces:
            size += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > LINE or size > BODY:
                raise Unavailable(f"{where} streams lines without end, or too many")
            for line in lines:
                if line.startswith(b"data:"):
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    yield data


async def _raw(response: httpx.Response, where: str) -> AsyncGenerator[bytes, None]:
    """Bytes as they come: what is packed small may be endless, and was not asked for."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Unavailable(f"{where} answers packed, which it was asked not to")
    async with aclosing(response.aiter_raw()) as pieces:  # pyright: ignore[reportArgumentType]
        async for piece in pieces:
            yield piece

"""Prompts -> texts and log-probabilities, by a server with OpenAI's completions (vLLM and others).

It needs POST /completions with a raw text as the prompt, and for scores `echo` with `logprobs`: a
prompt's own tokens come back with their log-probabilities, as lm-evaluation-harness's
local-completions asks for them, too.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx

from rag2.answering.wire import (
    Choice,
    Completion,
    Model,
    Models,
    Refused,
    Unavailable,
    body_of,
    events,
    parsed,
)
from rag2.registry import UserError, nearest

SECONDS = 120.0  # for one request, with all that is waited for
CONNECT = 5.0
PAUSES = (0.2, 0.8)  # seconds before another attempt, where a server is not there or is busy
PROMPTS = 64  # in one request
STOPS = 4  # as many as OpenAI's API takes; the rest is looked for here
PROBE = "Question: Is anybody there?\nAnswer: yes"


@dataclass(frozen=True, slots=True)
class Wanted:
    """How prompts are to be continued."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def body(self) -> dict[str, Any]:
        """The JSON of it; whatever a server's own default is, it is said."""
        said: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        said |= {"top_p": self.top_p, "logprobs": 1}
        if self.stop:
            said["stop"] = list(self.stop[:STOPS])
        if self.temperature > 0:
            said["seed"] = self.seed % 2**63
        return said


class Upstream:
    """A server of one model; everything runs on one event loop."""

    def __init__(self, url: str, model: str = "", key: str = "", seconds: float = SECONDS) -> None:
        """Raises UserError for what is no address and no key."""
        self.url, self.model, self.seconds = url.rstrip("/"), model, seconds
        self.limit: int | None = None
        """tokens of a prompt and its answer; None: it does not say"""
        self.scores = False
        """whether it tells the log-probabilities of a prompt's tokens"""
        if not key.isascii() or not key.isprintable():
            raise UserError("RAG2_GENERATOR_KEY: printable ASCII characters")
        headers = {"accept-encoding": "identity"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        try:
            parts = httpx.URL(self.url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UserError(f"--generator-url {url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"--generator-url {url!r}: an address such as http://localhost:8001/v1")
        if parts.userinfo or parts.query or parts.fragment:
            raise UserError("--generator-url: no user, no query; a key is in RAG2_GENERATOR_KEY")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        timeout = httpx.Timeout(seconds, connect=min(CONNECT, seconds))
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def close(self) -> None:
        """Let go of its connections."""
        await self._client.aclose()

    async def find(self, expected: int) -> Self:
        """Find out which model it serves and what it can do.

        `expected` is the number of tokens that PROBE must have. Raises UserError for an address
        where nobody speaks the API, a model that is not there and one with other tokens.
        """
        found = await self._models()
        if any(model.owned_by == "rag2" for model in found):
            raise UserError(
                f"{self.url} is a rag2 server: its completions are answers from its own documents, "
                "not the generator's; name the server that runs EXPORT/generator"
            )
        names = [model.id for model in found]
        if not self.model:
            if len(names) != 1:
                listed = ", ".join(names[:20]) or "none"
                raise UserError(f"{self.url} serves {listed}: choose by --generator-model")
            self.model = names[0]
        self.limit = next((m.max_model_len for m in found if m.id == self.model), None)
        try:
            self.scores = await self._echoes(expected)
        except Refused as error:
            near = nearest(self.model, names)
            listed = f". It serves {', '.join(names[:20])}.{near}" if names else ""
            raise UserError(f"{self.url}, model {self.model!r}: {error}{listed}") from None
        return self

    async def _models(self) -> list[Model]:
        """What it says it serves; nothing where it does not say and the model's name is given."""
        try:
            async with self._asked("GET", "/models") as response:
                return parsed(Models, await body_of(response, self.url), self.url).data
        except UserError:
            if not self.model:
                raise
            return []

    async def _echoes(self, expected: int) -> bool:
        """Whether it scores prompts; raises Refused where it does not even write."""
        asked = {"prompt": PROBE, "echo": True} | Wanted(max_tokens=1).body()
        try:
            (choice,) = await self._complete(asked, 1)
        except Refused:
            await self.write([PROBE], Wanted(max_tokens=1))
            return False
        told = [] if choice.logprobs is None else choice.logprobs.token_logprobs
        if len(told) <= 1:
            return False
        if len(told) not in (expected, expected + 1):
            raise UserError(
                f"{self.url} cuts {PROBE!r} into other tokens than this export's tokenizer, which "
                f"makes {expected} of it: {self.model!r} is not its generator"
            )
        return True

    async def write(self, prompts: Sequence[str], wanted: Wanted) -> list[Choice]:
        """A continuation of each prompt, in one request for up to PROMPTS of them."""
        found: list[Choice] = []
        for start in range(0, len(prompts), PROMPTS):
            some = list(prompts[start : start + PROMPTS])
            # A list of one is a text: some servers take nothing else.
            body = {"prompt": some if len(some) > 1 else some[0]} | wanted.body()
            found += await self._complete(body, len(some))
        return found

    async def stream(self, prompt: str, wanted: Wanted, tell: Callable[[Choice], bool]) -> None:
        """The continuation in pieces, until `tell` wants no more or it is finished.

        Raises Unavailable where it ends before.
        """
        body = {"model": self.model, "prompt": prompt, "stream": True} | wanted.body()
        async with self._asked("POST", "/completions", body) as response:
            async with aclosing(events(response, self.url)) as stream:
                async for data in stream:
                    event = parsed(Completion, data, self.url)
                    if event.error is not None:
                        raise Unavailable(f"{self.url} failed: {_line(event.error)}")
                    for choice in event.choices:
                        if not tell(choice) or choice.finish_reason is not None:
                            return
        raise Unavailable(f"{self.url} broke off in the middle of an answer")

    async def logps(
        self, texts: Sequence[str], lengths: Sequence[tuple[int, int]]
    ) -> list[list[tuple[str, float]]]:
        """The last tokens of each text with their log p given all before, in nats.

        `lengths` are the tokens of each text before them, and theirs. Raises Unavailable where the
        server cuts a text into other tokens.
        """
        found: list[list[tuple[str, float]]] = []
        for start in range(0, len(texts), PROMPTS):
            some = list(texts[start : start + PROMPTS])
            asked: dict[str, Any] = {"prompt": some if len(some) > 1 else some[0], "echo": True}
            # One token more: few servers take 0.
            choices = await self._complete(asked | Wanted(max_tokens=1).body(), len(some))
            for choice, (before, own) in zip(choices, lengths[start:], strict=False):
                pairs = [] if choice.logprobs is None else choice.logprobs.pairs()
                row = [(token, p) for token, p in pairs[before : before + own] if p is not None]
                if len(pairs) - before - own not in (0, 1) or len(row) != own:
                    raise Unavailable(f"{self.url} has other tokens than this export's tokenizer")
                found.append(row)
        return found

    async def _complete(self, body: dict[str, Any], count: int) -> list[Choice]:
        """So many choices in the order of their prompts."""
        async with self._asked("POST", "/completions", {"model": self.model} | body) as response:
            found = parsed(Completion, await body_of(response, self.url), self.url)
        choices = sorted(found.choices, key=lambda choice: choice.index)
        if [choice.index for choice in choices] != list(range(count)):
            raise Unavailable(f"{self.url} answers {len(choices)} of {count} prompts")
        return choices

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A good response, yet unread. Whatever fails, here or while it is read, is one line."""
        try:
            async with asyncio.timeout(self.seconds):
                response = await self._sent(method, path, body)
                try:
                    if response.status_code != 200:
                        raise await self._failure(response, path)
                    yield response
                finally:
                    await response.aclose()
        except TimeoutError:
            raise Unavailable(f"{self.url} does not answer within {self.seconds:g} s") from None
        except httpx.TimeoutException as error:
            raise Unavailable(f"{self.url} does not answer: {type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} does not answer: {_line(error)}") from None

    async def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """The response to a request; those that nobody took are sent again, twice."""
        for pause in (*PAUSES, None):
            request = self._client.build_request(method, self.url + path, json=body)
            try:
                response = await self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if pause is None:
                    raise
            else:
                if response.status_code not in (429, 503) or pause is None:
                    return response
                await response.aclose()
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _failure(self, response: httpx.Response, path: str) -> UserError:
        """What a status says."""
        status = response.status_code
        if status in (401, 403):
            return Unavailable(f"{self.url} refuses the key ({status}): set RAG2_GENERATOR_KEY")
        if path == "/models" and 300 <= status < 500 and status not in (408, 429):
            told = f"{self.url}/models answers {status}: no such API there"
            return UserError(f"{told}; an address usually ends in /v1")
        said = (await body_of(response, self.url))[:2000].decode("utf-8", "replace")
        if status in (400, 404, 413, 422, 501):
            return Refused(f"the generator's server refuses: {_line(said)}")
        return Unavailable(f"{self.url} answers {status}: {_line(said)}")


def _line(said: object) -> str:
    """The beginning, in one line."""
    return " ".join(str(said).split())[:200] or type(said).__name__

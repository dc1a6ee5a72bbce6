"""Answers -> the JSON of OpenAI's API, with what it has no place for beside it."""

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from starlette.responses import Response

from rag2.answering.ask import Answer, Citation, Place
from rag2.answering.text import BROKEN
from rag2.serve.work import Work

LOWEST = -9999.0  # what OpenAI writes for a log-probability of nothing


class Reply(Response):
    """JSON that every reader reads alike."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of it."""
        return encode(content)


def encode(content: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def event(content: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(content) + b"\n\n"


class Head:
    """What every piece of one response begins with."""

    def __init__(self, kind: str, prefix: str, model: str) -> None:
        self.kind = kind
        self.id, self.created, self.model = f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model

    def of(self, place: Place | None, chunk: bool = False, **more: Any) -> dict[str, Any]:
        """The response or one piece of it."""
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        said = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if place is not None:
            said["system_fingerprint"] = str(place)
        return {**said, **more}


def where(place: Place) -> dict[str, Any]:
    """Which state answered."""
    return asdict(place)


def cited(answer: Answer) -> list[dict[str, Any]]:
    """The chunks that were read."""
    return [asdict(citation) for citation in answer.citations]


def annotations(answer: Answer) -> list[dict[str, Any]]:
    """Those that did more for the answer than an equal share, in OpenAI's shape, the best first."""
    shares = [(c.posterior, c) for c in answer.citations if c.posterior is not None]
    told = [(p, c) for p, c in shares if p * len(shares) >= 1 or len(shares) == 1]
    if not shares:  # read in one prompt: nothing tells them apart
        told = [(0.0, citation) for citation in answer.citations]
    told.sort(key=lambda pair: -pair[0])
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "start_index": 0,
                "end_index": len(answer.text),
                "url": address(citation),
                "title": citation.title or citation.document,
            },
        }
        for _, citation in told
    ]


def address(citation: Citation) -> str:
    """Where the server shows the document, with the characters (RFC 5147)."""
    name = citation.namespace
    where = f"?namespace={quote(name, safe='')}" if name else ""
    place = f"#char={citation.start},{citation.end}"
    return f"/v1/documents/{quote(citation.document, safe='')}{where}{place}"


def made(work: Work, answer: Answer, total: float) -> dict[str, Any]:
    """What is told of the making of an answer."""
    first = total if work.first is None else work.first
    seconds = {"retrieve": work.searched, "first_token": first, "total": total}
    rounded = {name: round(value, 6) for name, value in seconds.items()}
    logp = finite(answer.logp)
    return {**where(answer.place), "logp": logp, "dropped": answer.dropped, "seconds": rounded}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens; those of a prompt count for each chunk that it was read with, and once for all n."""
    prompt = answers[0].prompt_tokens
    written = sum(len(answer.tokens) for answer in answers)
    total = prompt + written
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": total}


def chat_logprobs(answer: Answer) -> dict[str, Any]:
    """Of each token, in chat's shape."""
    content = [
        {"token": token, "logprob": finite(logp), "bytes": _bytes(token), "top_logprobs": []}
        for token, logp in zip(answer.tokens, answer.logps, strict=True)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(answer: Answer) -> dict[str, Any]:
    """Of each token, in completions' shape."""
    logps = [finite(logp) for logp in answer.logps]
    starts = _starts(answer.text, answer.tokens)
    told = {"tokens": list(answer.tokens), "token_logprobs": logps, "text_offset": starts}
    return {**told, "top_logprobs": None}


def _bytes(token: str) -> list[int] | None:
    """Of a token's text; none of a part of a character, which has no text of its own."""
    return None if BROKEN in token else [*token.encode()]


def _starts(text: str, tokens: Sequence[str]) -> list[int]:
    """Where in the text each token begins; the parts of a character at that character."""
    starts, at = [], 0
    for token in tokens:
        shown = token if starts else token.lstrip()  # a text begins without white space
        found = -1 if BROKEN in token else text.find(shown, at)
        starts.append(max(at, found))
        at = at if found < 0 else found + len(shown)
    return starts


def finite(logp: float) -> float:
    """A log-probability that JSON has a number for."""
    return logp if math.isfinite(logp) else LOWEST

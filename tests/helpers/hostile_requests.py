"""Requests that nobody should send: valid ones with a mistake or three, as bytes."""

import json
import random
from typing import Any
from urllib.parse import quote

import h11

from wire import TOKEN

TYPES = (
    "application/json", "application/json; charset=utf-16", "text/plain", "text/html", "",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data",
    "application/vnd.api+json", "application/octet-stream", "application/xml", "a/b/c", "\x01",
    "application/json;" * 50, "image/png",
)  # fmt: skip
METHODS = (
    "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get", "CONNECT",
)  # fmt: skip
CONSTANTS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "-0", "0.1e-400", "1E400",
    "9223372036854775808", "-9223372036854775809", "2147483648", "1e308", "true", "null", "\"\"",
    "[]", "{}", "0", "-1", "1.5", "\"\\ud800\"", "\"\\udfff\\ud800\"", "\"\\u0000\"", "\"\\x\"",
    "\"\u202e\U0001f600\"", "\"" + "a" * 70000 + "\"", "[" * 2000 + "]" * 2000, "'single'", "",
    "[" * 100000, "{\"a\":" * 3000 + "1" + "}" * 3000, "[[],[]]", "{\"a\":1,\"a\":2}", "\"\t\"",
    "\"\\u2028\ufeff\"", "\" \"", "\"\\n\"", "[null]", "[[\"a\"]]", "[0]", "{\"text\":\"a\"}",
)  # fmt: skip
NAMES = ("%00", "%ff%fe", "%ed%a0%80", "..%2f..", "a" * 600, "%F0%9F%98%80", "a%20b", "//", "%", "")
QUERIES = (
    "limit=0", "limit=-1", "limit=99999999999999999999", "limit=1e3", "limit=NaN", "after=%00",
    "limit=1&limit=2", "namespace=%ff", "namespace=" + "n" * 600, "after=%ed%a0%80", "&&&=", "%",
    "limit=%F0%9F%98%80", "limit=", "x" * 5000, "namespace=a;b", "limit=+1", "limit= 1", "\x00",
)  # fmt: skip
HEADERS = (
    "content-length: 5", "content-length: -1", "content-length: 99999999", "x: " + "y" * 20000,
    "content-length: 1, 1", "transfer-encoding: chunked", "transfer-encoding: gzip, chunked",
    "expect: 100-continue", "expect: nothing", "host: y", "connection: close", "upgrade: websocket",
    "connection: upgrade\r\nupgrade: h2c", "content-encoding: gzip", "cookie: " + "a=b;" * 500,
    "authorization: Basic abc", "authorization: Bearer \xe4", "authorization:", ": empty",
    "no colon", "range: bytes=0-1", "if-none-match: *", "x\x00y: z", "accept: application/xml",
    "te: trailers", " folded: 1", "content-length: 0x10", "origin: null",
)  # fmt: skip


def seeds() -> list[tuple[str, str, Any]]:
    """A valid request for every endpoint: method, target, body."""
    question, options = "What does Lasur Haven mainly export?", {"k": 2, "reading": "marginal"}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    common = {"max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "rag2": options}
    passages = ["Wax is sold.", {"text": "Salt is not."}]
    documents = [{"id": "fuzz", "text": "It is foggy.", "title": "Fog", "metadata": {"a": [1.5]}}]
    return [
        ("POST", "/v1/chat/completions", {"messages": turns, "stop": ["."], **common}),
        ("POST", "/v1/chat/completions", {"messages": turns, "stream": True, "n": 2, **common}),
        ("POST", "/v1/completions", {"prompt": question, "stop": "x", "logprobs": 1, **common}),
        ("POST", "/v1/retrieve", {"query": question, "k": 2, "namespaces": [""]}),
        ("POST", "/v1/rerank", {"query": question, "documents": passages, "top_n": 1}),
        ("POST", "/rerank", {"query": question, "documents": ["a"], "return_documents": True}),
        ("POST", "/v1/score", {"question": question, "choices": ["wax", "salt"], "k": 1}),
        ("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
        ("POST", "/v1/documents", {"documents": documents, "namespace": "f"}),
        ("DELETE", "/v1/documents/fuzz?namespace=f", None),
        ("GET", "/v1/documents?limit=3&after=a&namespace=", None),
        ("GET", "/v1/documents/fuzz?namespace=f", None),
        ("GET", "/v1/models", None), ("GET", "/v1/models/m", None), ("GET", "/health", None),
        ("GET", "/ready", None), ("GET", "/metrics", None), ("GET", "/openapi.json", None),
        ("GET", "/", None), ("GET", "/docs", None), ("GET", "/page/../app.py", None),
    ]  # fmt: skip


def hostile(dice: random.Random) -> bytes:
    """One request, seldom a valid one."""
    method, target, body = dice.choice(seeds())
    if dice.random() < 0.1:
        method = dice.choice(METHODS)
    text = "" if body is None else json.dumps(body)
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3)) if body is not None else 0):
        text = _with_a_mistake(text, dice)
    if body is None and dice.random() < 0.2:
        text = dice.choice(CONSTANTS)
    data = text.encode("utf-8", "surrogatepass")
    if dice.random() < 0.1 and data:
        at = dice.randrange(len(data))
        data = data[:at] + dice.randbytes(dice.randrange(1, 6)) + data[at + dice.randrange(4) :]
    wire = _framed(method, _target(target, dice), data, dice)
    for _ in range(dice.choice((0, 0, 0, 0, 0, 1, 2))):
        wire = _damaged(wire, dice)
    if dice.random() < 0.05:  # one behind the other
        wire += _framed("GET", "/health", b"", dice)
    return wire


def answered(wire: bytes) -> int:
    """How many responses a server owes, at least: one for a complete request or a mistake."""
    server, complete = h11.Connection(h11.SERVER, 16 << 10), 0
    try:
        server.receive_data(wire)
        while True:
            event = server.next_event()
            if event in (h11.NEED_DATA, h11.PAUSED) or isinstance(event, h11.ConnectionClosed):
                return complete
            if isinstance(event, h11.EndOfMessage):
                return complete + 1  # what comes after it may be cut by an early end
    except h11.RemoteProtocolError:
        return complete + 1


def _with_a_mistake(text: str, dice: random.Random) -> str:
    """A JSON text with one of its values or keys replaced, removed, doubled or nested."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict) or not value or dice.random() < 0.05:
        return dice.choice(CONSTANTS)
    places: list[tuple[Any, Any]] = []
    _places(value, places)
    holder, key = dice.choice(places)
    kind = dice.randrange(6)
    mark = "\x00mark\x00"
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
        return json.dumps(value)
    if kind == 1 and isinstance(holder, dict):
        holder[dice.choice(("", "tools", "k" * 300, "\ud800", "response_format"))] = holder.pop(key)
        return json.dumps(value)
    if kind == 2:
        holder[key] = [holder[key]] * dice.choice((0, 2, 70, 300))
        return json.dumps(value)
    if kind == 3 and isinstance(holder[key], str):
        holder[key] *= dice.choice((0, 3, 2000))
        return json.dumps(value)
    if isinstance(holder[key], int | float) and kind == 4:
        holder[key] = dice.choice((-1, 0, 1, 65, 2**31, 2**63, -(2**63) - 1, 1e308, 4097, 0.5))
        return json.dumps(value)
    holder[key] = mark
    return json.dumps(value).replace(json.dumps(mark), dice.choice(CONSTANTS), 1)


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    """Every (holder, key) in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _places(value[key], found)


def _target(target: str, dice: random.Random) -> str:
    path, _, query = target.partition("?")
    if dice.random() < 0.15:
        path = path.rsplit("/", 1)[0] + "/" + dice.choice(NAMES)
    if dice.random() < 0.15:
        query = dice.choice(QUERIES)
    if dice.random() < 0.03:
        path = dice.choice(("*", "http://x/health", "", "health", quote("/\U0001f600"), "/v1"))
    return path + ("?" + query if query else "")


def _framed(method: str, target: str, data: bytes, dice: random.Random) -> bytes:
    kind = "application/json" if dice.random() < 0.8 else dice.choice(TYPES)
    lines = [f"{method} {target} HTTP/1.{dice.choice('11111110')}", "host: localhost"]
    lines += [f"content-type: {kind}"] * bool(kind)
    if dice.random() < 0.8:
        lines.append(f"authorization: Bearer {TOKEN}")
    if dice.random() < 0.15:
        lines.insert(dice.randrange(1, len(lines) + 1), dice.choice(HEADERS))
    if data and dice.random() < 0.15:
        lines.append("transfer-encoding: chunked")
        cut = dice.randrange(len(data))
        parts = [part for part in (data[:cut], data[cut:]) if part]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        data = chunks + b"0\r\n\r\n"
    else:
        lines.append(f"content-length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + data


def _damaged(wire: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(max(len(wire), 1))
    end = min(len(wire), at + dice.randrange(1, 40))
    return dice.choice((
        wire[:at],
        wire[:at] + wire[end:],
        wire[:at] + wire[at:end] * 2 + wire[end:],
        wire[:at] + dice.randbytes(1) + wire[at + 1 :],
        wire[:at] + dice.choice((b"\r\n", b"\x00", b"\xff", b"\n\n", b" ")) + wire[at:],
        dice.randbytes(dice.randrange(1, 200)),
    ))  # fmt: skip

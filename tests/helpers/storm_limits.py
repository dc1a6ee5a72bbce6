"""Requests beyond every limit, and clients that are too slow: what a server makes of them."""

import random
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from wire import Got, Reader, chat, check_error, connected, exchange, request

Case = tuple[str, bytes, set[int]]
MIB = 1 << 20


def numbers() -> list[Case]:
    """Every number of every body at its bounds (not refused as such) and beyond (422)."""
    asked = {"messages": [{"role": "user", "content": "Who?"}]}
    bounds: list[tuple[str, dict[str, Any], str, float, float]] = [
        ("/v1/chat/completions", asked, "temperature", 0, 2),
        ("/v1/chat/completions", asked, "top_p", 0.01, 1),
        ("/v1/chat/completions", asked, "max_tokens", 1, 4096),
        ("/v1/chat/completions", asked, "max_completion_tokens", 1, 4096),
        ("/v1/chat/completions", asked, "seed", -(10**19), 10**19),
        ("/v1/chat/completions", asked, "n", 1, 8),
        ("/v1/chat/completions", asked, "rag2.k", 0, 64),
        ("/v1/completions", {"prompt": "Who?"}, "logprobs", 0, 5),
        ("/v1/retrieve", {"query": "Who?"}, "k", 1, 64),
        ("/v1/rerank", {"query": "Who?", "documents": ["a"]}, "top_n", 1, 256),
        ("/v1/score", {"question": "Who?", "choices": ["a"]}, "k", 0, 64),
        ("/v1/embeddings", {"input": "Who?"}, "dimensions", 1, 1 << 20),
    ]
    cases: list[Case] = []
    for path, body, key, low, high in bounds:
        whole = key in ("seed", "n") or "token" in key or key in ("k", "rag2.k")
        below, above = (low - 1, high + 1) if whole else (low - 1.0, high + 0.001)
        beyond: list[Any] = [below, above, 2**31 * 2**40, -(2**70), 1e308, "1", True, [1], {}]
        cases += [(f"{key}={v!r}", _numbered(path, body, key, v), {422}) for v in beyond]
        # At a bound it may be more than this model has room for, or another dimension: said so.
        cases += [
            (f"{key}={v!r}", _numbered(path, body, key, v), {200, 400, 422}) for v in (low, high)
        ]
        spelled = ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000)
        cases += [
            (
                f"{key}={text[:9]}",
                _numbered(path, body, key, "mark").replace(b'"mark"', text.encode()),
                {422},
            )
            for text in spelled
        ]
    return [(name, _measured(data), allowed) for name, data, allowed in cases]


def bombs() -> list[Case]:
    """Bodies that are small to send and large to read."""
    texts = {
        "100,000 deep": "[" * 100_000 + "]" * 100_000,
        "100,000 objects deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "65 deep": "[" * 65 + "]" * 65,
        "460,000 keys": "{"
        + ",".join(f'"{n:x}":0' for n in range(460_000))[: 4 * MIB - 10]
        + '":0}',
        "1,000,000 keys": "{" + ",".join(f'"{n:x}":0' for n in range(1_000_000)) + "}",
        "1,000,000 elements": '{"input":[' + ",".join("0" * 1_000_000) + "]}",
        "1,000,000 empty lists": "[" + ",".join(["[]"] * 1_000_000) + "]",
        "4 MiB of open quotes": '"\\' * (2 * MIB - 2),
        "4 MiB of escapes": '"' + "\\ud800" * 699_000 + '"',
        "a number of 4 MiB": "1" * (4 * MIB - 8),
        "an exponent of 4 MiB": "1e" + "9" * (4 * MIB - 8),
    }
    made = [(name, text.encode()) for name, text in texts.items()]
    return [(name, request("POST", "/v1/embeddings", data), {413, 422}) for name, data in made]


def sizes() -> list[Case]:
    """Headers, paths and bodies that are too long, with and without a told length."""
    large = b'{"query": "' + b"a" * (5 * MIB) + b'"}'
    chunk = b"%x\r\n%s\r\n" % (1 << 16, b"a" * (1 << 16))
    head = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return [
        ("headers of 17 KiB", request("GET", "/health", headers={"x": "y" * (17 << 10)}), {431}),
        ("headers of 17 KiB, many", request("GET", "/health", headers={
            f"x{n}": "y" * 100 for n in range(170)}), {431}),
        ("headers of 1 MiB", request("GET", "/health", headers={"x": "y" * MIB}), {431}),
        ("a path of 17 KiB", request("GET", "/" + "a" * (17 << 10)), {431}),
        ("headers of 15 KiB", request("GET", "/health", headers={"x": "y" * (15 << 10)}), {200}),
        ("5 MiB, told", request("POST", "/v1/retrieve", large), {413}),
        ("5 MiB in chunks", head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 80, {413}),
        ("told 1e15, sent little", head + b"content-length: 1000000000000000\r\n\r\n{", {413}),
    ]  # fmt: skip


def beyond(
    address: str,
    cases: list[Case],
    memory: Callable[[], int] = lambda: 0,
    loop: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:
    """What each case got: its status, seconds, growth of memory in bytes, and what is wrong.

    `loop` tells the time of the server's event loop.
    """
    results = []
    for name, data, allowed in cases:
        before, began = memory(), loop()
        got = exchange(address, data)
        seconds, wrong = loop() - began, ""
        if got is None or got.status not in allowed:
            wrong = f"got {got and got.status}, wanted {sorted(allowed)}"
        elif got.status >= 400:
            check_error(got)
        results.append({
            "case": name, "status": got and got.status, "seconds": round(seconds, 4),
            "grown": memory() - before, "wrong": wrong,
        })  # fmt: skip
    return results


class Slow(threading.Thread):
    """Connections that do not do their part; `closed` says after how many seconds each ended."""

    def __init__(self, address: str, count: int, seed: int, longest: float) -> None:
        super().__init__(daemon=True)
        self.address, self.count, self.longest = address, count, longest
        self.dice = random.Random(seed)
        self.closed: list[tuple[str, float]] = []
        self.left: list[str] = []

    def run(self) -> None:
        """Open them all, drip, and watch which are closed, until none is left."""
        kinds = ("deaf", *("silent", "headers", "body", "chunks") * 2)
        lines: dict[socket.socket, tuple[str, float, float]] = {}
        for number in range(self.count):
            kind = kinds[number % len(kinds)]
            line = connected(self.address, receive=4096 if kind == "deaf" else None)
            began = time.monotonic()
            line.sendall(_beginning(kind))
            lines[line] = (kind, began, began)
        end = time.monotonic() + self.longest
        while lines and time.monotonic() < end:
            time.sleep(0.05)
            for line, (kind, began, last) in list(lines.items()):
                now = time.monotonic()
                if now - last > 0.5 and kind in ("headers", "body", "chunks"):
                    lines[line] = (kind, began, now)
                    if not _dripped(line, kind):
                        self._note(lines, line)
                        continue
                if _ended(line, kind):
                    self._note(lines, line)
        self.left = [kind for kind, _, _ in lines.values()]
        for line in lines:
            line.close()

    def _note(self, lines: dict[Any, tuple[str, float, float]], line: socket.socket) -> None:
        kind, began, _ = lines.pop(line)
        self.closed.append((kind, time.monotonic() - began))
        line.close()


def healthy(address: str, seconds: float, question: str = "Who?") -> list[float]:
    """Seconds that each of a row of good requests took; AssertionError for any that failed."""
    took, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        got = exchange(address, chat(question, max_tokens=1))
        assert got is not None and got.status == 200, got
        took.append(time.monotonic() - began)
        time.sleep(0.02)
    return took


def pipelined(address: str) -> list[Got]:
    """Three requests at once on one connection: their responses, in order."""
    with connected(address) as line:
        line.sendall(b"".join(request("GET", path) for path in ("/health", "/none", "/ready")))
        reader = Reader(line)
        return [got for _ in range(3) if (got := reader.next("GET"))]


def _numbered(path: str, body: dict[str, Any], key: str, value: Any) -> bytes:
    outer, _, inner = key.partition(".")
    return request("POST", path, body | {outer: {inner: value} if inner else value})


def _measured(data: bytes) -> bytes:
    """The request with the length that its body has."""
    head, body = data.split(b"\r\n\r\n", 1)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])


def _beginning(kind: str) -> bytes:
    """What a slow client sends at once."""
    post = b"POST /v1/retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return {
        "silent": b"",
        "headers": b"GET /health HTTP/1.1\r\nhost: localhost\r\n",
        "body": post + b'content-length: 1000\r\n\r\n{"query": "',
        "chunks": post + b"transfer-encoding: chunked\r\n\r\n",
        "deaf": request("GET", "/openapi.json") * 120,  # MiB, one after another
    }[kind]


def _dripped(line: socket.socket, kind: str) -> bool:
    """Whether a little more could be sent."""
    drop = {"headers": b"x: y\r\n", "body": b"a", "chunks": b"1\r\na\r\n"}[kind]
    try:
        line.sendall(drop)
    except OSError:
        return False
    return True


def _ended(line: socket.socket, kind: str) -> bool:
    """Whether the server has closed it; a deaf client only hears that it was reset."""
    if kind == "deaf":
        poll = select.poll()
        poll.register(line, 0)  # errors and hang-ups only
        return bool(poll.poll(0))
    readable, _, _ = select.select([line], [], [], 0)
    if not readable:
        return False
    try:
        return not line.recv(1 << 16)
    except OSError:
        return True


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of them."""
    wrong = [f"{item['case']}: {item['wrong']}" for item in results if item["wrong"]]
    slowest = max(results, key=lambda item: item["seconds"])
    largest = max(results, key=lambda item: item["grown"])
    return {
        "cases": len(results), "wrong": wrong,
        "longest": [slowest["case"], slowest["seconds"]],
        "largest": [largest["case"], round(largest["grown"] / MIB, 1)],
    }  # fmt: skip

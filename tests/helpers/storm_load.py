"""More requests than a server can answer, and what becomes of those that it takes."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

MOST = 900  # connections at once


@dataclass(slots=True)
class Told:
    """What a load got, in seconds: of answers and of refusals."""

    statuses: Counter[int] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    """from the first request to the last, without the time in which the rest was answered"""
    within: int = 0
    """answers that came in that time"""
    late: float = 0.0
    """how far the load fell behind its plan, at worst"""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.within / self.seconds


class Lines:
    """Connections that are used again; a new one where all are busy."""

    def __init__(self, address: str) -> None:
        self.host, self.port = address.removeprefix("http://").split(":")
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.count = 0

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        """Status and head of the response; its body is read and forgotten."""
        if self.idle:
            line = self.idle.pop()
        else:
            self.count += 1
            line = await asyncio.open_connection(self.host, int(self.port), limit=1 << 22)
        reader, writer = line
        try:
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            told = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            await reader.readexactly(int(told))
        except BaseException:
            self.count -= 1
            writer.close()
            raise
        if b"connection: close" in head.lower():
            self.count -= 1
            writer.close()
        else:
            self.idle.append(line)
        return int(head[9:12]), head

    def close(self) -> None:
        """All of them."""
        for _, writer in self.idle:
            writer.close()


async def one(lines: Lines, data: bytes, told: Told, end: float) -> None:
    """Ask once and note what came."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(90):
            status, head = await lines.ask(data)
    except (OSError, TimeoutError, EOFError) as error:
        told.wrong[type(error).__name__] += 1
        return
    now = time.monotonic()
    told.statuses[status] += 1
    if status == 200:
        told.answered.append(now - began)
        told.within += now <= end
    elif status == 429:
        told.refused.append(now - began)
        if b"retry-after: " not in head:
            told.wrong["429 without retry-after"] += 1
    else:
        told.wrong[f"status {status}"] += 1


async def closed_loop(
    address: str, asks: Callable[[], bytes], clients: int, seconds: float
) -> Told:
    """Clients that ask again as soon as they are answered: what it gets is the capacity."""
    told, lines, began = Told(), Lines(address), time.monotonic()
    end = began + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await one(lines, asks(), told, end)

    await asyncio.gather(*(client() for _ in range(clients)))
    told.seconds = seconds
    lines.close()
    return told


async def open_loop(
    address: str, asks: Callable[[], bytes], rate: float, seconds: float, seed: int
) -> Told:
    """Requests at random times (Poisson), however many are not answered yet."""
    told, lines, dice = Told(), Lines(address), random.Random(seed)
    began = time.monotonic()
    due, end, running = began, began + seconds, set[asyncio.Task[None]]()
    while due < end:
        due += dice.expovariate(rate)
        wait = due - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        told.late = max(told.late, -wait)
        if len(running) >= MOST:
            told.wrong["no connection left to ask on"] += 1
            continue
        task = asyncio.create_task(one(lines, asks(), told, end))
        running.add(task)
        task.add_done_callback(running.discard)
    told.seconds = time.monotonic() - began
    if running:
        await asyncio.wait(running)
    lines.close()
    return told


def shares(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest, in milliseconds."""
    if not values:
        return {}
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    made = {"median": statistics.median(ordered), "p99": p99, "max": ordered[-1]}
    return {name: round(value * 1000, 1) for name, value in made.items()}


def taking_turns(requests: list[bytes]) -> Callable[[], bytes]:
    """One after another, for ever."""

    def turns() -> Iterator[bytes]:
        while True:
            yield from requests

    return turns().__next__


def described(told: Told) -> dict[str, Any]:
    """As JSON."""
    return {
        "rate": round(told.rate, 1), "asked": sum(told.statuses.values()),
        "statuses": {str(status): count for status, count in sorted(told.statuses.items())},
        "answered_ms": shares(told.answered), "refused_ms": shares(told.refused),
        "wrong": dict(told.wrong), "late": round(told.late, 3),
    }  # fmt: skip

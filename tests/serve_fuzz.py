"""Random hostile requests, as bytes, to every endpoint of a server; what it must not do is counted.

    python tests/serve_fuzz.py EXPORT --requests 20000 --seed 7
    python tests/serve_fuzz.py EXPORT --requests 2000 --fault "stock errors"

A finding is a status of 500 or more (503 of /ready excepted), an error that is not in OpenAI's
shape, a complete request without a response, a process that ended, a line in its log, memory that
grew by more than 5 % since the first fifth. `--fault` plants a mistake, which must be found. The
last line is JSON; exit 1 if there is a finding.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

import h11

from hostile_requests import answered, hostile
from serve_faults import FAULTS
from server_process import ServerProcess
from wire import Got, Reader, check_error, connected

STREAMS = 4  # connections at once


def finding(wire: bytes, got: Got | None, owed: int) -> str:
    """What is wrong with a response; empty: nothing."""
    if got is None:
        return "no response" if owed else ""
    if got.status >= 500 and not (got.status == 503 and b" /ready" in wire.split(b"\r\n")[0]):
        return f"status {got.status}"
    if got.status >= 400 and not wire.startswith(b"HEAD"):
        try:
            check_error(got)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            return f"status {got.status}, no error of OpenAI's: {error}"[:300]
    if got.headers.get("content-type") == "text/event-stream":
        if not (got.body.endswith(b"data: [DONE]\n\n") or b'data: {"error"' in got.body):
            return "a stream without an end"
    elif got.headers.get("content-type") == "application/json" and got.body:
        got.json  # noqa: B018 (raises ValueError)
    return ""


def tried(address: str, number: int, seed: int) -> tuple[str, int]:
    """One request by its number: what is wrong, and the status (0: no response)."""
    wire = hostile(random.Random(f"{seed} {number}"))
    owed = answered(wire)
    head = wire.startswith(b"HEAD")
    with connected(address, 20 if owed else 0.02) as line:
        try:
            line.sendall(wire)
        except (ConnectionError, TimeoutError):
            pass  # it may have answered before it closed
        try:
            got = Reader(line).next("HEAD" if head else "POST")
        except TimeoutError:
            got = None
        except h11.RemoteProtocolError as error:
            return f"no HTTP: {error}", 0
    wrong = finding(wire, got, owed)
    return wrong, got.status if got else 0


def fuzz(address: str, numbers: range, seed: int) -> tuple[Counter[int], list[dict[str, Any]]]:
    """Statuses, and findings with the request that made them."""
    statuses, found = Counter[int](), list[dict[str, Any]]()

    def one(number: int) -> tuple[int, str, int]:
        try:
            return number, *tried(address, number, seed)
        except OSError as error:
            return number, f"{type(error).__name__}: {error}", 0

    with ThreadPoolExecutor(STREAMS) as pool:
        for number, wrong, status in pool.map(one, numbers):
            statuses[status] += 1
            if wrong:
                wire = hostile(random.Random(f"{seed} {number}"))
                found.append({"number": number, "wrong": wrong, "request": repr(wire[:400])})
    return statuses, found


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--fault", choices=FAULTS)
    given = parser.parse_args(argv)
    began, warm = time.monotonic(), given.requests // 5
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess(given.export, Path(folder) / "state", given.fault).ready() as server,
    ):
        statuses, found = fuzz(server.address, range(warm), given.seed)
        before = server.bytes()
        more, others = fuzz(server.address, range(warm, given.requests), given.seed)
        statuses, found = statuses + more, found + others
        grown = server.bytes() / before - 1
        ended = server.process.poll()
        log = server.logged()
    for item in found[:20]:
        print(json.dumps(item))  # noqa: T201 (the command's output)
    result = {
        "seed": given.seed, "requests": given.requests, "fault": given.fault,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "findings": len(found), "ended": ended, "log": log[-1500:],
        "memory_MiB": before >> 20, "grown": round(grown, 4),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(json.dumps(result))  # noqa: T201
    return int(bool(found or log or ended is not None or grown > 0.05))


if __name__ == "__main__":
    raise SystemExit(main())

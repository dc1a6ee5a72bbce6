"""What a server endures, one storm after another, each with figures of its own.

    python tests/serve_storm.py EXPORT limits slow overload leave swaps neighbours poison
    python tests/serve_storm.py EXPORT ends --times 20
    python tests/serve_storm.py EXPORT kills --times 10
    python tests/serve_storm.py EXPORT swaps --times 20 --fault "late name"

limits      every number at its bounds and beyond, JSON bombs, headers and bodies that are too long
slow        300 sockets that drip, or do not read; healthy requests meanwhile
overload    a closed loop for the capacity, then ten times as much in an open loop
leave       clients that are gone while they wait, while they are read, while they are answered
swaps       edits and new generations under load; each answer is checked against its version
neighbours  answers among others against answers alone
poison      requests that cannot be searched, read or continued, among good ones
ends        SIGTERM under load
kills       SIGKILL in the middle of edits, and the next start

EXPORT is what `rag2 export` wrote. `--questions` is a file of questions, JSONL; without one they
are about titles of the export's documents. Each prints a line of JSON; exit 1 if something is
wrong. `--fault` plants a mistake, which must be found.
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

import storm_limits
from serve_faults import FAULTS
from server_process import ServerProcess
from storm_answers import leave, neighbours, poisoned, swapped
from storm_ends import killed, terminated
from storm_load import closed_loop, described, open_loop, taking_turns
from wire import asked, chat, exchange

FORGETFUL = f"remembered={1 << 20}"  # what is remembered on purpose is no leak


class Storm:
    """What every storm is given."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.export, self.fault, self.seed = given.export, given.fault, given.seed
        self.times, self.folder, self.asked = given.times, folder, given.questions
        self.questions: list[str] = []
        if given.questions:
            lines = given.questions.read_text(encoding="utf-8").splitlines()
            self.questions = [json.loads(line)["question"] for line in lines][:400]

    def server(self, **more: Any) -> ServerProcess:
        """A fresh one, ready and warm."""
        state = self.folder / secrets.token_hex(4)
        server = ServerProcess(self.export, state, self.fault, **more).ready()
        if not self.questions:
            listed = asked(server.address, "GET", "/v1/documents?limit=400").json["data"]
            self.questions = [f"What is known of {d['title'] or d['id']}?" for d in listed]
        for question in self.questions[:20]:
            exchange(server.address, chat(question))
        return server

    # ----- one connection after another ----------------------------------------------------------

    def limits(self) -> dict[str, Any]:
        """Server time is the event loop's CPU time: nobody else is served meanwhile."""
        with self.server() as server:
            told = {}
            for kind in (storm_limits.numbers, storm_limits.bombs, storm_limits.sizes):
                cases = kind()
                results = storm_limits.beyond(server.address, cases, server.bytes, server.loop)
                told[kind.__name__] = storm_limits.summary(results)
            bombs = told["bombs"]
            too_much = bombs["largest"][1] > 32 or bombs["longest"][1] > 0.05
            wrong = [case for kind in told.values() for case in kind["wrong"]]
        return {**told, "wrong": wrong + ["a bomb cost too much"] * too_much}

    def slow(self) -> dict[str, Any]:
        """Five kinds, 60 of each by default."""
        with self.server() as server:
            before = storm_limits.healthy(server.address, 5, self.questions[0])
            slow = storm_limits.Slow(server.address, self.times or 300, self.seed, 40)
            slow.start()
            during = storm_limits.healthy(server.address, 10, self.questions[0])
            slow.join()
            left = server.sockets()
        longest = dict[str, float]()
        for kind, seconds in slow.closed:
            longest[kind] = round(max(seconds, longest.get(kind, 0)), 2)
        wrong = [f"{len(slow.left)} were never closed"] * bool(slow.left)
        return {
            "closed": len(slow.closed), "longest_s": longest, "sockets_left": left,
            "healthy_before_ms": _median(before), "healthy_during_ms": _median(during),
            "wrong": wrong,
        }  # fmt: skip

    # ----- many at once --------------------------------------------------------------------------

    def overload(self) -> dict[str, Any]:
        """The server on one core, the load on another; also what a second of its CPU answers."""
        os.sched_setaffinity(0, {1})
        rounds, wrong = [], list[str]()
        with self.server(core=0) as server:
            asks = taking_turns([chat(question) for question in self.questions])
            asyncio.run(closed_loop(server.address, asks, 32, 3))
            for number in range(self.times or 3):
                spent = server.seconds()
                peak = asyncio.run(closed_loop(server.address, asks, 32, 8))
                alone, spent = len(peak.answered) / (server.seconds() - spent), server.seconds()
                flood = open_loop(server.address, asks, 10 * peak.rate, 8, self.seed + number)
                storm = asyncio.run(flood)
                began = time.monotonic()
                kept = len(storm.answered) / (server.seconds() - spent)
                exchange(server.address, chat(self.questions[0]))
                rounds.append({
                    "peak": round(peak.rate, 1), "flood": described(storm),
                    "per_cpu_second": [round(alone, 1), round(kept, 1)],
                    "goodput": round(storm.rate / peak.rate, 3),
                    "goodput_per_cpu": round(kept / alone, 3),
                    "recovered_s": round(time.monotonic() - began, 3),
                    "load": round(os.getloadavg()[0], 1),
                })  # fmt: skip
                wrong += [f"{kind}: {count}" for kind, count in storm.wrong.items()]
        return {"rounds": rounds, "wrong": wrong}

    def leave(self) -> dict[str, Any]:
        """A tenth of them first, to compare threads, sockets and memory with."""
        times = self.times or 1000
        with self.server(limits=FORGETFUL) as server:
            wrong = leave(server.address, self.questions, times // 10, self.seed)
            server.idle()
            before = (server.threads(), server.sockets(), server.bytes())
            wrong += leave(server.address, self.questions, times, self.seed + 1)
            idle = server.idle(20)
            time.sleep(0.2)
            after = (server.threads(), server.sockets(), server.bytes())
        leaked = [f"{before} -> {after}"] * (after[0] > before[0] + 1 or after[1] > before[1])
        grown = round(after[2] / before[2] - 1, 4)
        return {
            "left": times, "idle_after_s": round(idle, 3), "threads": [before[0], after[0]],
            "sockets": [before[1], after[1]], "memory_grown": grown,
            "wrong": wrong + leaked + ["memory"] * (grown > 0.05),
        }  # fmt: skip

    def swaps(self) -> dict[str, Any]:
        """Also whether memory comes back."""
        with self.server(limits=FORGETFUL) as server:
            swapped(server.address, 20, 4)
            before = server.bytes()
            told = swapped(server.address, self.times or 200, 4)
            told["memory_grown"] = round(server.bytes() / before - 1, 4)
        return {**told, "wrong": told["first"]}

    def neighbours(self) -> dict[str, Any]:
        """Of every kind, with every reading."""
        with self.server() as server:
            told = neighbours(server.address, self.questions, 300, self.times or 3000, self.seed)
        return {**told, "wrong": told["first"]}

    def poison(self) -> dict[str, Any]:
        """Planted here whether or not another fault is."""
        self.fault = self.fault or "poisoned"
        with self.server() as server:
            told = poisoned(server.address, self.questions, self.times or 600, self.seed)
            told["log_repeats_questions"] = "poison of" in server.logged()
        return {**told, "wrong": told["first"] + ["log"] * told["log_repeats_questions"]}

    # ----- ends ----------------------------------------------------------------------------------

    def ends(self) -> dict[str, Any]:
        """Each of a server of its own."""
        self.server().__exit__()
        times, told = self.times or 20, []
        for number in range(times):
            state = self.folder / "ends"
            told.append(
                terminated(self.export, state, self.questions, self.seed + number, self.fault)
            )
        unready = [one["unready"] for one in told if one["unready"] is not None]
        return {
            "terms": times, "answered": sum(one["statuses"].get(200, 0) for one in told),
            "refused_503": sum(one["statuses"].get(503, 0) for one in told),
            "unready_ms": _median(unready or [-0.001]),
            "ended_s": max(one["ended"] for one in told),
            "wrong": [wrong for one in told for wrong in one["wrong"]],
        }  # fmt: skip

    def kills(self) -> dict[str, Any]:
        """One state directory for all."""
        return killed(self.export, self.folder / "kills", self.times or 10, self.seed)


def _median(seconds: list[float]) -> list[float]:
    """Median and largest, in milliseconds."""
    ordered = sorted(seconds)
    return [round(1000 * value, 1) for value in (ordered[len(ordered) // 2], ordered[-1])]


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    names = [name for name in vars(Storm) if not name.startswith("_") and name != "server"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path)
    parser.add_argument("storms", nargs="+", choices=names)
    parser.add_argument("--times", type=int, default=0, help="how often; 0: as the docs say")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--fault", choices=FAULTS)
    given, bad = parser.parse_args(argv), False
    with tempfile.TemporaryDirectory() as folder:
        for name in given.storms:
            began = time.monotonic()
            storm: Callable[[], dict[str, Any]] = getattr(Storm(given, Path(folder)), name)
            told = storm()
            bad = bad or bool(told["wrong"])
            told["wrong"] = told["wrong"][:10]
            took = round(time.monotonic() - began, 1)
            head = {"storm": name, "seed": given.seed, "fault": given.fault, "seconds": took}
            print(json.dumps({**head, **told}), flush=True)  # noqa: T201 (the command's output)
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())

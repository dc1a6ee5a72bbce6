"""Servers that are told to end, or are killed, in the middle of their work."""

import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from server_process import ServerProcess
from storm_answers import loaded
from wire import Reader, asked, chat, connected, edited, request


def terminated(
    export: Path, state: Path, questions: list[str], seed: int, fault: str | None = None
) -> dict[str, Any]:
    """One SIGTERM at a random moment under load: what it answered, and what was wrong."""
    dice, wrong = random.Random(seed), list[str]()

    def make(turn: int) -> bytes:
        more = {"temperature": 1.5, "seed": turn, "max_tokens": 12, "stream": bool(turn % 2)}
        return chat(questions[turn % len(questions)], **more)

    with ServerProcess(export, state, fault).ready() as server:
        kept = connected(server.address)  # to look at /ready with, open already
        with loaded(server.address, make, 12) as got:
            time.sleep(0.5 + dice.random())
            server.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            seconds = _unready(kept, told, wrong)
            code = server.process.wait(90)
            ended = time.monotonic() - told
        kept.close()
        log = server.logged()
    before = [item for item in got if item[0] < told]
    statuses = {status: sum(item[1] == status for item in got) for _, status, _, _ in got}
    # What began before the signal is answered, unless it had no turn in the queue (429).
    cut = [item for item in got if item[1] == 200 and not item[2]]
    lost = [item for item in before if item[1] == 0 and item[0] < told - 0.05]
    bad = sorted({item[1] for item in got} - {0, 200, 429, 503})
    wrong += [f"{len(cut)} answers were cut"] * bool(cut)
    wrong += [f"{len(lost)} requests from before were lost"] * bool(lost)
    wrong += [f"statuses {bad}"] * bool(bad)
    wrong += [f"exit code {code}"] * bool(code)
    wrong += [f"log: {log[-300:]}"] * bool(log)
    for _, status, _, body in got:
        if status == 503 and b'"code": "draining"' not in body and b'"draining"' not in body:
            wrong.append(f"503 without OpenAI's shape: {body[:200]!r}")
    return {
        "statuses": statuses, "unready": seconds and round(seconds, 4), "ended": round(ended, 2),
        "wrong": wrong,
    }  # fmt: skip


def _unready(kept: Any, told: float, wrong: list[str]) -> float | None:
    """Seconds until /ready said 503, on a connection that was open before."""
    reader = Reader(kept)
    for _ in range(50):
        try:
            kept.sendall(request("GET", "/ready"))
            got = reader.next("GET")
        except OSError:
            got = None
        if got is None:
            wrong.append("the connection ended before /ready said 503")
            return None
        if got.status == 503:
            if got.json["status"] != "draining":
                wrong.append(f"/ready: {got.json}")
            return time.monotonic() - told
    wrong.append("/ready did not say 503")
    return None


def killed(export: Path, state: Path, kills: int, seed: int) -> dict[str, Any]:
    """SIGKILL at random moments of edits and swaps; every edit that was told must be there."""
    dice, known, wrong = random.Random(seed), dict[str, str](), list[str]()
    starts, number = list[float](), 0
    for _ in range(kills + 1):
        began = time.monotonic()
        with ServerProcess(export, state).ready() as server:
            starts.append(time.monotonic() - began)
            for id, text in known.items():
                got = asked(server.address, "GET", f"/v1/documents/{id}")
                if got.status != 200 or got.json["text"] != text:
                    wrong.append(f"{id}: {got.status} {got.body[:100]!r}, told {text!r}")
            if asked(server.address, "GET", "/ready").status != 200:
                wrong.append("not ready")
            doomed = threading.Timer(0.2 + 1.5 * dice.random(), server.process.kill)
            doomed.start()
            try:
                while True:
                    number += 1
                    id, text = f"d{number % 7}", f"Edit {number} is the newest."
                    known.pop(id, None)  # not told: either text is right
                    body = {"documents": [{"id": id, "text": text}]}
                    if edited(server.address, "POST", "/v1/documents", body).status == 200:
                        known[id] = text
                    if number % 5 == 0:
                        edited(server.address, "POST", "/v1/refresh")
            except (OSError, AssertionError, ValueError):
                doomed.join()
            except Exception as error:  # h11's, of a response that was cut
                if "h11" not in type(error).__module__:
                    raise
                doomed.join()
    return {"kills": kills, "edits": number, "wrong": wrong, "start_s": round(max(starts), 1)}

"""Kills joint runs at any instant, lets them go on, and compares them with one that was left alone.

    make chaos N=500
    python tests/chaos.py --kills 100 --seed 7 --fault "swap when ready"

A run has a re-index under way most of the time. The trainer is killed (SIGKILL) after a random time
or at a named point of writing, the worker by itself at random, or both; then the same command goes
on from what is on disk, again and again until the run is finished. Every step's loss and retrieved
chunks and the final weights must be those of the run that was left alone, and all that was
committed must load. `--fault` plants a mistake, which must be found. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

import chaos_points
from rag2 import artifact
from small_runs import log, weights

ROOT = Path(__file__).resolve().parents[1]
STEPS = 18
SETTINGS = [
    *(f"steps={STEPS}", "checkpoint_every=4", "batch_size=4", "seed=3"),
    *("schedule.warmup=2", "lr_retriever=3e-3", "lr_generator=1e-3"),
    # Dropout: the random state is part of the run.
    *("tuning.name=lora", "tuning.rank=4", "tuning.dropout=0.2"),
    "refresh={name: async, every: 5, lag: 4, share: 0.5}",
]


def main() -> None:
    """Kill until there were enough; exit status 1 if anything differed."""
    arguments = argparse.ArgumentParser(description="Kill joint runs and let them go on.")
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--minutes", type=float, default=1e9, help="end after this long, too")
    arguments.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments.add_argument("--fault", choices=sorted(chaos_points.FAULTS))
    arguments.add_argument(
        "--processes", action="store_true", help="real worker processes instead of forks: slower"
    )
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="rag2-chaos-") as folder:
        found = Chaos(Path(folder), asked.seed, asked.fault, asked.processes).run(
            asked.kills, 60 * asked.minutes
        )
    sys.stdout.write(json.dumps(found) + "\n")
    raise SystemExit(0 if found["differences"] == 0 else 1)


class Chaos:
    """One folder with the inputs, the run that was left alone, and the one that is killed."""

    def __init__(self, folder: Path, seed: int, fault: str | None, processes: bool) -> None:
        self.folder, self.seed, self.fault, self.processes = folder, seed, fault, processes
        self.dice = random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.problems: list[str] = []
        chaos_points.make_home(folder / "home")

    def run(self, kills: int, seconds: float) -> dict[str, Any]:
        """What happened until there were enough kills: by kind, finished runs, differences."""
        settings = [*SETTINGS[:-1], "steps=1", "checkpoint_every=1"]
        chaos_points.load_everything(self.folder / "first", self.folder / "home", settings)
        began = time.monotonic()
        self._child(self.folder / "whole", None)
        self.seconds = time.monotonic() - began
        self.expected = log(self.folder / "whole"), weights(self.folder / "whole")
        number = 0
        while (
            self.tally["kills"] < kills and time.monotonic() - began < seconds and not self.problems
        ):
            self._one_run(self.folder / f"cut-{number}")
            number += 1
            sys.stderr.write(f"{self.tally['kills']} kills, {number} runs\n")
        return {
            "seed": self.seed,
            "fault": self.fault,
            **dict(sorted(self.tally.items())),
            "differences": len(self.problems),
            "problems": self.problems[:5],
            "seconds_undisturbed": round(self.seconds, 1),
            "seconds": round(time.monotonic() - began, 1),
        }

    def _one_run(self, out: Path) -> None:
        """Killed and taken up again until it is finished."""
        attempt = 0
        for attempt in range(100):
            kill = None if attempt == 99 else self._draw()
            finished = self._child(out, kill)
            self._loads(out)
            if finished or self.problems:
                break
        self.tally["runs"] += 1
        self.tally["longest_chain"] = max(self.tally["longest_chain"], attempt)
        if self.problems:
            return
        for got, want, what in zip(
            (log(out), weights(out)), self.expected, ("log", "weights"), strict=True
        ):
            if got != want:
                self.problems.append(f"{out.name}: {what} differs{_where(got, want)}")
        shutil.rmtree(out)

    def _draw(self) -> chaos_points.Kill:
        """At random: after some time, or at the n-th passing of a named point."""
        if self.dice.random() < 0.5:
            point = self.dice.choice(sorted(chaos_points.POINTS))
            return chaos_points.Kill("trainer", point=point, passing=self.dice.randrange(1, 7))
        victim = self.dice.choice(("trainer", "worker", "both"))
        return chaos_points.Kill(victim, after=self.dice.uniform(0, self.seconds))

    def _child(self, out: Path, kill: chaos_points.Kill | None) -> bool:
        """Run or go on in a forked process; True when it came to its end."""
        pid = os.fork()
        if pid == 0:
            fault = self.fault if out.name != "whole" else None
            home = self.folder / "home"
            chaos_points.train(out, home, SETTINGS, kill, fault, self.processes)
        _, status = os.waitpid(pid, 0)
        killed = out.parent / f"{out.name}.killed"
        if killed.exists():
            self.tally["kills"] += 1
            self.tally[killed.read_text(encoding="utf-8")] += 1
            killed.unlink()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return False
        if os.waitstatus_to_exitcode(status) != 0:
            said = (out.parent / "said.txt").read_text(encoding="utf-8")[-400:]
            self.problems.append(f"{out.name}: ended with {status}: {said}")
            return False
        return True

    def _loads(self, out: Path) -> None:
        """Everything that was committed verifies, and every pointer names something that is."""
        for manifest in out.rglob(artifact.MANIFEST):
            if any(".staging-" in part for part in manifest.parts):
                continue
            self.tally["loaded"] += 1
            with self._told(out):
                artifact.verify(manifest.parent)
        for pointer in ("checkpoints/latest", "generations/current"):
            with self._told(out):
                artifact.follow(out / pointer)

    @contextlib.contextmanager
    def _told(self, out: Path) -> Iterator[None]:
        try:
            yield
        except artifact.ArtifactError as error:
            self.problems.append(f"{out.name}: {error}")


def _where(got: Any, want: Any) -> str:
    if not isinstance(got, list):
        return ""
    first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), len(want))
    return f" from step {first}, {len(got)} lines instead of {len(want)}"


if __name__ == "__main__":
    main()

"""Every state that a power loss may leave of a run's files: each must load, nothing told be lost.

    python tests/powerloss.py --states 100000
    python tests/powerloss.py --states 20000 --fault "folders not synced"

A run's real writers (checkpoints, generations of the index, snapshots of the encoder, pointers,
retention) work on real files while their operations are recorded; then the states of
helpers/crash_states.py are written out at each point, and read as `resume=true` would. `--fault`
plants a mistake, which must be found. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from crash_states import Recorder, Tree, states, write
from rag2 import artifact, config
from rag2.generator.bpe import train_bpe
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.registry import UserError
from rag2.reindex import worker
from rag2.reindex.store import Store
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import checkpoint
from rag2.training.run import Run
from rag2.types import Chunk

# There an fsync costs nothing; what is durable is counted, not observed.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
TEXTS = ["a town by the sea", "a ship of oak", "a baker and his dog"]
CHUNKS = [Chunk(i, f"d{i}", text) for i, text in enumerate(TEXTS)]
ENCODER = DualEncoder.build(
    EncoderConfig(hidden=8, layers=1, heads=1, intermediate=8), train_bpe(TEXTS, 270)
)
Found = dict[str, int]  # how far the run got: step of the checkpoint, number of the generation


def main() -> None:
    """Enumerate; exit status 1 if a state did not load or had lost something."""
    arguments = argparse.ArgumentParser(description="Try what a power loss may leave of a run.")
    arguments.add_argument("--states", type=int, default=100_000, help="about how many")
    arguments.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments.add_argument("--fault", choices=sorted(FAULTS))
    asked = arguments.parse_args()
    found = explore(asked.states, asked.seed, asked.fault)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["wrong"] else 0)


class Settings(config.Config):
    """Of the run."""

    out: str
    steps: int = 100
    resume: bool = False
    log_with: list[str] = []


class Writer:
    """What of a joint run writes: log, snapshot, generation, swap, checkpoint, retention."""

    def __init__(self, out: Path) -> None:
        """Begin the run, or go on."""
        torch.manual_seed(0)
        self.half = nn.Linear(4, 3)
        self.half(torch.ones(4)).sum().backward()
        optimizer = torch.optim.AdamW(self.half.parameters())
        self.run = Run(Settings(out=str(out), resume=True), {"half": self.half}, optimizer, [])
        self.store = Store(self.run.out, CHUNKS, ENCODER, Flat(), kb_version=1, kb_hash="h")

    def round(self, told: Callable[[str, int], None]) -> None:
        """A step, a new generation as the worker commits it, the swap, a checkpoint, the sweep."""
        number = self.run.start + 1
        if number == 1:
            self.store.build(0, 0)
        self.run.log.write(step=self.run.start)
        self.run.optimizer.step()
        self.store.snapshot(number, number)
        self.store.drop(number)
        made = self.store.load(number - 1)
        again = Generation(made.index, made.chunks, made.encoder_fingerprint, 1, "h", number, 3)
        again.save(self.run.out / "generations" / f"{number:06d}")
        self.store.publish(number)
        told("generation", number)
        self.run.checkpoint(number, generation=number)
        told("checkpoint", number)
        named = {state["generation"] for state in checkpoint.retained(self.run.out)}
        self.store.prune(named, snapshots=named)
        self.run.start = number


def record(root: Path, rounds: int) -> list[Any]:
    """The operations of a run of so many rounds."""
    recorder = Recorder(root)
    with recorder.recording():
        writer = Writer(root / "runs" / "a")
        for _ in range(rounds):
            writer.round(lambda what, number: recorder.told((what, number)))
    writer.run.log.close()
    return recorder.trace


def read(root: Path, goes_on: bool) -> Found:
    """How far the run got, by what `resume=true` reads; raises where something does not load."""
    found = {"checkpoint": 0, "generation": 0}
    if directory := artifact.follow(root / "runs" / "a" / "generations" / "current"):
        found["generation"] = Generation.load(directory).step
    writer = Writer(root / "runs" / "a")
    try:
        found["checkpoint"] = start = writer.run.start
        if start:
            writer.store.load(writer.run.extra["generation"])
            artifact.verify(writer.store.snapshots / f"{start:06d}", kind=worker.KIND)
        lines = (writer.run.out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(start)), f"the log has the steps {steps}, the run {start}"
        if goes_on:
            writer.round(lambda what, number: None)
            writer.round(lambda what, number: None)
    finally:
        writer.run.log.close()
    return found


def explore(count: int, seed: int, fault: str | None = None) -> dict[str, Any]:
    """What comes of about `count` states of a run."""
    with tempfile.TemporaryDirectory(prefix="rag2-powerloss-", dir=MEMORY) as folder:
        return _explore(Path(folder), count, seed, fault)


def _explore(folder: Path, count: int, seed: int, fault: str | None) -> dict[str, Any]:
    """Record a run, then read every state; of every 50th, also let the next round be written."""
    began = time.monotonic()
    disk = folder / "disk"
    disk.mkdir()
    with FAULTS[fault]() if fault else contextlib.nullcontext():
        trace = record(disk, rounds=3)
    shutil.rmtree(disk)
    rng = random.Random(seed)
    seen: dict[Tree, Found | str] = {}
    total, wrong, points = 0, [], len(trace) + 1
    for point, told, tree in states(trace, max(1, count // points), rng):
        total += 1
        if tree not in seen:
            seen[tree] = _try(tree, disk, goes_on=len(seen) % 50 == 0)
        verdict = seen[tree]
        if isinstance(verdict, str):
            wrong.append(f"after {point} operations: {verdict}")
        elif lost := [(what, n) for what, n in told if verdict[what] < n]:
            wrong.append(f"after {point} operations: told {lost[-1]}, found {verdict}")
    return {
        "states": total,
        "different": len(seen),
        "operations": len(trace),
        "wrong": len(wrong),
        "first": wrong[:3],
        "seed": seed,
        "fault": fault,
        "seconds": round(time.monotonic() - began),
    }


def _try(tree: Tree, root: Path, goes_on: bool) -> Found | str:
    """How far the run got in this state, or what is wrong with it."""
    root.mkdir()
    try:
        write(tree, root)
        return read(root, goes_on)
    except (UserError, OSError, ValueError, KeyError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def _pointer_first() -> Iterator[None]:
    """The pointer moves before what it names is there."""
    rename = os.rename

    def hasty(old: Any, new: Any) -> None:
        new = Path(new)
        if new.parent.name == "checkpoints" and new.name.startswith("step-"):
            artifact.replace(new.parent / "latest", f"{new.name}\n")
        rename(old, new)

    with mock.patch.object(os, "rename", hasty):
        yield


@contextlib.contextmanager
def _in_place() -> Iterator[None]:
    """The pointer is written over, not replaced."""

    def replace(path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        artifact._sync_file(path)
        artifact._sync_directory(path.parent)

    with mock.patch.object(artifact, "replace", replace):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "folders not synced": lambda: mock.patch.object(artifact, "_sync_directory", lambda path: None),
    "files not synced": lambda: mock.patch.object(artifact, "_sync_file", lambda path: None),
    "pointer before files": _pointer_first,
    "pointer in place": _in_place,
}

if __name__ == "__main__":
    main()

"""Time and memory of a loss from the output head's inputs, forward and backward, per provider.

    python kernels/bench/run.py --out runs/bench.csv
    python kernels/bench/run.py --vocabulary 151936 --share 0.25 --rounds 3

Times: all providers take turns in one process; p20, p50 and p80 of `--rounds`, after one round that
is not counted. Memory: one process a provider, what its first call adds to the process's peak,
without the gradients it leaves. Errors are those of the gradients against eager torch's.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import providers
import torch

SHAPE = ("questions", "chunks", "tokens", "hidden", "vocabulary", "share")


def main() -> None:
    """Print a table and write the CSV."""
    asked = _arguments()
    if asked.memory_of:
        sys.stdout.write(f"{peak_of(asked)}\n")
        return
    torch.set_num_threads(asked.threads)
    rows = timed(asked)
    for row in rows:
        row["peak_mib"] = memory(asked, row["provider"])
        row |= {"threads": asked.threads, **providers.versions()}
    if asked.out:
        Path(asked.out).parent.mkdir(parents=True, exist_ok=True)
        with Path(asked.out).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")


def timed(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a provider."""
    given = _inputs(asked)
    found = providers.providers()
    seconds: dict[str, list[float]] = {name: [] for name in found}
    errors, truth = {}, None
    for number in range(asked.rounds + 1):
        for name, provider in found.items():
            for leaf in given.leaves:
                leaf.grad = None
            began = time.perf_counter()
            provider(given).backward()
            if number:
                seconds[name].append(time.perf_counter() - began)
                continue
            left = [leaf.grad.clone() for leaf in given.leaves if leaf.grad is not None]
            truth = truth or left
            errors[name] = max(
                float((a - b).norm() / b.norm().clamp_min(1e-12))
                for a, b in zip(left[:2], truth[:2], strict=True)
            )
    eager = _quantile(seconds["eager"], 0.5)
    return [
        {
            "provider": name,
            **{key: getattr(asked, key) for key in SHAPE},
            **{f"p{q}_s": round(_quantile(row, q / 100), 4) for q in (20, 50, 80)},
            "of_eager": round(_quantile(row, 0.5) / eager, 3),
            "gradient_error": f"{errors[name]:.1e}",
        }
        for name, row in seconds.items()
    ]


def memory(asked: argparse.Namespace, provider: str) -> float:
    """MiB beyond inputs and gradients, measured in a process of its own."""
    words = [f"--{key}={getattr(asked, key)}" for key in (*SHAPE, "threads")]
    command = [sys.executable, __file__, *words, "--memory-of", provider]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return round(float(done.stdout), 1)


def peak_of(asked: argparse.Namespace) -> float:
    """What one call adds to this process's peak, without the gradients, in MiB."""
    torch.set_num_threads(asked.threads)
    small = argparse.Namespace(**{**vars(asked), "vocabulary": 64, "hidden": 8})
    provider = providers.providers()[asked.memory_of]
    provider(_inputs(small)).backward()  # libraries' own buffers
    given = _inputs(asked)
    before = _peak()
    provider(given).backward()
    gradients = sum(leaf.grad.nbytes for leaf in given.leaves if leaf.grad is not None)
    return (_peak() - before - gradients) / 2**20


def _peak() -> int:
    """VmHWM in bytes: Linux's ru_maxrss begins with that of the process that started this one."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status tells no VmHWM")


def _inputs(asked: argparse.Namespace) -> providers.Inputs:
    return providers.made(**{key: getattr(asked, key) for key in SHAPE})


def _quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values).quantile(q))


def _arguments() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description="Time and memory of the fused loss.")
    arguments.add_argument("--questions", type=int, default=8)
    arguments.add_argument("--chunks", type=int, default=8)
    arguments.add_argument("--tokens", type=int, default=32)
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--vocabulary", type=int, default=32_000)
    arguments.add_argument("--share", type=float, default=1.0, help="f, of chunks with a posterior")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--out", help="a CSV file")
    arguments.add_argument("--memory-of", help=argparse.SUPPRESS)
    return arguments.parse_args()


if __name__ == "__main__":
    main()

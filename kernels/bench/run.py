"""Time, memory and correctness of every operation of rag2_kernels beside its peers.

    python kernels/bench/run.py --suite gpu --out runs/gpu-bench
    python kernels/bench/run.py --suite cpu --op rag_loss --out runs/bench
    python kernels/bench/run.py --suite tiny --out runs/tiny    # the gpu suite's dry run on a CPU

DIR/bench.csv and DIR/bench.md are complete after every row, headlines first; DIR/bench.png comes
last, where matplotlib is installed. On a GPU a time is that of CUDA events around the call, L2
flushed before and launches queued ahead; on a CPU all providers take turns. Memory is the peak
above the inputs, without the gradients that stay. Errors are relative to fp64 in the 2-norm, and
allowed is twice that of plain torch in the same dtype and the last place. Exit status 1 if a row
of rag2 does not match, is not equal twice or fails; 2 if the command line makes no sense.
"""

import argparse
import difflib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

SUITES = ("gpu", "cpu", "tiny")
ROUNDS = {"gpu": 50, "cpu": 5, "tiny": 2}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(words: Sequence[str] | None = None) -> int:
    """Measure, write and return the exit status."""
    words = list(sys.argv[1:] if words is None else words)
    parser = _parser()
    asked = parser.parse_args(words)
    if asked.memory_of:
        return _tell_memory(*json.loads(asked.memory_of))
    if asked.suite == "tiny":  # before triton is imported, as kernels choose when they are defined
        os.environ["TRITON_INTERPRET"] = "1"
    import ops
    import torch
    from table import Table

    for name in asked.op:
        if name not in ops.OPS:
            parser.error(f"--op {name}: {_nearest(name, list(ops.OPS))}")
    if asked.suite == "gpu" and not torch.cuda.is_available():
        parser.error("--suite gpu: no CUDA device is here; --suite tiny is its dry run on a CPU")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    cases = ops.cases(asked.suite, asked.op, asked.dtype)
    if not cases:
        parser.error("no shape of these operations has such a dtype in this suite")
    asked.out.mkdir(parents=True, exist_ok=True)
    return _measured(words, asked, cases, Table(asked.out / "bench.csv", asked.resume))


def _measured(words: list[str], asked: argparse.Namespace, cases: list, table) -> int:
    """Every case, then the exit status."""
    import block
    import report

    setting = _setting(asked)
    for op, case in cases:
        try:
            for row in block.rows_of(op, case, setting, table.has):
                table.add(row)
                report.write(table.rows, asked.out / "bench.md")
                sys.stdout.write(report.line(table.rows[-1]) + "\n")
                sys.stdout.flush()
        except block.DeviceLost as lost:
            # Nothing runs in this process any more; a new one goes on behind the faulty row.
            table.add(lost.row)
            left = max(1, int(setting.until - time.monotonic()))
            again = [*words, "--resume", "--seconds", str(left)]
            os.execv(sys.executable, [sys.executable, __file__, *again])
    if find_spec("matplotlib") is not None:
        import plot

        plot.draw(table.rows, asked.out / "bench.png")
    wrong = report.wrong_rows(table.rows)
    for row in wrong:
        sys.stdout.write(f"WRONG {report.line(row)}\n")
    sys.stdout.write(f"{len(table.rows)} rows, {len(wrong)} wrong: {asked.out}\n")
    return 1 if wrong else 0


def _setting(asked: argparse.Namespace):
    import block
    import torch

    on_gpu = asked.suite == "gpu"
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {threads} threads"
    return block.Setting(
        suite=asked.suite,
        device=torch.device("cuda" if on_gpu else "cpu"),
        device_name=name,
        rounds=asked.rounds or ROUNDS[asked.suite],
        until=time.monotonic() + asked.seconds,
        impl=asked.impl,
    )


def _tell_memory(name: str, index: int, provider: str, threads: int) -> int:
    import block
    import ops

    sys.stdout.write(f"{block.memory_of(ops.OPS[name], index, provider, threads)}\n")
    return 0


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"no such operation; nearest: {near[0]} (known: {', '.join(known)})"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="run.py", description="Benchmark of rag2_kernels.")
    hidden = argparse.SUPPRESS
    parser.add_argument("--suite", choices=SUITES, default="cpu")
    parser.add_argument("--op", nargs="+", default=[], metavar="NAME", help="by default all")
    parser.add_argument("--dtype", nargs="+", default=[], choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--impl", choices=("torch", "triton"), help="of rag2; by default both")
    parser.add_argument("--seconds", type=_positive, default=480.0, help="no new work after them")
    parser.add_argument("--rounds", type=_count, help=f"at most; by default {ROUNDS}")
    parser.add_argument("--threads", type=_count, help="of torch on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR")
    parser.add_argument("--resume", action="store_true", help=hidden)
    parser.add_argument("--memory-of", help=hidden)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""One case: every provider's match, memory and time, as rows of the table."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import measure
import torch
from op import HEADLINE, SHORT, Case, Inputs, Op, Outputs, Provider
from table import Row

NOT_RUN = "not run: time"
RUN = Path(__file__).parent / "run.py"
# glibc gives every tensor pages of its own and takes them back when it is freed.
PAGES = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class DeviceLost(RuntimeError):
    """The device answers nobody any more; `row` is that of the provider that ended it."""

    def __init__(self, row: Row) -> None:
        super().__init__(row["note"])
        self.row = row


@dataclass(frozen=True)
class Setting:
    """How the cases of a run are measured."""

    suite: str
    device: torch.device
    device_name: str
    rounds: int
    until: float  # time.monotonic() at which no further work begins
    impl: str | None = None  # the only implementation of ours that is wanted

    def over(self) -> bool:
        """Whether the time is used up."""
        return time.monotonic() >= self.until

    def providers(self, op: Op, case: Case) -> dict[str, Provider]:
        """Those of a case: a sweep is plain torch and ours; compiling takes long, and f is ours."""
        return {
            name: provider
            for name, provider in op.providers.items()
            if (case.timed or provider.ours or name == "plain")
            and (not provider.compiles or (case.turn == HEADLINE and case.f == 1))
            and not (self.suite == "cpu" and provider.gpu_only)
            and not (provider.ours and self.impl and name != f"rag2_{self.impl}")
        }


def empty_row(op: Op, case: Case, name: str, setting: Setting, note: str = "") -> Row:
    """What is known of a row before anything is run."""
    provider = op.providers[name]
    return {
        "op": op.name,
        **case.sizes,
        "dtype": SHORT[case.dtype],
        "pass": "forward+backward" if case.backward else "forward",
        "f": f"{case.f:g}",
        "provider": name,
        "versions": provider.versions(),
        "device": setting.device_name,
        "flops": f"{op.flops(case):.4g}",
        "target_ms": case.target_ms or "" if name == "rag2_triton" else "",
        "target_mib": case.target_mib or "" if name == "rag2_triton" else "",
        "note": note or provider.note,
    }


def rows_of(op: Op, case: Case, setting: Setting, done: Callable[[Row], bool]) -> Iterator[Row]:
    """The rows that are not done yet. Raises DeviceLost."""
    torch.compiler.reset()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # the next shape's tensors may need all of it in one piece
    rows = {name: empty_row(op, case, name, setting) for name in setting.providers(op, case)}
    runnable = {}
    for name, row in rows.items():
        if done(row):
            continue
        why = NOT_RUN if setting.over() else op.providers[name].absent(setting.device)
        if why:
            yield row | {"note": why, "versions": ""}
        else:
            runnable[name] = row
    if not runnable:
        return
    given, truth, why = _made(op, case, setting)
    if why:  # out of memory: the other cases go on
        for row in runnable.values():
            yield _failed(row, why, setting)
        return
    works = {name: measure.work_of(op, case, given, op.providers[name]) for name in runnable}
    yield from _checked(op, case, setting, works, runnable, truth, given)
    del truth
    if case.timed:
        yield from _timed(op, case, setting, works, runnable)
    yield from runnable.values()


def _made(op: Op, case: Case, setting: Setting) -> tuple[Inputs, Outputs, str]:
    """Inputs, truth and, if they cannot be had, why."""
    try:
        given = op.make(case, setting.device)
        return given, measure.truth_of(op, case, given), ""
    except Exception as error:
        return {}, (), measure.told(error)


def _checked(
    op: Op,
    case: Case,
    setting: Setting,
    works: dict[str, measure.Work],
    runnable: dict[str, Row],
    truth: Outputs,
    given: Inputs,
) -> Iterator[Row]:
    """Fill in match and memory; rows that fail are taken out of `runnable` and yielded."""
    plain: list[float] | None = None
    for name, row in list(runnable.items()):
        if setting.over():
            yield runnable.pop(name) | {"note": NOT_RUN}
            continue
        why = ""
        try:
            first = op.judged(given, works[name]())
            if name == "plain":
                plain = measure.errors_of(first, truth)
            elif plain is None:
                row["note"] = "; ".join(filter(None, (row["note"], "no plain torch to compare")))
            found = measure.verdict(first, truth, plain)
            row |= {"error": f"{found.error:.2e}", "allowed": f"{found.allowed:.2e}"}
            row["match"] = found.match
            if op.providers[name].ours:
                row["twice_equal"] = measure.equal(first, op.judged(given, works[name]()))
            del first
            if case.timed:
                row["peak_mib"] = _memory(op, case, name, setting, works[name])
        except Exception as error:  # of a peer, too: told in its row
            why = measure.told(error)
        if why:
            yield _failed(runnable.pop(name), why, setting)


def _timed(
    op: Op,
    case: Case,
    setting: Setting,
    works: dict[str, measure.Work],
    runnable: dict[str, Row],
) -> Iterator[Row]:
    """Fill in times; rows that fail are taken out of `runnable` and yielded."""
    wanted = {name: works[name] for name in runnable}
    seconds, failed = measure.in_turns(wanted, setting.device, setting.rounds, setting.over)
    for name, why in failed.items():
        yield _failed(runnable.pop(name), why, setting)
    plain = measure.quantile_ms(seconds["plain"], 0.5) if seconds.get("plain") else None
    for name, row in runnable.items():
        row |= _times(op, case, setting, seconds[name], plain)


def _times(op: Op, case: Case, setting: Setting, seconds: list[float], plain: float | None) -> Row:
    p20, p50, p80 = (measure.quantile_ms(seconds, q / 100) for q in (20, 50, 80))
    row: Row = {"p20_ms": f"{p20:.4g}", "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}"}
    row["tflops"] = f"{op.flops(case) / p50 / 1e9:.4g}"
    if plain:
        row["of_plain"] = f"{p50 / plain:.3f}"
    if setting.device.type == "cuda":
        floor = 1e3 * op.floor_s(case)
        row |= {"floor_ms": f"{floor:.4g}", "share_of_floor": f"{floor / p50:.3f}"}
    return row


def _failed(row: Row, why: str, setting: Setting) -> Row:
    """The row with the error in one line. Raises DeviceLost if the device is gone with it."""
    row = row | {"note": why}
    if setting.device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(row) from error
    return row


def _memory(op: Op, case: Case, name: str, setting: Setting, work: measure.Work) -> str:
    """MiB. Of the CPU suite in a process of its own, where nobody else has freed pages."""
    if setting.suite != "cpu":
        return f"{measure.peak_mib(op, case, work, setting.device):.1f}"
    asked = [op.name, op.suites["cpu"].index(case), name, torch.get_num_threads()]
    command = [sys.executable, str(RUN), "--memory-of", json.dumps(asked)]
    left = max(1.0, setting.until - time.monotonic())
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=left, env=os.environ | PAGES
        )
    except subprocess.TimeoutExpired:
        return ""
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no word").splitlines()[-1])
    return f"{float(done.stdout):.1f}"


def memory_of(op: Op, index: int, name: str, threads: int) -> float:
    """What `_memory` asks a process of its own."""
    torch.set_num_threads(threads)
    case, host, provider = op.suites["cpu"][index], torch.device("cpu"), op.providers[name]
    # Libraries' own buffers are there after a small call; a compiler's after one of this shape.
    small = replace(op.suites["tiny"][0], backward=case.backward, dtype=case.dtype)
    for first in (case, small) if provider.compiles else (small,):
        measure.work_of(op, first, op.make(first, host), provider)()
    given = op.make(case, host)
    return measure.peak_mib(op, case, measure.work_of(op, case, given, provider), host)

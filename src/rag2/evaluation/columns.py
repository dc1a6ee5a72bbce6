"""The columns of tables of arms, and what a table of the report is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rag2.evaluation.verdict import Results, interval, percent


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; the first `labels` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1


@dataclass(frozen=True, slots=True)
class Section:
    """What stands under one heading."""

    title: str
    parts: tuple[Table | str, ...]


class Column(NamedTuple):
    """A column of a table of arms: heading, key in results.json, how its value is written."""

    title: str
    key: str
    form: Callable[[Any], str] = str


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def three(number: float) -> str:
    """Three digits that count, never with an exponent: 0.0452, 1,230."""
    rounded = float(f"{number:.3g}")
    if abs(rounded) >= 100:
        return f"{rounded:,.0f}"
    return np.format_float_positional(rounded, trim="-")


def significant(number: float, unit: str = "") -> str:
    """Three digits that count, and what they are multiplied by: 12.3 M."""
    rounded = float(f"{number:.3g}")
    power = min(6, int(math.log10(rounded) // 3)) if rounded >= 1000 else 0
    return f"{rounded / 1000**power:g} {' kMGTPE'[power].strip()}{unit}".rstrip()


def _latency(found: Mapping[str, float]) -> str:
    return f"{found['p50']:.1f} / {found['p95']:.1f}"


def gain(share: float) -> str:
    """A relative change in percent, with its sign."""
    return f"{100 * share:+.1f} %"


ARMS = (
    Column("retriever", "retriever"),
    Column("generator", "generator"),
    Column("reading", "reading"),
    Column("accuracy", "accuracy", percent),
    Column("95 % interval", "ci95", interval),
    Column("K", "k"),
    Column("recall@1", "recall_at_1", percent),
    Column("recall@K", "recall_at_k", percent),
    Column("relative gain", "relative_gain", gain),
    Column("control", "control_accuracy", percent),
    Column("nats on unrelated text", "unrelated_nats", "{:.3f}".format),
)
SCORES = (
    Column("log-likelihood", "accuracy", percent),
    Column("per character", "acc_norm", percent),
    Column("per byte", "acc_bytes", percent),
    Column("mutual information", "acc_mutual_info", percent),
    Column("debiased", "debiased_accuracy", percent),
)
COST = (
    Column("train s", "train_seconds", _seconds),
    Column("eval s", "eval_seconds", _seconds),
    Column("eval tokens", "eval_tokens", _count),
    Column("peak memory in training", "peak_memory_bytes", _mebibytes),
    Column("trained parameters", "trained_parameters", _count),
    Column("train tokens", "train_tokens", _count),
    Column("bytes to ship", "ship_bytes", significant),
    Column("FLOPs a question", "inference_flops", significant),
    Column("ms a question, p50 / p95", "latency_ms", _latency),
    Column("s for a new document", "document_seconds", three),
)


def cell(arm: Results, column: Column) -> str:
    """One arm's value in a column; `-` where there is none."""
    value = arm.get(column.key)
    return "-" if value is None else column.form(value)


def table_of_arms(results: Results, columns: tuple[Column, ...], labels: int = 1) -> Table:
    """A row an arm; a column that no arm has a value for is left out, unless it is a label."""
    arms = results["arms"]
    kept = [
        column
        for number, column in enumerate(columns, 1)
        if number < labels or any(arm.get(column.key) is not None for arm in arms.values())
    ]
    rows = ((name, *(cell(arm, column) for column in kept)) for name, arm in arms.items())
    return Table(("arm", *(column.title for column in kept)), tuple(rows), labels)

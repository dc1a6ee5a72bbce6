"""What each way of taking in changed facts gives: how often it is right, stale, and how fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from rag2.evaluation import canvas, score, stats
from rag2.evaluation.canvas import COLORS, Plot
from rag2.evaluation.revision import STALE
from rag2.evaluation.robustness_numbers import rate
from rag2.evaluation.score import Ints
from rag2.evaluation.verdict import interval, percent, points
from rag2.types import Question

FORMAT = "rag2.freshness/1"
NOTHING, UPDATE = "nothing", "kb"  # what was done; else the name of a training
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What an arm answers after something was done about the changes, and how long that took."""

    arm: str
    done: str
    """`nothing`, `kb`, or how the generator was trained again"""
    changed_Q: Ints
    unchanged_Q: Ints
    seconds: float | None = None
    """until all changes are in; None where nothing was done"""
    document_seconds: Sequence[float] = ()
    """of each document, where they go in one by one"""


def summary(
    outcomes: Sequence[Outcome],
    changed: Sequence[Question],
    unchanged: Sequence[Question],
    seed: int,
) -> dict[str, Any]:
    """Rows and tests of results.json.

    Each update of the knowledge base is tested against every other row on the changed facts,
    paired by question; p is McNemar's, adjusted for all of these (Holm 1979).
    """
    right_Q, stay_Q = score.answers(changed), score.answers(unchanged)
    stale_Q = np.array([question.metadata[STALE] for question in changed])
    rows = []
    for outcome in outcomes:
        p50, p99 = _percentiles(outcome.document_seconds)
        rows.append(
            {
                "arm": outcome.arm,
                "done": outcome.done,
                "changed": rate(outcome.changed_Q == right_Q),
                "stale": rate(outcome.changed_Q == stale_Q),
                "unchanged": rate(outcome.unchanged_Q == stay_Q),
                "seconds": outcome.seconds,
                "document_seconds": {"p50": p50, "p99": p99, "n": len(outcome.document_seconds)},
            }
        )
    pairs = [(a, b) for a in outcomes if a.done == UPDATE for b in outcomes if b is not a]
    tests = [
        stats.paired(a.changed_Q == right_Q, b.changed_Q == right_Q, seed=seed) for a, b in pairs
    ]
    adjusted = stats.holm([test.mcnemar_p for test in tests])
    paired = [
        {
            "a": name(a.arm, a.done),
            "b": name(b.arm, b.done),
            "difference": test.difference,
            "ci95": list(test.ci95),
            "mcnemar_p": test.mcnemar_p,
            "holm_p": p,
        }
        for (a, b), test, p in zip(pairs, tests, adjusted, strict=True)
    ]
    return {"rows": rows, "paired": paired}


def name(arm: str, done: str) -> str:
    """What a row is called."""
    return f"{arm}, {done}"


def markdown(results: Row) -> str:
    """freshness.md: a row for each arm and what was done, then the tests."""
    header = ["arm", "done", "changed facts", "stale answers", "unchanged facts", "seconds for all"]
    header += ["seconds for one document, p50", "p99"]
    table = [header, ["---"] * len(header)]
    for row in results["rows"]:
        one = row["document_seconds"]
        cells = [f"{percent(row[k]['rate'])} {interval(row[k]['ci95'])}" for k in KINDS]
        times = (row["seconds"], one["p50"], one["p99"])
        table.append([row["arm"], row["done"], *cells, *map(_seconds, times)])
    tests = [
        f"- {t['a']} against {t['b']}: {points(t['difference'])} "
        f"{interval(t['ci95'], points)}, p = {t['holm_p']:.2g}"
        for t in results["paired"]
    ]
    n = results["n"]
    blocks = [
        f"# Freshness on {results['task']}",
        f"{n['documents']} documents change; {n['changed']} questions ask for what they now say "
        f"otherwise, {n['unchanged']} for what stays. Seed {results['seed']}, 95 % intervals.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        "On the changed facts, paired by question; p is McNemar's, adjusted for all of these:",
        "\n".join(tests) or "Nothing was updated.",
    ]
    return "\n\n".join(blocks) + "\n"


KINDS = ("changed", "stale", "unchanged")


def terminal_table(results: Row) -> Table:
    """The rows for a terminal of 80 columns."""
    table = Table(title=f"{results['task']}: {results['n']['changed']} changed facts")
    for title in ("arm", "done", "changed", "stale", "unchanged", "seconds"):
        table.add_column(title, justify="left" if title in ("arm", "done") else "right")
    for row in results["rows"]:
        shares = (percent(row[kind]["rate"]) for kind in KINDS)
        table.add_row(row["arm"], row["done"], *shares, _seconds(row["seconds"]))
    return table


def picture(results: Row) -> bytes:
    """freshness.png: accuracy on changed facts against the seconds until all of them are in."""
    with canvas.style():
        return canvas.draw(_plot(results)).png


def _plot(results: Row) -> Plot:
    figure = canvas.figure(3.2)
    axes = figure.add_subplot()
    colors = {NOTHING: COLORS["gray"], UPDATE: COLORS["blue"]}
    soonest = min((row["seconds"] for row in results["rows"] if row["seconds"]), default=1.0)
    trained = 0
    for row in results["rows"]:
        low, high = (100 * bound for bound in row["changed"]["ci95"])
        height, color = 100 * row["changed"]["rate"], colors.get(row["done"], COLORS["orange"])
        if row["seconds"] is None:
            axes.axhline(height, color=color, linewidth=1, linestyle=":")
            place, offset, side = soonest / 3, (0, 3), "left"
        else:
            place = row["seconds"]
            axes.plot([place, place], [low, high], color=color, linewidth=2)
            axes.plot(place, height, "o", color=color)
            offset, side = (6, 4), "left"
            if row["done"] != UPDATE:  # late, and all alike: their names stand before them
                offset, side = (-6, 4 - 14 * trained), "right"
                trained += 1
        axes.annotate(
            name(row["arm"], row["done"]),
            (place, height),
            offset,
            textcoords="offset points",
            color=color,
            ha=side,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(soonest / 4, None)
    axes.set_ylim(0, 105)
    axes.set_xlabel("seconds until all changes are in")
    axes.set_ylabel("accuracy on changed facts in %")
    return Plot("freshness", "Accuracy on changed facts against the time to take them in.", figure)


def _percentiles(seconds_N: Sequence[float]) -> tuple[float | None, float | None]:
    if not seconds_N:
        return None, None
    p50, p99 = np.percentile(seconds_N, [50, 99])
    return float(p50), float(p99)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

"""What each way of taking in changed facts gives: how often it is right, stale, and how fast."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from rag2.evaluation import canvas, score, stats
from rag2.evaluation.canvas import COLORS, Plot
from rag2.evaluation.revision import STALE, Revision
from rag2.evaluation.robustness_numbers import rate
from rag2.evaluation.score import Bools, Ints
from rag2.evaluation.verdict import interval, percent, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT = "rag2.freshness/2"
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
    k: int = 0
    """chunks that it reads"""
    found_Q: Bools | None = None
    """changed questions with a chunk that states the new answer among these, after an update"""


def summary(outcomes: Sequence[Outcome], news: Revision, seed: int) -> dict[str, Any]:
    """What freshness.json says of one revision: its sizes, rows and tests.

    Each update of the knowledge base is tested against every other row on the changed facts,
    paired by question; p is McNemar's, adjusted for all of these (Holm 1979).
    """
    right_Q, stay_Q = score.answers(news.changed), score.answers(news.unchanged)
    stale_Q = np.array([question.metadata[STALE] for question in news.changed])
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
                "k": outcome.k,
                "recall": None if outcome.found_Q is None else rate(outcome.found_Q),
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
    counts = {
        "documents": len(news.documents),
        "removed": len(news.removed),
        "changed": len(news.changed),
        "unchanged": len(news.unchanged),
    }
    return {"name": news.name, "n": counts, "rows": rows, "paired": paired}


def name(arm: str, done: str) -> str:
    """What a row is called."""
    return f"{arm}, {done}"


def markdown(results: Row) -> str:
    """freshness.md: for each revision a row for each arm and what was done, then the tests."""
    blocks = [f"# Freshness on {results['task']}", f"Seed {results['seed']}, 95 % intervals."]
    for told in results["revisions"]:
        blocks += _section(told)
    return "\n\n".join(blocks) + "\n"


def _section(told: Row) -> list[str]:
    header = [
        "arm",
        "done",
        "changed facts",
        "stale answers",
        "unchanged facts",
        "K",
        "recall at K",
    ]
    header += ["seconds for all", "seconds for one document, p50", "p99"]
    table = [header, ["---"] * len(header)]
    for row in told["rows"]:
        one, recall = row["document_seconds"], row["recall"]
        cells = [f"{percent(row[k]['rate'])} {interval(row[k]['ci95'])}" for k in KINDS]
        cells += [str(row["k"]), percent(recall["rate"]) if recall else "-"]
        times = (row["seconds"], one["p50"], one["p99"])
        table.append([row["arm"], row["done"], *cells, *map(_seconds, times)])
    tests = [
        f"- {t['a']} against {t['b']}: {points(t['difference'])} "
        f"{interval(t['ci95'], points)}, p = {t['holm_p']:.2g}"
        for t in told["paired"]
    ]
    n = told["n"]
    gone = f", {n['removed']} go" if n["removed"] else ""
    return [
        f"## {told['name']}",
        f"{n['documents']} documents are new or changed{gone}; {n['changed']} questions ask for "
        f"what they now say otherwise, {n['unchanged']} for what stays.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        "On the changed facts, paired by question; p is McNemar's, adjusted for all of these:",
        "\n".join(tests) or "Nothing was updated.",
    ]


KINDS = ("changed", "stale", "unchanged")


def terminal_tables(results: Row) -> Iterator[Table]:
    """The rows of each revision for a terminal of 80 columns."""
    for told in results["revisions"]:
        title = f"{results['task']}, {told['name']}: {told['n']['changed']} changed facts"
        table = Table(title=title)
        for column in ("arm", "done", "changed", "stale", "unchanged", "seconds"):
            table.add_column(column, justify="left" if column in ("arm", "done") else "right")
        for row in told["rows"]:
            shares = (percent(row[kind]["rate"]) for kind in KINDS)
            table.add_row(row["arm"], row["done"], *shares, _seconds(row["seconds"]))
        yield table


def picture(results: Row) -> bytes:
    """freshness.png: accuracy on changed facts against the seconds until all of them are in."""
    with canvas.style():
        return canvas.draw(_plot(results["revisions"])).png


def _plot(revisions: Sequence[Row]) -> Plot:
    """A panel for each revision."""
    figure = canvas.figure(3.2 * len(revisions))
    panels = figure.subplots(len(revisions), squeeze=False, sharex=True)[:, 0]
    for axes, told in zip(panels, revisions, strict=True):
        _panel(axes, told["rows"])
        if len(revisions) > 1:
            axes.set_title(told["name"], loc="left")
    panels[-1].set_xlabel("seconds until all changes are in")
    return Plot("freshness", "Accuracy on changed facts against the time to take them in.", figure)


def _panel(axes: "Axes", rows: Sequence[Row]) -> None:
    colors = {NOTHING: COLORS["gray"], UPDATE: COLORS["blue"]}
    soonest = min((row["seconds"] for row in rows if row["seconds"]), default=1.0)
    trained = 0
    for row in rows:
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
    axes.set_ylabel("accuracy on changed facts in %")


def _percentiles(seconds_N: Sequence[float]) -> tuple[float | None, float | None]:
    if not seconds_N:
        return None, None
    p50, p99 = np.percentile(seconds_N, [50, 99])
    return float(p50), float(p99)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

"""Rows of log.jsonl -> how training went: loss and recall over steps."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rag2.evaluation import canvas
from rag2.evaluation.canvas import COLORS, GRID, Plot

Rows = Sequence[Mapping[str, Any]]
Logs = Mapping[str, Rows]  # by stage
BINS = 150  # points of a loss curve; a longer one is shown as means and ranges of this many parts


def loss(logs: Logs) -> Plot | None:
    """The loss of every stage, each in a panel of its own."""
    curves = {stage: _curve(rows, "loss") for stage, rows in logs.items()}
    curves = {stage: curve for stage, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    rows = math.ceil(len(curves) / 2)
    figure = canvas.figure(1.55 * rows + 0.2)
    panels = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes, (stage, curve) in zip(panels, curves.items(), strict=False):
        parts = _parts(curve)
        middle = [_mean([step for step, _ in part]) for part in parts]
        values = [[value for _, value in part] for part in parts]
        if len(parts) < len(curve):
            axes.fill_between(
                middle, [min(v) for v in values], [max(v) for v in values], color=GRID, linewidth=0
            )
        axes.plot(middle, [_mean(v) for v in values], color=COLORS["blue"], linewidth=1.1)
        axes.set_title(stage, loc="left")
        axes.set_ylim(bottom=min(0, *map(min, values)))
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
    caption = "Training loss of each stage; stages minimise different losses."
    return Plot("loss", caption, figure)


def recall(logs: Logs) -> Plot | None:
    """Whatever recall a stage measured on validation questions."""
    keys = ((s, key) for s, rows in logs.items() for key in _keys(rows) if key.startswith("recall"))
    curves = {f"{stage}: {key}": _curve(logs[stage], key) for stage, key in keys}
    curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
    if not curves:
        return None
    figure = canvas.figure(2.6)
    axes = figure.add_subplot()
    for curve, look in zip(curves.values(), canvas.looks(curves), strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, [100 * value for value in values], **look, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("recall in %")
    figure.legend(loc="outside lower center", ncols=2)
    caption = "Recall on validation questions while the retriever trains."
    return Plot("recall", caption, figure)


def _keys(rows: Rows) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _curve(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a finite value."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _parts(curve: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """A curve cut into at most BINS runs of equal length."""
    count = min(BINS, len(curve))
    cuts = [len(curve) * number // count for number in range(count + 1)]
    return [curve[a:b] for a, b in itertools.pairwise(cuts)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

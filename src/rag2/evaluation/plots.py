"""Numbers of results.json and training logs -> the report's figures.

A figure whose numbers are not there is left out.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rag2.evaluation import canvas, curves
from rag2.evaluation.canvas import COLORS, INK, MUTED, ROLES, Picture, Plot
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.curves import Logs
from rag2.evaluation.verdict import ALPHA, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ON_FILL = "#010101"  # on a coloured cell, whatever the page; SVG leaves out a fill of pure black


def pictures(results: Results, logs: Logs) -> dict[str, Picture]:
    """Every figure there are numbers for, drawn, by name."""
    with canvas.style():
        made = (
            _accuracy(results),
            _relative_gain(results),
            _by_k(results),
            _significance(results),
            _cost(results),
            curves.loss(logs),
            curves.recall(logs),
        )
        return {plot.name: canvas.draw(plot) for plot in made if plot}


def _accuracy(results: Results) -> Plot | None:
    arms = results["arms"]
    if len(arms) < 2:
        return None
    figure = canvas.figure(0.85 + 0.21 * len(arms))
    axes = figure.add_subplot()
    for row, (name, arm) in enumerate(arms.items()):
        value, (low, high) = 100 * arm["accuracy"], (100 * bound for bound in arm["ci95"])
        _, color, marker = ROLES[canvas.role(name, arm)]
        axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(value, row, marker, color=color, markersize=6)
        axes.annotate(
            f"{value:.1f}",
            (max(high, value), row),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xlim(0, 109)
    axes.set_xticks(range(0, 101, 20))
    _name_rows(axes, list(arms))
    axes.set_xlabel(f"accuracy in % of {results['n']} questions")
    canvas.legend_of_roles(figure, [canvas.role(name, arm) for name, arm in arms.items()])
    return Plot("accuracy", "Accuracy with 95 % intervals (Wilson).", figure)


def _relative_gain(results: Results) -> Plot | None:
    gains = {
        name: 100 * arm["relative_gain"]
        for name, arm in results["arms"].items()
        if arm.get("relative_gain") is not None and name != "base"
    }
    if not gains:
        return None
    figure = canvas.figure(0.6 + 0.21 * len(gains))
    axes = figure.add_subplot()
    for row, (name, value) in enumerate(gains.items()):
        _, color, _ = ROLES[canvas.role(name, results["arms"][name])]
        axes.barh(row, value, color=color, height=0.62)
        axes.annotate(
            f"{value:+.0f}",
            (value, row),
            (4 if value >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
        )
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.margins(x=0.14)
    _name_rows(axes, list(gains))
    axes.set_xlabel("gain over base in % of base's accuracy")
    caption = "Relative gain: accuracy / accuracy of base - 1."
    return Plot("relative_gain", caption, figure)


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """One row an arm, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def _by_k(results: Results) -> Plot | None:
    arms = {name: arm for name, arm in results["arms"].items() if arm.get("by_k")}
    readings = list(dict.fromkeys(reading for arm in arms.values() for reading in arm["by_k"]))
    if not readings:
        return None
    figure = canvas.figure(2.3 * len(readings) + 0.7)
    panels = figure.subplots(len(readings), sharex=True, squeeze=False)[:, 0]
    looks = dict(zip(arms, canvas.looks(arms), strict=True))
    for axes, reading in zip(panels, readings, strict=True):
        for name, arm in arms.items():
            curve = sorted(arm["by_k"].get(reading, ()), key=lambda point: point["k"])
            ks, values = [p["k"] for p in curve], [100 * p["accuracy"] for p in curve]
            axes.plot(ks, values, **looks[name], linewidth=1.4, markersize=4)
            chosen = _chosen(results, name, reading)
            if chosen in ks:
                axes.plot(
                    chosen,
                    values[ks.index(chosen)],
                    "o",
                    markersize=10,
                    markerfacecolor="none",
                    markeredgecolor=INK,
                    markeredgewidth=1,
                )
        axes.set_title(reading, loc="left")
        axes.set_ylabel("accuracy in %")
        points = (arm["by_k"].get(reading, ()) for arm in arms.values())
        axes.set_xticks(sorted({point["k"] for point in itertools.chain(*points)}))
    panels[-1].set_xlabel("K, chunks read")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    caption = "Test accuracy against K; a ring marks the K chosen on validation questions."
    return Plot("by_k", caption, figure)


def _chosen(results: Results, name: str, reading: str) -> int | None:
    """The K an arm chose on validation for a way of reading."""
    arm = results["arms"][name]
    readings = arm.get("readings") or {}
    if reading in readings:
        return readings[reading]["k"]
    return arm["k"] if arm["reading"] == reading else None


def _significance(results: Results) -> Plot | None:
    pairs = results.get("pairwise")
    if not pairs or len(pairs["arms"]) < 2:
        return None
    from matplotlib.patches import Rectangle

    names, size = pairs["arms"], len(pairs["arms"])
    figure = canvas.figure(1.2 + 0.3 * size)
    figure.set_figwidth(max(canvas.WIDTH, 1.6 + 0.42 * size))
    axes = figure.add_subplot()
    for row, column in itertools.permutations(range(size), 2):
        difference, p = pairs["difference"][row][column], pairs["holm_p"][row][column]
        if difference is None or p is None:
            continue
        sure = p < ALPHA
        if sure:
            fill = COLORS["sky"] if difference > 0 else COLORS["amber"]
            axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, color=fill))
        axes.text(
            column,
            row,
            f"{100 * difference:+.1f}",
            ha="center",
            va="center",
            fontsize=7,
            color=ON_FILL if sure else MUTED,
        )
    axes.set_xlim(-0.5, size - 0.5)
    axes.xaxis.tick_top()
    slanted = {"rotation": 45, "ha": "left", "va": "center", "rotation_mode": "anchor"}
    axes.set_xticks(range(size), names, **slanted)
    axes.set_yticks(range(size), names)
    axes.set_ylim(size - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    caption = (
        "Accuracy of the row minus accuracy of the column, in points. Filled where the difference "
        f"is significant (McNemar, Holm over all pairs, p < {ALPHA:g}): blue, the row is better; "
        "orange, the column is."
    )
    return Plot("significance", caption, figure, wide=size > 8)


def _cost(results: Results) -> Plot | None:
    # An arm with a part from elsewhere has no known cost.
    known = {n: arm for n, arm in results["arms"].items() if arm["train_seconds"] is not None}
    found = {
        name: (arm["train_seconds"] + arm["eval_seconds"], 100 * arm["accuracy"])
        for name, arm in known.items()
        if name not in CONTROLS and arm["train_seconds"] + arm["eval_seconds"] > 0
    }
    if len(found) < 2:
        return None
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = canvas.figure(3.6)
    axes = figure.add_subplot()
    for name, (seconds, value) in found.items():
        _, color, marker = ROLES[canvas.role(name, results["arms"][name])]
        axes.plot(seconds, value, marker, color=color, markersize=7)
    axes.set_xscale("log")
    seconds_N, values_N = zip(*found.values(), strict=True)
    ratio = max(seconds_N) / min(seconds_N)
    axes.xaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10])
        if ratio < 5
        else LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 300 else (1.0,))
    )
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.16)
    axes.set_ylim(0, 105)
    axes.set_xlabel("training + evaluation in seconds")
    axes.set_ylabel("accuracy in %")
    canvas.legend_of_roles(figure, [canvas.role(name, results["arms"][name]) for name in found])
    canvas.label_points(figure, axes, seconds_N, values_N, list(found))
    caption = "Cost against accuracy; controls are left out."
    return Plot("cost", caption, figure)

"""Time and memory of every provider beside plain torch, as a picture.

python kernels/bench/plot.py runs/gpu-bench/bench.csv
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from report import shape_of
from table import Row, read

COLOURS = {"rag2_triton": "#0b6e4f", "rag2_torch": "#7bc8a4", "plain": "#444444"}


def draw(rows: list[Row], path: Path) -> None:
    """A panel a shape and a bar a provider: left p50 over plain torch's, right the peak in MiB."""
    shapes: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["of_plain"]:
            shapes.setdefault((row["op"], shape_of(row)), []).append(row)
    if not shapes:
        return
    bars = [len(group) for group in shapes.values()]
    figure = Figure(figsize=(8, 0.2 * sum(bars) + 0.35 * len(bars)), layout="constrained", dpi=110)
    panels = figure.subplots(len(shapes), 2, squeeze=False, height_ratios=[n + 1 for n in bars])
    for (left, right), ((op, shape), group) in zip(panels, shapes.items(), strict=True):
        names = [row["provider"] for row in group]
        colours = [COLOURS.get(name, "#b0b0b0") for name in names]
        for panel, column, unit in ((left, "of_plain", "of plain"), (right, "peak_mib", "MiB")):
            values = [max(float(row[column] or 0), 0.0) for row in group]
            drawn = panel.barh(names, values, color=colours)
            panel.bar_label(drawn, [f" {value:,.3g} {unit}" for value in values], fontsize=7)
            panel.margins(x=0.25)
            panel.invert_yaxis()
            panel.set_xticks([])
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right", "bottom"]].set_visible(False)
        left.set_title(f"{op}: {shape}", fontsize=7, loc="left")
        right.set_yticks([])
    figure.savefig(path)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    draw(read(source), source.with_suffix(".png"))

"""log.jsonl of a fine-tuning run -> how it learned: loss by step, perplexity after each epoch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag2.evaluation import canvas
from rag2.evaluation.canvas import COLORS, MUTED, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
PLACE = "plots/learning.png"  # in the run's directory


def draw(directory: Path) -> None:
    """Write plots/learning.png into the directory of a finished run with validation."""
    lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if not rows:
        return
    with canvas.style():
        picture = canvas.draw(plot(rows))
    path = directory / PLACE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture.png)


def plot(rows: Rows) -> Plot:
    """Loss by step above, held-out perplexity below; lines where an epoch ends.

    A training loss that falls at once where an epoch begins tells of rows learned by heart, as in
    the loss figure of Ovadia et al. 2024.
    """
    figure = canvas.figure(4.2)
    above, below = figure.subplots(2, sharex=True)
    # The loss of step s is that of the weights after s updates, a validation that of s + 1.
    above.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=COLORS["blue"])
    above.set_ylabel("training loss in nats")
    steps, values = zip(*perplexities(rows), strict=True)
    below.plot(steps, values, color=COLORS["orange"], marker="o", markersize=4)
    below.set_ylabel("held-out perplexity")
    below.set_xlabel("updates")
    for axes in (above, below):
        _mark(axes, borders(rows))
    caption = "Training loss by step and perplexity of what is held out; dotted: an epoch ends."
    return Plot("learning", caption, figure)


def perplexities(rows: Rows) -> list[tuple[int, float]]:
    """(updates made, exp of the mean held-out loss) for each validation, that before any first."""
    found = [(0, row["validation_nll_before"]) for row in rows if "validation_nll_before" in row]
    found += [(row["step"] + 1, row["validation_nll"]) for row in rows if "validation_nll" in row]
    return [(step, math.exp(min(nll, 700))) for step, nll in found]


def borders(rows: Rows) -> list[int]:
    """The steps that begin a new epoch."""
    pairs = zip(rows, rows[1:], strict=False)
    return [row["step"] for before, row in pairs if row["epoch"] > before["epoch"]]


def _mark(axes: "Axes", steps: Sequence[int]) -> None:
    for step in steps:
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=":")

"""How figures look, and a matplotlib figure -> SVG for the page, PNG for a folder.

Figures are made by the object API and drawn inside `style()`, so that no state of matplotlib's
outlives them. matplotlib is imported when a figure is drawn: it is slow, and builds a cache of
fonts at its first import. Colours are Okabe and Ito's, which people with any colour vision tell
apart; in the SVG each is a variable of the page, which has a lighter set for dark screens.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from rag2.evaluation.contrasts import CONTROLS, holds
from rag2.evaluation.verdict import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.2  # inches; half a page, so that letters stay legible where a phone scales it down
INK, MUTED, GRID = "#1b1f24", "#6a737d", "#d0d5da"
COLORS = {
    "orange": "#d55e00",
    "blue": "#0072b2",
    "green": "#009e73",
    "purple": "#aa4499",
    "sky": "#56b4e9",
    "amber": "#e69f00",
    "gray": "#7f868d",
}
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {v: k for k, v in COLORS.items()}
# role of an arm -> its legend, colour and marker; a role is told twice, by colour and by shape
ROLES = {
    "joint": ("jointly trained", COLORS["orange"], "D"),
    "half": ("one half jointly trained", COLORS["purple"], "v"),
    "rag": ("retrieval", COLORS["blue"], "o"),
    "closed": ("closed book", COLORS["green"], "s"),
    "control": ("control", COLORS["gray"], "X"),
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with the words that stand below it; `wide` asks for the page's whole width."""

    name: str
    caption: str
    figure: "Figure"
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot drawn: an <svg> element whose colours are the page's, and the bytes of a PNG."""

    caption: str
    svg: str
    png: bytes
    wide: bool


def role(name: str, arm: Results) -> str:
    """What an arm is among the others: a key of ROLES."""
    if name in CONTROLS:
        return "control"
    if name == "joint":
        return "joint"
    if holds(arm, "joint"):
        return "half"
    return "rag" if arm["retriever"] else "closed"


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings for our figures, and afterwards as they were."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: it can be read out, searched and copied
        "text.parse_math": False,  # a dollar sign in a name is no formula
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.color": MUTED,
        "ytick.labelcolor": INK,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that the font lacks; the page shows it in the reader's own font.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def figure(height: float) -> "Figure":
    """An empty figure, `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def draw(plot: Plot) -> Picture:
    """The picture of a plot; call it inside `style()`, where the plot was made."""
    return Picture(plot.caption, _svg(plot), _png(plot.figure), plot.wide)


def _svg(plot: Plot) -> str:
    """An <svg> element for a page that defines the colours as variables."""
    import matplotlib

    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": plot.name}):  # ids differ from other figures'
        plot.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # group ids are numbers that other figures use too
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(plot.caption)}"', 1)


def _png(figure: "Figure") -> bytes:
    """A PNG on white, 200 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def looks(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Colour, marker and dashes of a line for each name: joint's own, controls gray."""
    colors = [*(COLORS[name] for name in ("blue", "green", "purple", "sky")), INK]
    turns = itertools.product(("-", "--", "-."), zip(colors, "os^vP", strict=True))
    grays = itertools.cycle("xdp")
    for name in names:
        if name == "joint":
            yield {"color": COLORS["orange"], "marker": "D", "linestyle": "-", "label": name}
        elif name in CONTROLS:
            gray = COLORS["gray"]
            yield {"color": gray, "marker": next(grays), "linestyle": ":", "label": name}
        else:
            dashes, (color, marker) = next(turns)
            yield {"color": color, "marker": marker, "linestyle": dashes, "label": name}


def legend_of_roles(figure: "Figure", roles: Sequence[str]) -> None:
    """One line below the axes that tells the roles in use."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=label)
        for key, (label, color, marker) in ROLES.items()
        if key in roles
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2, handletextpad=0.2
    )


def label_points(
    figure: "Figure",
    axes: "Axes",
    x_N: Sequence[float],
    y_N: Sequence[float],
    names: Sequence[str],
) -> None:
    """Write a name beside each point: at the nearest place where it covers no point and no name.

    A name that had to go further gets a line to its point.
    """
    figure.draw_without_rendering()  # only now is it settled where points lie
    points = axes.transData.transform(list(zip(x_N, y_N, strict=True))).tolist()
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in points]
    scale = 72 / figure.dpi  # points, unlike pixels, stay as far apart when saved at another dpi
    left, bottom, right, top = axes.get_window_extent().extents
    frame = (left, bottom, right, top)
    for (x, y), where, name in sorted(zip(points, zip(x_N, y_N, strict=True), names, strict=True)):
        text = axes.annotate(
            name,
            where,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
        )
        text.set_in_layout(False)
        size = text.get_window_extent()
        boxes = [_box(x + dx, y + dy, size.width, size.height) for dx, dy in _around(size.width)]
        free = (
            box
            for box in boxes
            if _inside(box, frame) and not any(_overlap(box, other) for other in taken)
        )
        box = next(free, boxes[0])  # on a full plot names may overlap
        taken.append(box)
        dx, dy = (box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y
        text.set_position((dx * scale, dy * scale))
        if box not in boxes[:4]:
            axes.annotate(
                "",
                where,
                (dx * scale, (dy - math.copysign(size.height / 2, dy)) * scale),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.5},
            ).set_in_layout(False)


Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


def _around(width: float) -> list[tuple[float, float]]:
    """Where a name's middle may stand from its point, best first: beside it, then ever further."""
    beside = [(10 + width / 2, 0.0), (-10 - width / 2, 0.0), (0.0, 16.0), (0.0, -16.0)]
    grid = itertools.product(range(-240, 241, 12), range(-240, 241, 8))
    return beside + sorted(grid, key=lambda place: abs(place[0]) + 2 * abs(place[1]))


def _box(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _inside(a: Box, b: Box) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

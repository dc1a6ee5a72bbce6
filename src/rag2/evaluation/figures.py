"""Cells of results.json -> numbers that know where they are from, through arithmetic and text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rag2.evaluation.verdict import Results


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its formula over names such as `arms.joint.accuracy`, with the cells in it."""

    value: float
    source: str
    cells: frozenset[tuple[str, str]] = frozenset()
    """(arm, key) of every cell"""

    def __add__(self, other: "Figure") -> "Figure":
        return self._with(other, "+", self.value + other.value)

    def __sub__(self, other: "Figure") -> "Figure":
        return self._with(other, "-", self.value - other.value)

    def __truediv__(self, other: "Figure") -> "Figure":
        return self._with(other, "/", self.value / other.value)

    def _with(self, other: "Figure", sign: str, value: float) -> "Figure":
        left, right = (f"({f.source})" if " " in f.source else f.source for f in (self, other))
        return Figure(value, f"{left} {sign} {right}", self.cells | other.cells)


class Cells:
    """The arms of results.json by name and key."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.arms: Mapping[str, Any] = results["arms"]

    def __call__(self, arm: str, key: str) -> Figure | None:
        """A number of an arm, `latency_ms.p50` being inside a key; None where there is none."""
        found: Any = self.arms[arm]
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, (int, float)) or isinstance(found, bool):
            return None
        return Figure(float(found), f"arms.{arm}.{key}", frozenset({(arm, key)}))

    def known(self, arms: list[str], key: str) -> dict[str, Figure]:
        """The arms that have a number there."""
        found = {arm: self(arm, key) for arm in arms}
        return {arm: figure for arm, figure in found.items() if figure is not None}


class Missing(NamedTuple):
    """What the table does not say, and the command that would measure it."""

    what: str
    command: str


@dataclass(slots=True)
class Answer:
    """Sentences, and behind them every number shown, the arms named and what is not known."""

    question: str
    title: str
    sentences: list[str] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    cells: set[tuple[str, str]] = field(default_factory=set)
    missing: list[Missing] = field(default_factory=list)

    def show(self, figure: Figure, form: Callable[[float], str]) -> str:
        """A number as it is written; it is noted with its formula."""
        shown = form(figure.value)
        noted = {"shown": shown, "value": figure.value, "from": figure.source}
        if noted not in self.figures:
            self.figures.append(noted)
        self.cells |= figure.cells
        return shown

    @property
    def arms(self) -> list[str]:
        """The rows that were used, in the order of their names."""
        return sorted({arm for arm, _ in self.cells})

    @property
    def keys(self) -> list[str]:
        """The columns that were used."""
        return sorted({key for _, key in self.cells})

    def row(self) -> dict[str, Any]:
        """The answer as JSON has it."""
        return {
            "question": self.question,
            "answer": " ".join(self.sentences),
            "arms": self.arms,
            "keys": self.keys,
            "figures": self.figures,
            "missing": [missing._asdict() for missing in self.missing],
        }

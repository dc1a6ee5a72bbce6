"""A sweep: one recipe over the product of its settings, and what is on disk is not done again.

**Which recipe.** The one in the first line of CONFIG.yaml, where every shipped config has the
command that uses it: `# rag2 eval compare -c ...`. Another file is refused with that line to write.

**Cells.** `key=a,b,c` is an axis, `key=a` is fixed, and the cells are the product. Commas in
brackets, braces and quotes belong to the value; `seed,world.seed=0,1` varies two keys together.
Every cell's configuration, and that of every stage it may need, is validated before the first one
runs; two cells that would compute the same are refused.

**Unchanged** means: the same key, which is the SHA-256 of rag2's version, the recipe's name, the
resolved settings (without those that say where and how: out, home, recipes, jobs, resume), the
content of every local file and folder that the settings name, and the keys of the world's stages
the recipe may use (their YAML and `stage` settings). Not in it: edits of the source without a new
version, a model on the hub that changed under its name, the numbers of threads, the machine. A cell
lies in OUT/cells/NAME-KEY and is done when its cell.json, written after everything else, says so
for that key and its results have the SHA-256 noted there. Changed inputs make another key and with
it another directory; no result is ever overwritten by a different one.

**Resuming.** The same command again does what is missing. A training cell that was killed goes on
from its checkpoint, a world's stage too; an evaluation is begun again. One process at a time works
in OUT. A cell that fails is named at the end, the others go on.

**Sharing.** Each cell has a home of its own that holds links: a stage lies in OUT/stages/NAME-KEY
and is trained once for all cells that agree in what decides it. One that is complete in the
config's `home` and has the same key is used there, and nothing is written to that home.

**Output.** sweep.json, sweep.csv (a row per cell, or per cell and arm) and, where an evaluation
tells its accuracy for every K, by_k.csv; each replaced atomically after every cell. They hold the
cells of the last command; the others stay on disk until a command asks for them.
"""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag2 import artifact, config, stages
from rag2.registry import UserError
from rag2.sweep import axes as axes_of
from rag2.sweep import table
from rag2.sweep.axes import Axis
from rag2.sweep.cell import Cell, Recipe, plan

FORMAT = "rag2.sweep/1"
OUT = "runs/sweep"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A validated sweep: where it lies, its axes, its cells."""

    out: Path
    config: str
    recipe: Recipe
    axes: Sequence[Axis]
    cells: Sequence[Cell]

    @classmethod
    def of(cls, file: str, words: Sequence[str]) -> "Sweep":
        """The sweep of a config file and `key=a,b,c` words.

        Raises UserError for a mistake in any cell.
        """
        path = config.find(file)
        axes = axes_of.parse(words)
        given = {key: axis.values for axis in axes for key in axis.keys}
        for key in ("out", "home"):
            if len(given.get(key, ())) > 1:
                raise UserError(f"{key} cannot be swept: the cells share it")
        recipe = Recipe.of(path)
        out = Path(_out(given)).absolute()
        if out.exists() and not out.is_dir():
            raise UserError(f"out={out} is a file, not a directory")
        digests: dict[str, str] = {}
        cells: dict[str, Cell] = {}
        swept = axes_of.swept(axes)
        for settings in axes_of.product(axes):
            cfg = config.load(recipe.cls, str(path), [f"{k}={v}" for k, v in settings.items()])
            cell = plan(recipe, cfg, {key: settings[key] for key in swept}, out, digests)
            if twin := cells.get(cell.key):
                raise UserError(
                    f"two cells would compute the same: ({twin.label()}) and ({cell.label()})"
                )
            cells[cell.key] = cell
        return cls(out, file, recipe, axes, list(cells.values()))

    def states(self) -> str:
        """Every cell and whether it is done, as a Markdown table."""
        rows: list[table.Row] = [{**cell.head(), "state": _state(cell)} for cell in self.cells]
        return table.markdown(rows, [*rows[0]])

    def run(self) -> dict[str, str]:
        """Run what is not done; returns cell -> reason for those that failed.

        Raises UserError while another process works in `out`.
        """
        failed: dict[str, str] = {}
        with _alone(self.out):
            for cell in self.cells:
                if not cell.is_done():
                    try:
                        self._make(cell)
                    except UserError as error:
                        failed[cell.label()] = getattr(error, "reason", str(error))
                self.write(failed)
        return failed

    def rows(self, failed: dict[str, str] | None = None, kind: str = "rows") -> list[table.Row]:
        """The figures of the finished cells and the errors of the failed ones."""
        found: list[table.Row] = []
        for cell in self.cells:
            head, mark = cell.head(), cell.mark()
            if reason := (failed or {}).get(cell.label()):
                found += [head | {"error": reason}] if kind == "rows" else []
            elif mark and mark["done"]:
                tail = {"wall_seconds": mark["wall_seconds"]} if kind == "rows" else {}
                found += [head | row | head | tail for row in mark[kind]]
        return found

    def report(self, failed: dict[str, str]) -> str:
        """The figures as a Markdown table."""
        return table.markdown(self.rows(failed), axes_of.swept(self.axes))

    def write(self, failed: dict[str, str]) -> None:
        """Replace sweep.json, sweep.csv and by_k.csv where their content has changed."""
        rows, by_k = self.rows(failed), self.rows(failed, "by_k")
        summary = {
            "format": FORMAT,
            "recipe": f"{self.recipe.group} {self.recipe.name}",
            "config": self.config,
            "axes": [
                {"keys": axis.keys, "values": axis.values}
                for axis in self.axes
                if axis.keys != ("out",)
            ],
            "cells": len(self.cells),
            "rows": rows,
            "by_k": by_k,
        }
        _replace(self.out / "sweep.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        _replace(self.out / "sweep.csv", table.as_csv(rows))
        if by_k:
            _replace(self.out / "by_k.csv", table.as_csv(by_k))
        else:
            (self.out / "by_k.csv").unlink(missing_ok=True)

    def _make(self, cell: Cell) -> None:
        began = time.perf_counter()
        cell.begin(self.out / "stages")
        stages.run([cell.job()], 1, lambda _: None)
        figures: dict[str, Any]
        figures, files = table.read(cell.directory, cell.recipe.name)
        cell.finish({**figures, "wall_seconds": time.perf_counter() - began}, files)


def _out(given: Mapping[str, Sequence[str]]) -> str:
    """The value of `out`, as a recipe would read it."""

    class Place(config.Config):
        out: str = OUT

    return config.load(Place, None, [f"out={text}" for text in given.get("out", ())]).out


def _state(cell: Cell) -> str:
    if cell.is_done():
        return "done"
    return "begun" if cell.mark() else "to do"


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, and not at all if it says that already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        artifact.replace(path, text)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One sweep at a time works in a directory; the lock goes with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another sweep is running there") from None
        yield

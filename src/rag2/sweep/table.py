"""What the recipes wrote -> rows of figures: sweep.json, sweep.csv, by_k.csv, a Markdown table."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag2.artifact import MANIFEST
from rag2.registry import UserError
from rag2.training.log import train_seconds

Row = dict[str, Any]
# What the table on the terminal shows beside the swept keys; the files have everything.
TOLD = (
    *("arm", "k", "accuracy", "ci95_low", "ci95_high"),
    *("recall_at_1", "recall_at_5", "loss", "validation_nll"),
)


def read(directory: Path, recipe: str) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows (`rows`, and `by_k` where K was varied) of a finished run, and their files.

    results.json gives a row per arm, RECIPE.json a row per entry, a training run its last step and
    what its final/ says of itself. Raises UserError when there is none of these.
    """
    if (directory / "results.json").is_file():
        results = _json(directory / "results.json")
        arms: dict[str, Any] = results["arms"]
        rows = [{"arm": name, "n": results["n"], **_figures(arm)} for name, arm in arms.items()]
        by_k = [
            {"arm": name, "reading": reading, **_figures(point)}
            for name, arm in arms.items()
            for reading, points in (arm.get("by_k") or {}).items()
            for point in points
        ]
        return {"rows": rows, "by_k": by_k}, ["results.json"]
    name = f"{recipe}.json"
    if (directory / name).is_file():
        results = _json(directory / name)
        parts = {key: part for key, part in results.items() if isinstance(part, dict)}
        common = _figures({key: part for key, part in results.items() if key not in parts})
        rows = [{"arm": key, **common, **_figures(part)} for key, part in parts.items()]
        return {"rows": rows or [common], "by_k": []}, [name]
    if not (directory / "final" / MANIFEST).is_file():
        raise UserError(f"{recipe} wrote neither results.json nor {name} nor final/")
    lines = (directory / "log.jsonl").read_text(encoding="utf-8").splitlines()
    row = _figures(json.loads(lines[-1])) if lines else {}
    row.pop("seconds", None)
    row |= _figures(_json(directory / "final" / MANIFEST)["meta"])
    row["train_seconds"] = train_seconds(directory)
    return {"rows": [row], "by_k": []}, ["log.jsonl", f"final/{MANIFEST}"]


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV; the columns are those of the rows, in the order of their first appearance."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(rows: Iterable[Row], swept: Sequence[str]) -> str:
    """The rows as a Markdown table: swept keys, what a result is told by, and errors."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [c for c in columns if c in swept or c in TOLD or "@" in c or c == "error"]
    lines = [shown, ["---"] * len(shown)]
    lines += [[_text(row.get(column)) for column in shown] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(values: Mapping[str, Any]) -> Row:
    """Numbers and words; an interval as its two ends; anything deeper is left to the run's file."""
    row: Row = {}
    for key, value in values.items():
        if key == "ci95" and value:
            row |= {"ci95_low": value[0], "ci95_high": value[1]}
        elif not isinstance(value, (dict, list)):
            row[key] = value
    return row


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _text(value: Any) -> str:
    """A cell of the Markdown table."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")

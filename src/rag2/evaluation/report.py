"""Numbers of an evaluation -> results.json, samples, report.md and the table on the terminal."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rag2 import artifact
from rag2.evaluation.markdown import COLUMNS, cells, markdown
from rag2.evaluation.outcome import ArmResult as ArmResult
from rag2.evaluation.results import CONTROLS
from rag2.evaluation.results import strip_times as strip_times
from rag2.evaluation.results import summarize as summarize
from rag2.evaluation.samples import write_samples
from rag2.evaluation.verdict import Results
from rag2.evaluation.verdict import verdict as verdict
from rag2.registry import UserError


def check(directory: str | Path) -> None:
    """Raise UserError, before the work begins, if the report cannot be written there."""
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise UserError(f"out={str(directory)!r}: {place} is a file, not a directory")


def write(
    directory: str | Path,
    results: Results,
    arms: Sequence[ArmResult] = (),
) -> Path:
    """Write samples_<arm>.jsonl, report.md and, last, results.json; returns the path of that."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        write_samples(directory, arm)
    artifact.replace(directory / "report.md", markdown(results))
    path = directory / "results.json"
    artifact.replace(
        path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return path


def terminal_table(results: Results) -> Table:
    """The table of arms for a terminal, the verdict as its caption."""
    table = Table(title=f"{results['task']}: {results['n']} questions", caption=verdict(results))
    for column in COLUMNS:
        is_text = column in ("arm", "retriever", "generator")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column == "arm")
    for name, arm in results["arms"].items():
        style = "bold" if name == "joint" else "dim" if name in CONTROLS else None
        table.add_row(*cells(name, arm), style=style)
    return table

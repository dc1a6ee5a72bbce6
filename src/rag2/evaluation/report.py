"""Numbers of an evaluation -> results.json, samples, the reports and the table on the terminal."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from rag2 import artifact
from rag2.evaluation import files
from rag2.evaluation.columns import ARMS, COST, cell
from rag2.evaluation.contrasts import CONTROLS
from rag2.evaluation.curves import Logs
from rag2.evaluation.html import PLACES, Samples, html
from rag2.evaluation.latex import latex
from rag2.evaluation.markdown import markdown
from rag2.evaluation.outcome import ArmResult as ArmResult
from rag2.evaluation.plots import pictures
from rag2.evaluation.results import strip_times as strip_times
from rag2.evaluation.results import summarize as summarize
from rag2.evaluation.samples import write_samples
from rag2.evaluation.verdict import Results
from rag2.evaluation.verdict import verdict as verdict

# What fits on 80 columns; report.md has the others.
TERMINAL = [
    column
    for column in (*ARMS, *COST)
    if column.key in ("accuracy", "ci95", "k", "recall_at_1", "train_seconds")
]


def write(
    directory: str | Path,
    results: Results,
    arms: Sequence[ArmResult] = (),
    *,
    passages: Mapping[int, str] | None = None,
    logs: Logs | None = None,
) -> Path:
    """Write samples_<arm>.jsonl, the reports and, last, results.json; returns the path of that.

    `passages` are chunk texts by id, for the question browser; `logs` the rows of log.jsonl of
    each training stage.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        write_samples(directory, arm)
    samples = files.read_samples(directory, [arm.name for arm in arms])
    render(directory, results, samples, passages or {}, logs or {})
    path = directory / "results.json"
    artifact.replace(
        path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return path


def render(
    directory: Path,
    results: Results,
    samples: Samples,
    passages: Mapping[int, str],
    logs: Logs,
) -> None:
    """Write report.md, report.tex, report.html and plots/*.png into an existing directory."""
    drawn = pictures(results, logs)
    page = html(results, samples, passages, drawn)
    artifact.replace(directory / "report.md", markdown(results))
    artifact.replace(directory / "report.tex", latex(results))
    artifact.replace(directory / "report.html", page)
    folder = directory / "plots"
    for name in itertools.chain(*PLACES.values()):  # an older report may have had other figures
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, picture in drawn.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture.png)


def terminal_table(results: Results) -> Table:
    """The table of arms for a terminal of 80 columns, the verdict as its caption."""
    table = Table(title=f"{results['task']}: {results['n']} questions", caption=verdict(results))
    table.add_column("arm", overflow="fold")
    for column in TERMINAL:
        table.add_column(column.title, justify="right", no_wrap=True)
    for name, arm in results["arms"].items():
        style = "bold" if name == "joint" else "dim" if name in CONTROLS else None
        table.add_row(name, *(cell(arm, column) for column in TERMINAL), style=style)
    return table

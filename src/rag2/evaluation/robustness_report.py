"""Numbers of robustness.json -> that file, robustness.md and the table on the terminal."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rag2 import artifact
from rag2.evaluation.results import tidy
from rag2.evaluation.verdict import interval, percent, points

Row = Mapping[str, Any]
# Heading, place in an arm's numbers, how it is written.
Column = tuple[str, tuple[str, ...], Callable[[Row], str]]


def _rate(row: Row) -> str:
    change = row.get("to_base")
    more = change and f", {points(change['difference'])} {interval(change['ci95'], points)}"
    return f"{percent(row['rate'])} {interval(row['ci95'])}{more or ''} (n {row['n']})"


def _number(row: Row) -> str:
    return f"{row['value']:.3f} {interval(row['ci95'], lambda x: f'{x:.3f}')}"


def _nats(row: Row) -> str:
    bounds = row["ci95"] and f" {interval(row['ci95'], lambda x: f'{x:.3f}')}"
    change = row.get("to_base")
    more = change and f", {change['difference']:+.3f}"
    if change and change["ci95"]:
        more = f"{more} {interval(change['ci95'], lambda x: f'{x:+.3f}')}"
    return f"{row['per_token']:.3f}{bounds or ''}{more or ''}; {row['per_word']:.2f}"


def _threshold(row: Row) -> str:
    met = "" if row["reached"] else ", not reached"
    return f"{row['value']:.3f} ({percent(row['precision'])} of {percent(row['coverage'])}{met})"


SECTIONS: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    (
        "Forgetting",
        "Control questions, and nats per token; per word of text by the generator alone.",
        (
            ("test accuracy", ("accuracy",), _rate),
            ("control accuracy", ("control",), _rate),
            ("unrelated text", ("perplexity", "unrelated"), _nats),
        ),
    ),
    (
        "Abstention",
        "An arm keeps silent below the threshold, chosen on validation (there: right among the "
        "answered, of how many).",
        (
            ("threshold", ("abstention", "threshold"), _threshold),
            ("coverage", ("abstention", "coverage"), _rate),
            ("right where answered", ("abstention", "selective_accuracy"), _rate),
            ("answered wrong", ("abstention", "confident_wrong"), _rate),
            ("absent: silent", ("abstention", "absent_abstained"), _rate),
            ("absent: answered wrong", ("abstention", "absent_confident_wrong"), _rate),
        ),
    ),
    (
        "Confidence",
        "Does confidence tell right from wrong, answerable from absent (AUROC), and is it as high "
        "as the arm is right (expected calibration error)?",
        (
            ("AUROC right", ("abstention", "auroc_right"), _number),
            ("AUROC answerable", ("abstention", "auroc_answerable"), _number),
            ("calibration error", ("abstention", "calibration_error"), _number),
        ),
    ),
    (
        "Style and consistency",
        "Nats per token; per word. The same answer in every wording. Is the written text a choice "
        "of the question, or of any?",
        (
            ("held-out documents", ("perplexity", "held_out"), _nats),
            ("paraphrases", ("perplexity", "paraphrases"), _nats),
            ("same in all wordings", ("consistency", "same_choice"), _rate),
            ("right in all", ("consistency", "all_right"), _rate),
            ("wrote a choice", ("format", "a_choice"), _rate),
            ("wrote a value", ("format", "a_value"), _rate),
            ("wrote the answer", ("format", "right"), _rate),
        ),
    ),
    (
        "Faithfulness",
        "The fact is changed in the corpus: of the questions answered right before, the answer "
        "follows, is stuck, or is another.",
        (
            ("followed", ("faithfulness", "followed"), _rate),
            ("stuck", ("faithfulness", "stuck"), _rate),
            ("other", ("faithfulness", "other"), _rate),
            ("edit was read", ("faithfulness", "edit_read"), _rate),
            ("followed where read", ("faithfulness", "followed_where_read"), _rate),
        ),
    ),
)
# Heading, place, for a terminal of 80 columns.
BRIEF = (
    ("right", ("accuracy", "rate")),
    ("control", ("control", "rate")),
    ("nats", ("perplexity", "unrelated", "per_token")),
    ("silent", ("abstention", "absent_abstained", "rate")),
    ("c.wrong", ("abstention", "absent_confident_wrong", "rate")),
    ("same", ("consistency", "same_choice", "rate")),
    ("format", ("format", "a_value", "rate")),
    ("follows", ("faithfulness", "followed", "rate")),
)


def write(directory: Path, results: Row) -> None:
    """Write robustness.md and, last, robustness.json into an existing directory."""
    artifact.replace(directory / "robustness.md", markdown(results))
    text = json.dumps(tidy(results), indent=2, ensure_ascii=False, allow_nan=False)
    artifact.replace(directory / "robustness.json", text + "\n")


def markdown(results: Row) -> str:
    """The report: a table for each section, and what was left out."""
    blocks = [
        f"# Robustness on {results['task']}",
        f"{results['n']['test']} test questions, seed {results['seed']}. Brackets are 95 % "
        "intervals; a signed number after them is the difference to base, in points or nats.",
    ]
    for title, says, columns in SECTIONS:
        kept = [c for c in columns if any(_at(a, c[1]) for a in results["arms"].values())]
        if not kept:
            continue
        rows = [["arm", *(title for title, _, _ in kept)], ["---"] * (1 + len(kept))]
        for name, arm in results["arms"].items():
            found = [(_at(arm, at), form) for _, at, form in kept]
            rows.append([name, *("-" if row is None else form(row) for row, form in found)])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        blocks += [f"## {title}", says, table]
        if title == "Faithfulness" and results["no_edit"]:
            counts = "; ".join(f"{reason}: {n}" for reason, n in results["no_edit"].items())
            blocks.append(f"Test questions without an edit: {counts}.")
    if results["left_out"]:
        lines = "\n".join(f"- {what}: {why}" for what, why in results["left_out"].items())
        blocks += ["## Left out", lines]
    return "\n\n".join(blocks) + "\n"


def terminal_table(results: Row) -> Table:
    """The table of arms for a terminal of 80 columns."""
    table = Table(
        title=f"{results['task']}: {results['n']['test']} questions",
        caption="absent questions: silent, confidently wrong (c.wrong); intervals: robustness.md",
    )
    table.add_column("arm", overflow="fold")
    for title, _ in BRIEF:
        table.add_column(title, justify="right", no_wrap=True)
    for name, arm in results["arms"].items():
        values = ((title, _at(arm, at)) for title, at in BRIEF)
        table.add_row(
            name,
            *(
                "-" if v is None else f"{v:.2f}" if title == "nats" else f"{100 * v:.1f}"
                for title, v in values
            ),
        )
    return table


def _at(row: Any, path: Sequence[str]) -> Any:
    """What lies at a path of keys; None where a part of it is missing."""
    for key in path:
        row = row.get(key) if row is not None else None
    return row

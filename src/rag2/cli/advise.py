"""`rag2 advise RESULTS`: what a comparison's numbers answer to who has to choose an arm."""

import json
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rag2.registry import UserError

if TYPE_CHECKING:
    from rag2.evaluation.figures import Answer


def advise(
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="A results.json, or its directory.")
    ],
    alpha: Annotated[
        float | None,
        typer.Option(help="Call two arms different below this p value; without it, no arm is."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer five questions from a comparison's table: which arm for which knowledge and means.

    How stable the knowledge is, what resources there are, how often it changes, whether answers
    must be checked, whether accuracy is what counts. Every number is of the table or of a formula
    over it, and each answer names its rows and columns; what is not in the table is said with the
    command that would measure it.

    \b
    Examples:
      rag2 advise runs/compare
      rag2 advise runs/compare/results.json --alpha 0.05
      rag2 advise runs/demo --json
    """
    from rag2.evaluation import advice, files

    if alpha is not None and not 0 < alpha < 1:
        raise UserError(f"--alpha {alpha}: a p value between 0 and 1")
    path = results / "results.json" if results.is_dir() else results
    table = files.read_file(path, str(results))
    answers = advice.advise(table, f"rag2 eval compare -c {_made_with(path.parent)}", alpha)
    if as_json:
        rows = [answer.row() for answer in answers]
        head = {"format": advice.FORMAT, "results": str(path), "task": table["task"]}
        typer.echo(json.dumps(head | {"n": table["n"], "answers": rows}, ensure_ascii=False))
        return
    typer.echo(f"{table['task']}: {table['n']} questions, {len(table['arms'])} arms ({path})")
    for number, answer in enumerate(answers, 1):
        typer.echo(f"\n{number}. {answer.title}\n" + _written(answer))


def _made_with(directory: Path) -> str:
    """The settings of the comparison that wrote there, or what stands for them."""
    from rag2 import config

    saved = directory / "config.yaml"
    with suppress(UserError):
        if saved.is_file() and "generators" in config.read(saved):
            return str(saved)
    return "CONFIG.yaml"


def _written(answer: "Answer") -> str:
    """The sentences, what they are from, and what is not known."""
    paragraphs = [" ".join(answer.sentences)] if answer.sentences else []
    if answer.cells:
        paragraphs.append(f"From {', '.join(answer.arms)}: {', '.join(answer.keys)}.")
    paragraphs += [f"Not in the table: {what}. Measure: {how}" for what, how in answer.missing]
    return "\n".join(
        textwrap.fill(
            paragraph,
            100,
            initial_indent="   ",
            subsequent_indent="   ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for paragraph in paragraphs
    )

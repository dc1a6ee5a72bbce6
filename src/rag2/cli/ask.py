"""`rag2 ask`: one question to an export, on the terminal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rag2.cli.terminal import one_of, status
from rag2.registry import UserError

if TYPE_CHECKING:
    from rag2.answering.ask import Answer

BAR = 20  # characters of a posterior of 1


def ask(
    export: Annotated[
        Path,
        typer.Argument(metavar="EXPORT", help="What `rag2 export` wrote, a joint run or a demo."),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")],
    k: Annotated[
        int | None, typer.Option(min=0, max=64, help="Chunks to read; 0: the closed book.")
    ] = None,
    reading: Annotated[
        str | None, typer.Option(help="How they are read: marginal, token or concat.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where a server's changes of documents live.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The answer as one JSON object.")] = False,
) -> None:
    """Answer a question and show the chunks it stands on, with the posterior of each.

    \b
    Examples:
      rag2 ask runs/demo "Where is Lillan Works located?"
      rag2 ask exports/almanac "When is Lollund Hill inundated?" --k 2 --json
    """
    from rag2.answering.settings import READINGS

    one_of("--reading", reading, READINGS)
    if not question.strip():
        raise UserError("QUESTION is empty")
    with status("loading") as shown:
        from dataclasses import asdict

        from transformers.utils import logging

        from rag2.answering.rag import Rag
        from rag2.export.beside import exported

        logging.disable_progress_bar()
        with Rag.from_pretrained(exported(export, shown.update), state) as rag:
            answer = rag.answer(question, k=k, reading=reading)
    if as_json:
        typer.echo(json.dumps(asdict(answer) | {"logp": answer.logp}))
        return
    typer.echo(answer.text)
    for line in _cited(answer):
        typer.echo(line)


def _cited(answer: "Answer") -> list[str]:
    """A line for each chunk, that with the highest posterior first."""
    lines = []
    order = sorted(answer.citations, key=lambda cited: -(cited.posterior or 0.0))
    for cited in order:
        share = "" if cited.posterior is None else f"{cited.posterior:6.1%}"
        bar = "#" * round(BAR * (cited.posterior or 0.0))
        space = f"{cited.namespace}: " if cited.namespace else ""
        place = f"{space}{cited.document} [{cited.start}:{cited.end}]"
        lines.append(f"  {share:>6} {bar:<{BAR}} {place}  {cited.text[:80]!r}")
    return lines

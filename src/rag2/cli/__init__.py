"""Command line -> the recipe or library call it names; every heavy import waits for its command."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from rag2 import __version__
from rag2.cli.advise import advise
from rag2.cli.ask import ask
from rag2.cli.export import export
from rag2.cli.kb_changes import commands as kb_commands
from rag2.cli.recipes import groups, run_recipe
from rag2.cli.serve import serve
from rag2.cli.terminal import SETTINGS, status
from rag2.registry import UserError

app = typer.Typer(**SETTINGS)
app.add_typer(kb_commands, name="kb")
app.command()(advise)
app.command()(export)
app.command()(serve)
app.command()(ask)
for _group, _commands in groups():
    app.add_typer(_commands, name=_group)


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit 0 on success, 2 with one `error:` line for a user's mistake, 130 if cut."""
    try:
        code = app(args=argv, prog_name="rag2", standalone_mode=False)
    except TyperException as error:
        _fail(_complaint(error))
    except UserError as error:
        _fail(" ".join(str(error).splitlines()))
    except OSError as error:
        from rag2.config import blame

        _fail(blame(error))
    else:
        if code == 130:  # what typer makes of KeyboardInterrupt
            typer.echo("error: interrupted", err=True)
        raise SystemExit(code or 0)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Train a retriever and a generator together, end to end, on your own documents.

    \b
    Examples:
      rag2 demo --out runs/demo
      rag2 kb build docs.sqlite docs/*.md
      rag2 train joint -c configs/demo/joint.yaml steps=60 out=runs/joint
      rag2 eval compare -c configs/demo/compare.yaml out=runs/compare
      rag2 advise runs/compare
      rag2 export runs/demo exports/almanac
      rag2 serve exports/almanac
      rag2 ask exports/almanac "Where is Lillan Works located?"
      rag2 sweep -c configs/demo/compare.yaml seed,world.seed=0,1,2 out=runs/seeds
    """
    if version:
        typer.echo(f"rag2 {__version__}")
    elif context.invoked_subcommand is None:
        raise UserError(f"missing command; {_commands_of(context)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything it makes.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the world and of training.")] = 0,
) -> None:
    """Generate a small closed world, train every arm on it and compare them in one table.

    \b
    Examples:
      rag2 demo
      rag2 demo --out runs/other --seed 1
    """
    where = json.dumps(str(out), ensure_ascii=False)  # a JSON string is a YAML string
    settings = [f"home={where}", f"out={where}", f"seed={seed}", f"world.seed={seed}"]
    run_recipe("eval", "compare", ["-c", "configs/demo/compare.yaml", *settings])


@app.command()
def task(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the data set.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Its folder, as downloaded.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory to write.")],
) -> None:
    """Turn a public data set's own files into questions.jsonl and documents.jsonl.

    Names: mmlu, openstax, xquad, fairytale, pubmedqa. What is rejected is listed with the reason;
    if nothing is good, nothing is written and the exit status is 2.

    \b
    Examples:
      rag2 task mmlu data/mmlu tasks/mmlu
      rag2 task xquad data/xquad tasks/xquad
      rag2 kb build xquad.sqlite tasks/xquad/documents.jsonl
    """
    from collections import Counter

    from rag2.evaluation.tasks.write import write

    with status(f"writing {out}"):
        summary = write(name, source, out)
    for reject in summary.rejected:
        typer.echo(f"rejected {reject.place}: {reject.reason}", err=True)
    typer.echo(f"{summary.accepted} accepted + {len(summary.rejected)} rejected = {summary.total}")
    splits = Counter(question.split for question in summary.questions)
    counts = ", ".join(f"{splits[s]} {s}" for s in ("train", "validation", "test") if splits[s])
    shown = f" ({counts})" if counts else ""
    typer.echo(f"{len(summary.questions)} questions{shown}, {len(summary.documents)} documents")


@app.command()
def sweep(
    config: Annotated[
        str,
        typer.Option(
            "-c",
            "--config",
            metavar="CONFIG.yaml",
            help="Config of a recipe; its first line, a comment, is the recipe's command.",
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=A,B,C...", help="Settings and the values to try."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells.")] = False,
) -> None:
    """Run a recipe with every combination of settings; what is on disk and unchanged is kept.

    Writes a row per cell to OUT/sweep.csv. The same command again goes on where it was cut off.

    \b
    Examples:
      rag2 sweep -c configs/demo/compare.yaml seed,world.seed=0,1,2 out=runs/seeds
      rag2 sweep -c configs/demo/joint.yaml lr_retriever=1e-3,2e-3 steps=100,200 out=runs/rates
      rag2 sweep -c configs/demo/compare.yaml stage.joint.steps=100,200 --dry-run
    """
    from rag2.sweep.run import Sweep

    planned = Sweep.of(config, settings or [])
    if dry_run:
        typer.echo(planned.states(), nl=False)
        return
    done = sum(cell.is_done() for cell in planned.cells)
    failed = planned.run()
    typer.echo(planned.report(failed), nl=False)
    run = len(planned.cells) - done - len(failed)
    typer.echo(
        f"\n{done} cells were done, {run} run, {len(failed)} failed: {planned.out}/sweep.csv"
    )
    for label, reason in failed.items():
        typer.echo(f"error: cell {label}: {reason}", err=True)
    if failed:
        raise SystemExit(1)


def _commands_of(context: typer.Context) -> str:
    """The commands of a group, and where more is said of them."""
    names = context.command.list_commands(context)  # type: ignore[attr-defined]
    return f"allowed: {', '.join(names)}; see {context.command_path} --help"


def _complaint(error: TyperException) -> str:
    """What is wrong with the command line, in one line."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    context = getattr(error, "ctx", None)
    if message.startswith("missing command") and context:
        return f"missing command; {_commands_of(context)}"
    return message if message.endswith("?") else f"{message}; see --help"


def _fail(line: str) -> None:
    """End with one line on stderr and exit status 2."""
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(2) from None

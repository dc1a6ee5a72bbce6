"""Command line -> the recipe or library call it names; every heavy import waits for its command."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import TyperException

from rag2 import __version__
from rag2.registry import UserError, nearest

if TYPE_CHECKING:
    from rich.status import Status

    from rag2.kb.build import Summary

# group -> recipe -> what it does, and an example of its use
RECIPES = {
    "train": {
        "pretrain": (
            "Train a base language model from scratch.",
            "configs/demo/pretrain.yaml steps=200 out=runs/base",
        ),
        "retriever": (
            "Warm-start the dual encoder by contrastive learning.",
            "configs/demo/retriever.yaml steps=100 out=runs/retriever",
        ),
        "finetune": (
            "Fine-tune the generator alone, fully or by adapter.",
            "configs/demo/finetune.yaml tuning.name=lora steps=20 out=runs/lora",
        ),
        "joint": (
            "Train retriever and generator together.",
            "configs/demo/joint.yaml steps=60 refresh.every=15 out=runs/joint",
        ),
    },
    "eval": {
        "mc": (
            "Answer multiple-choice questions closed book.",
            "configs/demo/mc.yaml generator=runs/base/final/generator format=letters out=runs/mc",
        ),
        "compare": (
            "Answer the same questions with every arm.",
            "configs/demo/compare.yaml out=runs/compare",
        ),
        "open": (
            "Answer open questions in words, closed book and with retrieval.",
            "configs/hub/open_qwen3.yaml questions=q.jsonl kb=kb.sqlite out=runs/open",
        ),
        "recall": (
            "Measure how often the evidence is retrieved.",
            "configs/demo/recall.yaml retriever=runs/retriever/final/retriever out=runs/recall",
        ),
        "report": (
            "Write the report of a comparison again, from its files.",
            "configs/demo/report.yaml results=runs/compare",
        ),
        "refresh": (
            "Time joint training with no re-index, a sync and an async one.",
            "configs/demo/refresh.yaml out=runs/refresh",
        ),
        "steps": (
            "Time one joint step in one pass and in two, and take its peak memory.",
            "configs/demo/steps.yaml out=runs/steps",
        ),
        "speed": (
            "Time the scoring of choices against lm-evaluation-harness.",
            "configs/demo/speed.yaml out=runs/speed",
        ),
        "scaling": (
            "Measure what an index refresh costs, and plan it for larger corpora.",
            "configs/demo/scaling.yaml out=runs/scaling",
        ),
    },
}

SETTINGS = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(**SETTINGS)
kb = typer.Typer(help="Build and read a knowledge base.", **SETTINGS)
app.add_typer(kb, name="kb")


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit 0 on success, 2 with one `error:` line for a user's mistake, 130 if cut."""
    try:
        status = app(args=argv, prog_name="rag2", standalone_mode=False)
    except TyperException as error:
        _fail(_complaint(error))
    except UserError as error:
        _fail(" ".join(str(error).splitlines()))
    except OSError as error:
        from rag2.config import blame

        _fail(blame(error))
    else:
        if status == 130:  # what typer makes of KeyboardInterrupt
            typer.echo("error: interrupted", err=True)
        raise SystemExit(status or 0)


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
      rag2 sweep -c configs/demo/compare.yaml seed,world.seed=0,1,2 out=runs/seeds
    """
    if version:
        typer.echo(f"rag2 {__version__}")
    elif context.invoked_subcommand is None:
        raise UserError("missing command; see rag2 --help")


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
    _run_recipe("eval", "compare", ["-c", "configs/demo/compare.yaml", *settings])


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

    with _status(f"writing {out}"):
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


KB = Annotated[Path, typer.Argument(metavar="KB", help="The knowledge base, an SQLite file.")]


@kb.command("build")
def kb_build(
    path: KB,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Files or folders.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="What counts tokens: words (nothing to download), or a model's tokenizer:"
            " its folder, its tokenizer.json or its name on the hub."
        ),
    ] = "words",
    tokens: Annotated[int, typer.Option(min=1, help="Longest chunk, in tokens.")] = 128,
    overlap: Annotated[int, typer.Option(min=0, help="Shared by neighbours, in tokens.")] = 16,
    strict: Annotated[bool, typer.Option(help="Exit with 2 if any document is rejected.")] = False,
) -> None:
    """Read documents, cut them into chunks and write a new knowledge base.

    Good documents are kept and bad ones are listed with the reason; if none is good, nothing is
    written and the exit status is 2.

    \b
    Examples:
      rag2 kb build docs.sqlite handbook.md notes/ faq.jsonl
      rag2 kb build docs.sqlite faq.jsonl --tokens 64 --overlap 8 --strict
      rag2 kb build docs.sqlite docs/ --tokenizer BAAI/bge-small-en-v1.5
    """
    from rag2.config import load
    from rag2.kb.build import build
    from rag2.kb.chunk import TokenChunker

    settings = [
        f"tokens={tokens}",
        f"overlap={overlap}",
        f"tokenizer={json.dumps(tokenizer, ensure_ascii=False)}",
    ]
    chunker = load(TokenChunker, None, settings)
    with _status(f"building {path}"):
        summary = build(path, sources, chunker)
    _report(summary)
    if not summary.accepted:
        raise UserError(f"no document was accepted; {path} was not written")
    if strict and summary.rejected:
        raise UserError(f"{len(summary.rejected)} documents were rejected (--strict)")


@kb.command("list")
def kb_list(path: KB) -> None:
    """List the documents: id, number of chunks, title.

    \b
    Example:
      rag2 kb list docs.sqlite
    """
    from collections import Counter

    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        chunks = Counter(chunk.document for chunk in base.chunks())
        for document in base.documents():
            typer.echo(f"{document.id}\t{chunks[document.id]}\t{document.title}")


@kb.command("show")
def kb_show(
    path: KB, id: Annotated[str, typer.Argument(metavar="ID", help="Id of a document.")]
) -> None:
    """Show one document: its title, its metadata and its text, chunk by chunk.

    \b
    Example:
      rag2 kb show docs.sqlite handbook.md
    """
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        found = {document.id: document for document in base.documents()}
        if id not in found:
            raise UserError(f"{path} has no document {id!r}.{nearest(id, found)}")
        document = found[id]
        typer.echo(f"{document.id}\t{document.title}")
        if document.metadata:
            typer.echo(json.dumps(document.metadata, ensure_ascii=False))
        for chunk in base.chunks():
            if chunk.document == id:
                typer.echo(f"\n[{chunk.id}] characters {chunk.start} to {chunk.end}\n{chunk.text}")


@kb.command("search")
def kb_search(
    path: KB,
    query: Annotated[str, typer.Argument(help="Words to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of chunks.")] = 5,
) -> None:
    """Find chunks by their words (BM25), best first: score, chunk id, document, text.

    \b
    Examples:
      rag2 kb search docs.sqlite "how long is the warranty"
      rag2 kb search docs.sqlite "warranty" -k 20
    """
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        for number, score in base.search_text(query, k):
            chunk = base.chunk(number)
            text = " ".join(chunk.text.split())
            typer.echo(f"{score:.2f}\t{chunk.id}\t{chunk.document}\t{text[:100]}")


def _run_recipe(group: str, name: str, words: list[str]) -> None:
    """Run train/NAME.py or eval/NAME.py in this process, as `python FILE words...` would."""
    from rag2.config import recipe

    path = recipe(f"{group}/{name}.py")
    before = sys.argv
    sys.argv = [str(path), *words]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def _command(group: str, name: str, example: str) -> Callable[[typer.Context], None]:
    """The command that hands its words over to a recipe."""

    def command(context: typer.Context) -> None:
        if {"-h", "--help"} & set(context.args):
            typer.echo(f"Example:\n  rag2 {group} {name} -c {example}\n")
        _run_recipe(group, name, context.args)

    return command


def _report(summary: "Summary") -> None:
    """What became of every document."""
    for reject in summary.rejected:
        typer.echo(f"rejected {reject.place}: {reject.reason}", err=True)
    accepted, rejected = summary.accepted, len(summary.rejected)
    typer.echo(f"{accepted} accepted + {rejected} rejected = {accepted + rejected} documents")
    typer.echo(f"{summary.chunks} chunks")


def _status(text: str) -> "Status":
    """A spinner on a terminal's stderr; silent elsewhere."""
    from rich.console import Console

    return Console(stderr=True).status(text)


def _complaint(error: TyperException) -> str:
    """What is wrong with the command line, in one line."""
    message = " ".join(error.format_message().split()).rstrip(".")
    message = message[:1].lower() + message[1:]
    return message if message.endswith("?") else f"{message}; see --help"


def _fail(line: str) -> None:
    """End with one line on stderr and exit status 2."""
    typer.echo(f"error: {line}", err=True)
    raise SystemExit(2) from None


for _group, _recipes in RECIPES.items():
    _sub = typer.Typer(help=f"Run a recipe of {_group}/.", **SETTINGS)
    app.add_typer(_sub, name=_group)
    for _name, (_does, _example) in _recipes.items():
        _sub.command(
            _name,
            help=f"{_does} Settings are key=value; --help lists them with their defaults.",
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )(_command(_group, _name, _example))

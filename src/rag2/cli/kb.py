"""`rag2 kb ...`: documents -> a knowledge base, and what is in it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rag2.cli.terminal import SETTINGS, status
from rag2.registry import UserError, nearest

if TYPE_CHECKING:
    from rag2.kb.ingest import Summary

commands = typer.Typer(help="Build, change and read a knowledge base.", **SETTINGS)
KB = Annotated[Path, typer.Argument(metavar="KB", help="The knowledge base, an SQLite file.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Files (txt, md, html, pdf, docx, csv, jsonl, jsonl.gz, parquet), folders of them, or"
        " hf:NAME[:SPLIT]: a data set of the hub or a folder that `datasets` saved.",
    ),
]
KeepDuplicates = Annotated[
    bool, typer.Option("--keep-duplicates", help="Take a text that was there before, too.")
]
NearDuplicates = Annotated[
    float | None,
    typer.Option(
        "--near",
        metavar="SHARE",
        help="Also reject a text that shares so much with one before, as .9: beware where texts"
        " differ in one fact only.",
    ),
]
Seconds = Annotated[
    float,
    typer.Option(
        min=1, max=86_400, help="Longest time a parser may take for a document; then: rejected."
    ),
]
Only = Annotated[str | None, typer.Option("--namespace", help="Of this namespace alone.")]


@commands.command("build")
def kb_build(
    path: KB,
    sources: Sources,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="What counts tokens: words (nothing to download), or a model's tokenizer:"
            " its folder, its tokenizer.json or its name on the hub."
        ),
    ] = "words",
    tokens: Annotated[int, typer.Option(min=1, help="Longest chunk, in tokens.")] = 128,
    overlap: Annotated[int, typer.Option(min=0, help="Shared by neighbours, in tokens.")] = 16,
    strict: Annotated[bool, typer.Option(help="Any reject: write nothing, exit with 2.")] = False,
    keep_duplicates: KeepDuplicates = False,
    near: NearDuplicates = None,
    seconds: Seconds = 60.0,
) -> None:
    """Read documents, cut them into chunks and write a new knowledge base.

    Good documents are kept and bad ones are listed with the reason; if none is good, nothing is
    written and the exit status is 2.

    \b
    Examples:
      rag2 kb build docs.sqlite handbook.md notes/ faq.jsonl
      rag2 kb build docs.sqlite faq.jsonl --tokens 64 --overlap 8 --strict
      rag2 kb build docs.sqlite docs/ --tokenizer BAAI/bge-small-en-v1.5
      rag2 kb build docs.sqlite manual.pdf letters/*.docx site/ --near 0.9 --seconds 120
      rag2 kb build docs.sqlite facts.parquet hf:saved/wiki:train --keep-duplicates
    """
    from rag2.config import load
    from rag2.kb.build import build
    from rag2.kb.chunk import TokenChunker
    from rag2.kb.jail import Limits

    settings = [
        f"tokens={tokens}",
        f"overlap={overlap}",
        f"tokenizer={json.dumps(tokenizer, ensure_ascii=False)}",
    ]
    chunker = load(TokenChunker, None, settings)
    with status(f"building {path}"):
        limits = Limits(seconds=seconds)
        summary = build(path, sources, chunker, strict, keep_duplicates, near, limits)
    report(summary)
    if strict and summary.rejected:
        raise UserError(
            f"{summary.rejected} documents were rejected (--strict); {path} was not written"
        )


@commands.command("list")
def kb_list(path: KB, namespace: Only = None) -> None:
    """List the documents: id, number of chunks, title, and the namespace where it has a name.

    \b
    Examples:
      rag2 kb list docs.sqlite
      rag2 kb list docs.sqlite --namespace acme
    """
    from rag2.kb.names import there
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        if namespace is not None:
            there(namespace, base.namespaces(), path)
        for name in base.namespaces() if namespace is None else [namespace]:
            for document in base.documents(name):
                row = [document.id, str(len(base.chunks_of(document.id, name))), document.title]
                typer.echo("\t".join([*row, name] if name else row))


@commands.command("show")
def kb_show(
    path: KB,
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of a document.")],
    namespace: Annotated[str, typer.Option(help="Whose document it is.")] = "",
) -> None:
    """Show one document: its title, its metadata and its text, chunk by chunk.

    \b
    Example:
      rag2 kb show docs.sqlite handbook.md
    """
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        document = base.document(id, namespace)
        if document is None:
            live = (other.id for other in base.documents(namespace))
            raise base.missing(id, namespace, f".{nearest(id, live)}")
        typer.echo(f"{document.id}\t{document.title}")
        if document.metadata:
            typer.echo(json.dumps(document.metadata, ensure_ascii=False))
        for chunk in base.chunks_of(id, namespace):
            typer.echo(f"\n[{chunk.id}] characters {chunk.start} to {chunk.end}\n{chunk.text}")


@commands.command("search")
def kb_search(
    path: KB,
    query: Annotated[str, typer.Argument(help="Words to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of chunks.")] = 5,
    namespace: Only = None,
) -> None:
    """Find chunks by their words (BM25), best first: score, chunk id, document, text, namespace.

    \b
    Examples:
      rag2 kb search docs.sqlite "how long is the warranty"
      rag2 kb search docs.sqlite "warranty" -k 20 --namespace acme
    """
    from rag2.kb.names import there
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as base:
        if namespace is not None:
            there(namespace, base.namespaces(), path)
        spaces = None if namespace is None else [namespace]
        with base.reading():
            hits = [(base.chunk(id), score) for id, score in base.search_text(query, k, spaces)]
            homes = base.alive() if any(base.namespaces()) else {}
        for chunk, score in hits:
            text, home = " ".join(chunk.text.split()), homes.get(chunk.id)
            fields = [f"{score:.3g}", str(chunk.id), chunk.document, text[:100]]
            typer.echo("\t".join([*fields, home] if home else fields))
        if not hits:
            typer.echo("no chunk has any of these words", err=True)


def report(summary: "Summary") -> None:
    """Say what became of every document."""
    for reject in summary.rejects:
        typer.echo(f"rejected {reject.place}: {reject.reason}", err=True)
    accepted, rejected = summary.accepted, summary.rejected
    if untold := rejected - len(summary.rejects):
        typer.echo(f"rejected {untold} more, which are not listed", err=True)
    typer.echo(f"{accepted} accepted + {rejected} rejected = {accepted + rejected} documents")
    if summary.updated or summary.unchanged:
        kinds = f"{summary.added} new, {summary.updated} updated, {summary.unchanged} unchanged"
        typer.echo(kinds)
    typer.echo(f"{summary.chunks} chunks")

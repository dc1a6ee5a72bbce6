"""`rag2 kb add | update | remove | compact | export`: changes that are durable when they return."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rag2.cli.kb import KB, KeepDuplicates, NearDuplicates, Seconds, Sources, commands, report
from rag2.cli.terminal import status
from rag2.registry import UserError, nearest

if TYPE_CHECKING:
    from rag2.kb.chunk import Chunker
    from rag2.kb.ingest import Summary
    from rag2.kb.store import KnowledgeBase

Namespace = Annotated[str, typer.Option(help="Whose documents they are; ids differ within one.")]
Strict = Annotated[bool, typer.Option(help="Any reject: change nothing, exit with 2.")]


@commands.command("add")
def kb_add(
    path: KB,
    sources: Sources,
    namespace: Namespace = "",
    strict: Strict = False,
    keep_duplicates: KeepDuplicates = False,
    near: NearDuplicates = None,
    seconds: Seconds = 60.0,
) -> None:
    """Add documents to a knowledge base; those whose id is there already are rejected.

    They are cut as those that are there. Good documents are kept and bad ones are listed with the
    reason; if none is good, nothing is written and the exit status is 2.

    \b
    Examples:
      rag2 kb add docs.sqlite news.md reports/
      rag2 kb add docs.sqlite faq.jsonl --namespace acme --strict
    """
    from rag2.kb.jail import Limits
    from rag2.kb.transfer import add_new

    limits = Limits(seconds=seconds)
    with _changing(path, strict) as (kb, chunker, done):
        done.append(add_new(kb, sources, chunker, namespace, keep_duplicates, near, limits))


@commands.command("update")
def kb_update(
    path: KB,
    sources: Sources,
    namespace: Namespace = "",
    strict: Strict = False,
    keep_duplicates: KeepDuplicates = False,
    near: NearDuplicates = None,
    seconds: Seconds = 60.0,
) -> None:
    """Add documents that are new, replace those that changed, leave those that are equal.

    The same sources twice change nothing. What they do not name stays. Good documents are kept and
    bad ones are listed with the reason; if none is good, the exit status is 2.

    \b
    Examples:
      rag2 kb update docs.sqlite docs/ manual.pdf
      rag2 kb update docs.sqlite faq.jsonl --namespace acme
    """
    from rag2.kb.ingest import ingest
    from rag2.kb.jail import Limits

    limits = Limits(seconds=seconds)
    with _changing(path, strict) as (kb, chunker, done):
        done.append(ingest(kb, sources, chunker, namespace, keep_duplicates, near, limits))


@commands.command("remove")
def kb_remove(
    path: KB,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of documents.")],
    namespace: Namespace = "",
) -> None:
    """Remove documents, all or none; `compact` erases them from the file.

    \b
    Examples:
      rag2 kb remove docs.sqlite handbook.md
      rag2 kb remove docs.sqlite q1 q2 --namespace acme
    """
    from rag2.kb.store import KnowledgeBase

    with KnowledgeBase(path) as kb:
        for id in ids:
            if not kb.has(id, namespace):
                live = (document.id for document in kb.documents(namespace))
                raise kb.missing(id, namespace, f".{nearest(id, live)}")
        chunks = kb.remove(dict.fromkeys(ids), namespace)
        typer.echo(f"{len({*ids})} removed, with {chunks} chunks; version {kb.version}")


@commands.command("compact")
def kb_compact(
    path: KB,
    generations: Annotated[
        Path | None,
        typer.Option(help="Folder of generations of this file: those with erased text go, too."),
    ] = None,
) -> None:
    """Erase what was removed: no byte of it stays in the file, its log or its full-text index.

    \b
    Examples:
      rag2 kb compact docs.sqlite
      rag2 kb compact docs.sqlite --generations state/generations
    """
    from rag2.kb.store import KnowledgeBase
    from rag2.live.folder import purge, refuse_others

    if generations is not None and not generations.is_dir():
        raise UserError(f"--generations {generations} is not a folder")
    with KnowledgeBase(path) as kb, status(f"compacting {path}"):
        if generations is not None:
            refuse_others(generations, kb)
        before = path.stat().st_size
        chunks = kb.compact()
        dropped = purge(generations, kb.alive()) if generations is not None else []
    for directory in dropped:
        typer.echo(f"dropped {directory}")
    typer.echo(f"{chunks} chunks erased; {before} bytes before, {path.stat().st_size} after")


@commands.command("export")
def kb_export(
    path: KB,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="A file that is not there.")],
    namespace: Namespace = "",
) -> None:
    """Write the documents as JSONL, one a line, as `build`, `add` and `update` read them.

    \b
    Examples:
      rag2 kb export docs.sqlite docs.jsonl
      rag2 kb export docs.sqlite acme.jsonl --namespace acme
    """
    from rag2.kb.names import there
    from rag2.kb.store import KnowledgeBase
    from rag2.kb.transfer import export

    with KnowledgeBase(path) as kb, status(f"writing {out}"):
        there(namespace, kb.namespaces(), path)
        count = export(kb, out, namespace)
        others = [name for name in kb.namespaces() if name != namespace]
    typer.echo(f"{count} documents")
    if others:
        named = ", ".join(repr(name) if name else "the one without a name" for name in others)
        typer.echo(f"not in it are those of other namespaces: {named}", err=True)


@contextmanager
def _changing(
    path: Path, strict: bool
) -> Iterator[tuple["KnowledgeBase", "Chunker", list["Summary"]]]:
    """The knowledge base, its chunker, and a list for what came of the change; reports that."""
    from contextlib import nullcontext

    from rag2.kb.chunk import TokenChunker
    from rag2.kb.store import KnowledgeBase

    done: list[Summary] = []
    refusal: UserError | None = None
    with KnowledgeBase(path) as kb:
        chunker = kb.chunker(path.parent / "tokenizer")
        if chunker is None:
            if kb.chunker_fingerprint is not None:
                raise UserError(
                    f"{path}: the tokenizer that cut its chunks is gone;"
                    f" put it at {path.parent / 'tokenizer'}"
                )
            chunker = TokenChunker()
        try:
            with status(f"changing {path}"), kb.batch() if strict else nullcontext():
                yield kb, chunker, done
                if strict and (count := done[0].rejected):
                    refusal = UserError(f"{count} documents were rejected (--strict); {path} is")
                    raise refusal
        except UserError as error:
            if error is not refusal:
                raise
        version = kb.version
    report(done[0])
    if refusal is not None:
        raise UserError(f"{refusal} as it was")
    typer.echo(f"version {version}")

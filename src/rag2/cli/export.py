"""`rag2 export RUN OUT`: a trained system -> a directory that loads by itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rag2.cli.terminal import one_of, status
from rag2.registry import UserError

if TYPE_CHECKING:
    from rag2.export.source import Source

ADAPTERS = ("merge", "keep")


def export(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN OUT",
            help="A joint run, its final/ or a demo, and the new directory; with --from: RETRIEVER"
            " GENERATOR KB OUT.",
        ),
    ],
    parts: Annotated[
        bool,
        typer.Option("--from", help="Export a system that was not trained here, from its parts."),
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(
            help="A results.json, or its directory, whose arm `joint` this is: validation chose k,"
            " temperature and reading there. Default: that of the demo."
        ),
    ] = None,
    adapters: Annotated[
        str, typer.Option(help="merge: into the generator's weights; keep: beside their base.")
    ] = "merge",
    k: Annotated[int | None, typer.Option(help="Chunks that are read.")] = None,
    reading: Annotated[
        str | None, typer.Option(help="How they are read: marginal, token or concat.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of p(z|x).")] = None,
    index: Annotated[
        str, typer.Option(help="Kind of index: flat or torch (exact), ivf or hnsw.")
    ] = "flat",
) -> None:
    """Write a system into one directory that rag2, transformers and sentence-transformers load.

    OUT gets manifest.json generator/ retriever/ index/ kb.sqlite prompt.json README.md. The index
    is made anew: that of a run's end may be older than its encoder. Nothing that is there is
    overwritten, and OUT is there whole or not at all.

    \b
    Examples:
      rag2 export runs/demo exports/almanac
      rag2 export runs/joint exports/a --results runs/compare
      rag2 export runs/joint exports/b --k 5 --temperature 0.5 --reading concat
      rag2 export runs/lora exports/c --adapters keep
      rag2 export --from encoders/bge models/qwen3 docs.sqlite exports/d --k 4
    """
    names = ("RETRIEVER", "GENERATOR", "KB", "OUT") if parts else ("RUN", "OUT")
    if len(paths) != len(names):
        form = f"rag2 export {'--from ' if parts else ''}{' '.join(names)}"
        raise UserError(f"{len(paths)} paths instead of {len(names)}: {form}")
    from rag2.answering.settings import READINGS

    one_of("--adapters", adapters, ADAPTERS)
    one_of("--reading", reading, READINGS)
    if parts and results is not None:
        raise UserError("--results is of a run; a system --from parts is in no comparison of ours")
    *_, out = paths
    if out.exists():
        raise UserError(f"{out} exists already; exports are never overwritten")
    _export(paths, parts, results, adapters, index, k=k, reading=reading, temperature=temperature)


def _export(
    paths: list[Path],
    parts: bool,
    results: Path | None,
    adapters: Any,
    index: str,
    **given: Any,
) -> None:
    """Write the export, with a line of what is being done on a terminal."""
    with status("reading") as shown:
        from transformers.utils import logging

        from rag2.export import foreign
        from rag2.export.source import of_run
        from rag2.export.write import write

        logging.disable_progress_bar()
        encoder = None
        if parts:
            source, encoder = foreign.of_parts(*paths[:3])
        else:
            source = of_run(paths[0], results)
        source = _changed(source, **given)
        meta = write(
            source, paths[-1], adapters=adapters, index=index, encoder=encoder, say=shown.update
        )
    settings = source.settings
    how = "chosen on validation" if source.chosen else "not chosen on validation"
    typer.echo(
        f"{paths[-1]}: k={settings.k} temperature={settings.temperature:g} "
        f"reading={settings.reading} ({how}), retriever {meta['encoder'][:12]}, "
        f"generator {meta['generator'][:12]}"
    )


def _changed(source: "Source", **given: Any) -> "Source":
    """The source with the settings of the command line over its own."""
    from dataclasses import replace

    from pydantic import ValidationError

    from rag2.answering.settings import Settings
    from rag2.explain import mistake

    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        return source
    try:
        settings = Settings.model_validate(dict(source.settings) | changes)
    except ValidationError as error:
        raise UserError(mistake(Settings, error)) from None
    return replace(source, settings=settings, chosen=False)

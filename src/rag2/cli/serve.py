"""`rag2 serve`: an export over HTTP."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rag2.registry import UserError

if TYPE_CHECKING:
    from rag2.answering.remote import System


def serve(
    export: Annotated[
        Path,
        typer.Argument(metavar="EXPORT", help="What `rag2 export` wrote, a joint run or a demo."),
    ],
    state: Annotated[
        Path | None,
        typer.Option(help="Where changes of documents live; by default EXPORT.state."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that requests may give the server (repeatable); on a loopback address only"
            " localhost and the like are taken without it."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="RAG2_TOKEN",
            help="What changing documents takes; by default made at random and shown.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.")] = None,
    dtype: Annotated[str, typer.Option(help="Precision of the generator.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    reading: Annotated[
        str | None,
        typer.Option(help="How chunks are read where a request does not say."),
    ] = None,
    generator_url: Annotated[
        str | None,
        typer.Option(help="A server that runs EXPORT/generator, such as vLLM's; its address."),
    ] = None,
    generator_model: Annotated[
        str, typer.Option(help="The generator's name there, where it serves several.")
    ] = "",
) -> None:
    """Serve an export: OpenAI's API, retrieval, scores, documents, and a page to ask.

    The port is open at once; /ready says when the export is verified and loaded. SIGTERM finishes
    what was accepted. The export stays as it is. Of a run or a demo an export is written first,
    beside its final/.

    With --generator-url the generator runs behind any address with OpenAI's completions (its key is
    in RAG2_GENERATOR_KEY); retrieval, documents and citations stay here.

    \b
    Examples:
      rag2 serve exports/almanac
      rag2 serve runs/demo/joint/final
      rag2 serve exports/almanac --state /var/lib/almanac --host 0.0.0.0 --port 80
      vllm serve exports/almanac/generator --port 8001 --generation-config vllm
      rag2 serve exports/almanac --generator-url http://localhost:8001/v1
      curl -s localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Where is Lillan Works located?"}]}'
    """
    import logging

    _check(reading, generator_url, generator_model, dtype)
    try:
        from rag2.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'rag2[serve]'") from None
    from transformers.utils import logging as transformers_logging

    from rag2.cli.terminal import status
    from rag2.export.beside import exported

    transformers_logging.disable_progress_bar()
    for library in ("uvicorn", "asyncio"):  # what clients do wrong is nothing to log
        logging.getLogger(library).setLevel(logging.ERROR)
    asked = export
    with status("exporting") as shown:
        export = exported(export, shown.update)
    directory = state or export.with_name(f"{export.name}.state")

    def load() -> "System":
        from rag2.answering.rag import Rag
        from rag2.answering.remote import Remote

        if generator_url is None:
            rag = Rag.from_pretrained(export, directory, dtype, device)
        else:
            key = os.environ.get("RAG2_GENERATOR_KEY", "")
            rag = Remote.from_pretrained(
                export, generator_url, generator_model, key, directory, device
            )
        if reading is not None:
            rag.settings = rag.settings.model_copy(update={"reading": reading})
        return rag

    run(load, name or _called(asked.resolve()), host, port, token, allow_host or [])


def _called(path: Path) -> str:
    """The name of an export, or of the run that it is of."""
    return path.parent.name if path.name in ("final", "export") else path.name


def _check(reading: str | None, url: str | None, model: str, dtype: str) -> None:
    """Raise UserError for options that say nothing, or do not go together."""
    from rag2.answering.settings import READINGS
    from rag2.cli.terminal import one_of

    one_of("--reading", reading, READINGS)
    if url is None and model:
        raise UserError("--generator-model names a model at --generator-url, which is not given")
    if url is not None and dtype != "float32":
        raise UserError("--dtype is of a generator in this process; not of --generator-url")

"""`rag2 serve`: an export over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from rag2.registry import UserError


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
) -> None:
    """Serve an export: OpenAI's API, retrieval, scores, documents, and a page to ask.

    The port is open at once; /ready says when the export is verified and loaded. SIGTERM finishes
    what was accepted. The export stays as it is. Of a run or a demo an export is written first,
    beside its final/.

    \b
    Examples:
      rag2 serve exports/almanac
      rag2 serve runs/demo/joint/final
      rag2 serve exports/almanac --state /var/lib/almanac --host 0.0.0.0 --port 80
      curl -s localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Where is Lillan Works located?"}]}'
    """
    import logging

    try:
        from rag2.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'rag2[serve]'") from None
    from transformers.utils import logging as transformers_logging

    from rag2.answering.rag import Rag
    from rag2.cli.terminal import status
    from rag2.export.beside import exported

    transformers_logging.disable_progress_bar()
    for library in ("uvicorn", "asyncio"):  # what clients do wrong is nothing to log
        logging.getLogger(library).setLevel(logging.ERROR)
    with status("exporting") as shown:
        export = exported(export, shown.update)
    directory = state or export.with_name(f"{export.name}.state")
    run(
        lambda: Rag.from_pretrained(export, directory, dtype, device),
        name or export.resolve().name,
        host,
        port,
        token,
    )

"""A run that somebody wants to serve or ask -> its export, written beside its final/ if need be."""

from collections.abc import Callable
from pathlib import Path

from rag2.answering.exported import Exported
from rag2.export.source import of_run
from rag2.export.write import write
from rag2.registry import UserError

NAME = "export"


def exported(path: Path, say: Callable[[str], None]) -> Path:
    """The export that `path` is, or that of the joint run that it is, in, or belongs to.

    `say` hears what is being written. Raises UserError for a path that is neither, and for a run
    whose export was made before its final/ or its results changed.
    """
    # Two are enough: of one that lacks a file its manifest says which.
    if sum((path / name).exists() for name in ("kb.sqlite", "prompt.json", "index")) > 1:
        return path
    source = of_run(path)
    out = source.generator.parent.with_name(NAME)
    if not out.exists():
        write(source, out, say=say)
        return out
    there = Exported.open(out)
    if there.meta["parents"] != source.parents or there.settings != source.settings:
        raise UserError(
            f"{out} was made before the run's final/ or its results changed: remove it and "
            f"{out}.state, or export the run to another place: rag2 export {path} OUT"
        )
    return out

"""The name of a pretrained model -> whether it lies in a folder here or is an id on the hub."""

import os
from pathlib import Path

from rag2.registry import UserError

# A folder holds one of these: a model, or an adapter that names its base, PEFT's or ours.
ADAPTERS = ("adapter_config.json", "rag2_adapter.json")
FILES = ("config.json", *ADAPTERS)


def is_local(name: str, what: str) -> bool:
    """True for a folder with a model, False for a hub id.

    Raises UserError, which calls the model `what`, for anything else.
    """
    path = Path(name)
    if path.is_dir():
        if not any((path / file).is_file() for file in FILES):
            raise UserError(f"cannot load {what} {name!r}: the folder has no config.json")
        return True
    if path.exists():
        raise UserError(f"cannot load {what} {name!r}: it is a file, not a Hugging Face folder")
    # A hub id is `name` or `owner/name`; all else is meant as a path, and so is a name inside a
    # folder that exists: asking the hub for a mistyped run costs a minute where it is unreachable.
    inside = "/" in name and path.parent.is_dir()
    if not name or inside or name.count("/") > 1 or name.startswith((".", "~", os.sep)):
        raise UserError(f"cannot load {what} {name!r}: the folder does not exist")
    return False

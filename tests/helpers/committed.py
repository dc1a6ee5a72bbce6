"""Artifacts of fresh random content, committed."""

import random
from pathlib import Path

from rag2.artifact import committing


def fill(staging: Path) -> None:
    """Three files of fresh random content, one of them in a folder."""
    (staging / "folder").mkdir()
    for name in ("weights.safetensors", "state.json", "folder/ids.json"):
        (staging / name).write_bytes(random.randbytes(random.randrange(1, 5000)))


def commit(directory: Path, pointer: Path | None = None) -> Path:
    with committing(directory, kind="checkpoint", meta={"step": 3}, pointer=pointer) as staging:
        fill(staging)
    return directory


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}

"""Exports of small systems, and how to make hostile ones of them that seal themselves anew."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rag2 import artifact
from rag2.answering.exported import Exported
from rag2.answering.settings import Settings
from rag2.export.source import Source
from rag2.export.write import write
from rag2.generator.load import Generator
from rag2.retriever.encoder import DualEncoder
from small_world import roughen


def parts(home: Path, folder: Path, **encoder: Any) -> Source:
    """Generator and retriever of the small world with noise in their weights, and its documents."""
    generator = Generator.load(home / "generator")
    retriever = DualEncoder.load(home / "retriever")
    if encoder:
        shape = retriever.config.model_dump() | encoder
        retriever = DualEncoder.build(type(retriever.config)(**shape), retriever.tokenizer)
    for model in (generator.model, retriever.towers):
        roughen(model, 0.1)
    generator.save(folder / "generator")
    retriever.save(folder / "retriever")
    kb = home / "data" / "kb.sqlite"
    return Source(folder / "generator", folder / "retriever", kb, Settings(k=2), steps=7)


def exported(home: Path, folder: Path, **options: Any) -> Exported:
    """The export of such a system, in `folder`/export."""
    settings: dict[str, Any] = {"index": "torch"} | options
    write(parts(home, folder), folder / "export", **settings)
    return Exported.open(folder / "export")


def hostile(good: Path, path: Path, change: Callable[[Path], object], seal: bool = True) -> Path:
    """A copy that was changed; with `seal` its manifests vouch for the change."""
    shutil.copytree(good, path, symlinks=True)
    change(path)
    for directory in (path / "index", path) if seal else ():
        if (directory / "manifest.json").is_file():
            reseal(directory)
    return path


def reseal(directory: Path) -> None:
    """A manifest that fits what lies there now, as a writer commits it but for the fsyncs."""
    now = json.loads((directory / "manifest.json").read_text())
    with contextlib.suppress(artifact.ArtifactError):  # of a link, which no writer commits
        files = {
            name: {"bytes": path.stat().st_size, "sha256": artifact._digest(path)}
            for name, path in artifact._files(directory).items()
        }
        body = {"format": artifact.FORMAT, "kind": now["kind"], "files": files, "meta": now["meta"]}
        (directory / "manifest.json").write_bytes(artifact._sealed(body))


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change the object in a JSON file; a change that returns something puts it in its place."""

    def apply(directory: Path) -> None:
        path = directory / name
        found = json.loads(path.read_text("utf-8"))
        made = change(found)
        path.write_text(json.dumps(found if made is None else made), encoding="utf-8")

    return apply


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Write a file."""
    data = content.encode() if isinstance(content, str) else content

    def apply(directory: Path) -> None:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)

    return apply


def by_hand(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of every next token of one sequence, by plain transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.float().log_softmax(-1)

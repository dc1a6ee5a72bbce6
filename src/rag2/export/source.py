"""A joint run, its final/ or a demo -> the parts to export, and what is known of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rag2 import artifact, config
from rag2.answering.settings import Settings
from rag2.evaluation import files
from rag2.generator.prompt import Prompt
from rag2.registry import UserError, nearest
from rag2.training.candidates import Candidates

ARM = "joint"


@dataclass(frozen=True)
class Source:
    """The parts of a system by their folders, and where they come from."""

    generator: Path
    retriever: Path
    kb: Path
    settings: Settings
    chosen: bool = False
    """whether validation chose k, temperature and reading"""
    parents: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """the run's config.yaml; empty for a system from elsewhere"""
    results: dict[str, Any] | None = None
    """the results.json that the run's arm is in"""
    steps: int = 0


def of_run(path: Path, results: Path | None = None) -> Source:
    """The system of a run, verified; UserError for what is no finished joint run.

    `results` is a results.json or its directory; without it the one of the demo around the run.
    """
    run = _run(path)
    final = run / "final"
    manifest = artifact.verify(final, kind="system")
    for half in ("generator", "retriever"):
        if not (final / half).is_dir():
            raise UserError(
                f"{run} trained no {half}: an export is of a joint run, or of two halves by "
                "rag2 export --from RETRIEVER GENERATOR KB OUT"
            )
    cfg = config.read(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    if not isinstance(cfg.get("kb"), str):
        raise UserError(f"{run / 'config.yaml'} names no knowledge base (kb)")
    found = _results(run, results)
    settings, chosen = _settings(final, cfg, found)
    return Source(
        final / "generator",
        final / "retriever",
        Path(cfg["kb"]),
        settings,
        chosen,
        {"system": artifact.seal(manifest)},
        cfg,
        found,
        cfg["steps"] if isinstance(cfg.get("steps"), int) else 0,
    )


def _run(path: Path) -> Path:
    """The run directory that a path means: itself, the one around a final/, the one of a demo."""
    if not path.is_dir():
        beside = (
            [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        )
        what = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"run {str(path)!r} {what}.{nearest(path.name, beside)}")
    if path.name == "final" and artifact.is_complete(path):
        return path.parent
    if not artifact.is_complete(path / "final") and (path / ARM).is_dir():
        path = path / ARM
    if artifact.is_complete(path / "final"):
        return path
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        raise UserError(
            f"run {str(path)!r} is not finished: it has no final/; go on with it by resume=true"
        )
    inside = [p.name for p in path.iterdir() if artifact.is_complete(p / "final")]
    hint = f" There are runs in it: {', '.join(sorted(inside))}." if inside else ""
    raise UserError(
        f"{str(path)!r} is no run directory: it has neither config.yaml nor final/.{hint}"
    )


def _results(run: Path, given: Path | None) -> dict[str, Any] | None:
    """The results that the run is an arm of; None where none are there."""
    if given is not None:
        path = given / "results.json" if given.is_dir() else given
        found = dict(files.read_file(path, f"--results {str(given)!r}"))
        if ARM not in found["arms"]:
            arms = ", ".join(found["arms"])
            raise UserError(f"{path} has no arm {ARM!r}; there are: {arms}")
        return found
    path = run.parent / "results.json"
    if run.name != ARM or not path.is_file():
        return None
    found = dict(files.read_file(path, str(path)))
    return found if ARM in found["arms"] else None


def _settings(
    final: Path, cfg: dict[str, Any], results: dict[str, Any] | None
) -> tuple[Settings, bool]:
    """How the system answers: as validation chose where it did, else as it was trained."""
    try:
        prompt = Prompt.model_validate(json.loads((final / "prompt.json").read_text("utf-8")))
        trained = Candidates.model_validate(cfg.get("candidates") or {})
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f"{final.parent}: {' '.join(str(error).split())[:200]}") from None
    known = Settings.model_fields["k"].metadata
    limit = max(getattr(bound, "le", 0) for bound in known)
    settings = Settings(prompt=prompt, k=min(max(1, trained.k - trained.null), limit))
    selection = results["k_selection"] if results else {}
    if ARM not in selection.get("chosen", {}):
        return settings, False
    keys = {"k": "chosen", "temperature": "temperature", "reading": "reading"}
    values = {key: selection[table][ARM] for key, table in keys.items()}
    if not values["k"]:
        raise UserError("validation chose k=0 for arm 'joint', the closed book: give --k")
    return Settings.model_validate(dict(settings) | values), True

"""One cell of a sweep: its settings, the key of all that decides its result, its directory."""

import hashlib
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from rag2 import __version__, artifact, config, hub, pipeline, stages, yaml12
from rag2.registry import UserError

MARK = "cell.json"  # in a cell's directory: its key, whether it is done, and its figures
YAML = "cell.yaml"  # the resolved configuration, which the recipe is run with
# Settings that say where and how, not what. `recipes` and `stage` count by the keys of the stages.
FREE = ("out", "home", "recipes", "stage", "jobs", "resume", "log_with")
# Their values are words, though a file or a folder may happen to be called so.
WORDS = ("name", "split", "device", "dtype", "arms")
# Inputs that are files, and those that are models: a folder, or a name on the hub.
FILES = ("kb", "questions", "corpus", "paraphrases")
MODELS = ("generator", "retriever")


@dataclass(frozen=True, slots=True)
class Recipe:
    """train/NAME.py or eval/NAME.py, and the class of its configuration."""

    group: str
    name: str
    path: Path
    cls: type[config.Config]

    @classmethod
    def of(cls, file: Path) -> "Recipe":
        """The recipe that a config file is for, by the command in its first line.

        Raises UserError when that line is no such command.
        """
        words = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].split()
        if words[:2] != ["#", "rag2"] or len(words) < 4 or words[2] not in ("train", "eval"):
            raise UserError(
                f"{file} does not say which recipe it is for: its first line must be its command, "
                f"as in '# rag2 train joint -c {file}'"
            )
        path = config.recipe(f"{words[2]}/{words[3]}.py")
        return cls(words[2], words[3], path, configuration(path))


def configuration(path: Path) -> type[config.Config]:
    """The class of the configuration that a recipe's `main` takes."""
    main = runpy.run_path(str(path), run_name="recipe")["main"]
    return next(iter(get_type_hints(main).values()))


@dataclass(frozen=True, slots=True)
class Cell:
    """Swept key -> value as YAML, the configuration as given, the stages of the world it may need.

    `key` stands for all that decides its result, which lies in `directory`.
    """

    settings: Mapping[str, str]
    recipe: Recipe
    cfg: Any
    needed: tuple[str, ...]
    key: str
    directory: Path

    def label(self) -> str:
        """The cell for a person who waits."""
        return ", ".join(f"{key}={value}" for key, value in self.settings.items()) or "one cell"

    def head(self) -> dict[str, Any]:
        """The columns that say which cell a row is of."""
        values = {key: yaml12.parse(text, key) for key, text in self.settings.items()}
        plain = {
            key: self.settings[key] if isinstance(value, (dict, list)) else value
            for key, value in values.items()
        }
        return {**plain, "cell": self.directory.name}

    def mark(self) -> dict[str, Any] | None:
        """What is noted of the cell; None where it was not begun."""
        try:
            mark = json.loads((self.directory / MARK).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return mark if mark.get("key") == self.key else None

    def is_done(self) -> bool:
        """Whether its results are there, for this key and as they were written."""
        mark = self.mark()
        return bool(
            mark
            and mark["done"]
            and all(_digest(self.directory / name) == d for name, d in mark["results"].items())
        )

    def job(self) -> stages.Job:
        """The recipe as a command on the resolved configuration."""
        command = [sys.executable, str(self.recipe.path), "-c", str(self.directory / YAML)]
        steps = getattr(self.cfg, "steps", 0) or 0
        return stages.Job(
            self.label(), self.directory, command, frozenset(), steps, one_thread=False
        )

    def begin(self, shared: Path) -> None:
        """Make its directory and note its key, so that only the same settings go on in it.

        Results that are not as they were written are removed: a run that is through would not be
        gone through again.
        """
        mark = self.mark()
        if mark is None or mark["done"]:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        artifact.replace(self.directory / MARK, json.dumps({"key": self.key, "done": False}))
        changes: dict[str, Any] = {"out": str(self.directory)}
        if "resume" in type(self.cfg).model_fields:
            changes["resume"] = True
        if self.needed:
            changes["home"] = str(self.directory / "home")
            pipeline.share(self.cfg, self.directory / "home", shared, self.needed)
        text = config.dump(self.cfg.model_copy(update=changes))
        command = f"# rag2 {self.recipe.group} {self.recipe.name} -c {YAML}\n"
        artifact.replace(self.directory / YAML, command + text)

    def finish(self, figures: Mapping[str, Any], results: Sequence[str]) -> None:
        """Note the figures, and the files of results by their SHA-256: the cell is done."""
        digests = {name: _digest(self.directory / name) for name in results}
        mark = {"key": self.key, "done": True, "results": digests, **figures}
        artifact.replace(self.directory / MARK, json.dumps(mark, indent=1))


def plan(recipe: Recipe, cfg: Any, settings: Mapping[str, str], out: Path, digests: dict) -> Cell:
    """The cell with this configuration; `digests` keeps those of files between cells.

    Raises UserError for an input that is not there and for a mistake in the settings of a stage.
    """
    _check_inputs(cfg)
    needed: tuple[str, ...] = ()
    keys: dict[str, str] = {}
    if getattr(cfg, "world", None) is not None:
        needed = tuple(pipeline.needed(cfg))
        keys = pipeline.keys(cfg, needed)
        _check_stages(cfg, needed)
    given = {k: v for k, v in cfg.model_dump(mode="json").items() if k not in FREE}
    parts = {
        "rag2": __version__,
        "recipe": [recipe.group, recipe.name],
        "settings": _contents(given, digests),
        "stages": keys,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    name = "_".join(f"{k}={v}" for k, v in settings.items()) or "cell"
    name = re.sub(r"[^\w.=+-]+", "_", name, flags=re.ASCII)[:80].strip("_.")
    # A sweep over other keys may have given the same cell another name.
    there = next(iter(sorted(out.glob(f"cells/*-{key[:12]}"))), None)
    directory = there or out / "cells" / f"{name}-{key[:12]}"
    return Cell(settings, recipe, cfg, needed, key, directory)


def _check_inputs(cfg: Any) -> None:
    """Raise UserError for a file or a model that is named and not there."""
    for name in FILES:
        path = getattr(cfg, name, None)
        if path and not Path(path).is_file():
            raise UserError(f"{name}={path}: the file does not exist")
    for name in MODELS:
        if model := getattr(cfg, name, None):
            hub.is_local(model, name)


def _check_stages(cfg: Any, names: Sequence[str]) -> None:
    """Raise UserError for a setting that the recipe of a stage does not take."""
    for job in pipeline.jobs(cfg, names):
        _, script, _, yaml, *words = job.command
        try:
            config.load(configuration(Path(script)), yaml, words)
        except UserError as error:
            raise UserError(f"stage {job.name}: {error}") from None


def _contents(value: Any, digests: dict[str, str], key: str = "") -> Any:
    """Settings with every file or folder that they name replaced by what it holds."""
    if isinstance(value, dict):
        return {k: _contents(v, digests, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_contents(item, digests, key) for item in value]
    if not isinstance(value, str) or not value or key in WORDS or not os.path.exists(value):
        return value
    if value not in digests:
        digests[value] = _digest(Path(value))
    return f"sha256:{digests[value]}"


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and the contents of a folder's files but hidden ones."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            file = Path(folder, name)
            if file.is_file():
                lines.append(f"{file.relative_to(path).as_posix()} {_digest(file)}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()

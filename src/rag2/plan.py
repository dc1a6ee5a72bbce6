"""What a world's job consists of: its stages, the commands that make them, and their keys."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rag2 import artifact, config, stages
from rag2.registry import UserError, nearest
from rag2.training.choices import World


class Inputs(config.Config):
    """Where a recipe's inputs come from: a world's `home`, unless their paths are given."""

    world: World | None = None
    """the world whose stages make what is not given; null: every input must be given"""
    home: str = "runs/demo"
    """directory of the world's stages"""
    recipes: str = "configs/demo"
    """directory of the YAML files of those stages"""
    stage: dict[str, dict[str, Any]] = {}
    """settings of one stage over its YAML file, as in stage.joint.steps=100"""
    vocabulary: int = Field(default=2048, ge=1)
    """size of the tokenizer that is trained on the world's pretraining text"""
    chunk_tokens: int = Field(default=128, ge=1)
    """chunk length of the world's knowledge base, in tokens of that tokenizer"""
    jobs: int = Field(default=2, ge=1)
    """stages that run at once, one thread each"""

    @field_validator("stage")
    @classmethod
    def _stages_exist(cls, stage: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in stage.items():
            if name not in STAGES:
                raise ValueError(
                    f"unknown stage {name!r}; allowed: {', '.join(STAGES)}.{nearest(name, STAGES)}"
                )
            for key in settings.keys() & {*Inputs.model_fields, *PATHS, "out", "resume"}:
                raise ValueError(f"{name}.{key} is set by the world's home, not for one stage")
        return stage


# input of a recipe -> the stage that makes it, and where in the stage's directory it lies
PATHS = {
    "kb": ("data", "kb.sqlite"),
    "questions": ("data", "questions.jsonl"),
    "corpus": ("data", "pretrain.jsonl"),
    "paraphrases": ("data", "paraphrases.jsonl"),
    "tokenizer": ("data", "tokenizer"),
    "generator": ("base", "final/generator"),
    "retriever": ("retriever", "final/retriever"),
    "log": ("logged", "final/questions.jsonl"),
}
CALLED = {"log": "questions"}  # the recipe's key of an input, where it is another
MARK = "stage.json"  # beside a stage's results: what they were made from, and whether all is there


@dataclass(frozen=True, slots=True)
class Stage:
    """One directory of `home`: the recipe that fills it, its inputs, what differs from its YAML."""

    recipe: str
    inputs: tuple[str, ...]
    overrides: tuple[str, ...] = ()


STAGES = {
    "base": Stage("pretrain", ("corpus", "tokenizer")),
    "retriever": Stage("retriever", ("kb", "questions", "tokenizer")),
    "ft": Stage("finetune", ("generator", "kb"), ("objective=unsupervised",)),
    "ft_paraphrase": Stage(
        "finetune", ("generator", "kb", "paraphrases"), ("objective=unsupervised",)
    ),
    "sft_closed": Stage("finetune", ("generator", "questions"), ("objective=supervised",)),
    # Equal supervision: the loop of joint training on the same questions, its retriever frozen.
    "sft": Stage(
        "joint",
        ("generator", "retriever", "kb", "questions"),
        ("train=[generator]", "refresh=none"),
    ),
    "joint": Stage("joint", ("generator", "retriever", "kb", "questions")),
    # Retrieval first: frozen RAG answers training questions, whose answers it never sees.
    "logged": Stage("logged", ("generator", "retriever", "kb", "questions")),
    "staged": Stage("finetune", ("generator", "log"), ("objective=supervised",)),
}


@dataclass
class Plan:
    """The commands of a job's stages, and a key per stage that says what it is made from."""

    cfg: Inputs
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.cfg.world is not None
        self.world = self.cfg.world

    def closure(self, names: Iterable[str]) -> list[str]:
        """The stages to run for `names`, each after those it needs."""
        order: list[str] = []

        def visit(name: str) -> None:
            for needed in self.needs(name):
                visit(needed)
            if name not in order:
                order.append(name)

        for name in sorted(names, key=["data", *STAGES].index):
            visit(name)
        return order

    def needs(self, name: str) -> list[str]:
        """The stages that make a stage's inputs."""
        return sorted({PATHS[i][0] for i in STAGES[name].inputs}) if name != "data" else []

    def directory(self, name: str) -> Path:
        """Where the stage lies: in `home`, or where the link there leads.

        What a run notes of its paths is then the same for all homes that share a stage.
        """
        directory = Path(self.cfg.home) / name
        return directory.resolve() if directory.is_symlink() else directory

    def has_yaml(self, name: str) -> bool:
        """Whether the folder of recipes has what the stage, and all it needs, is made by."""
        return all(
            any(_exists(f"{self.cfg.recipes}/{n}.yaml") for n in {each, STAGES[each].recipe})
            for each in self.closure([name])
            if each != "data"
        )

    def yaml(self, name: str) -> Path:
        """The stage's own YAML file if the folder has one, else that of its recipe."""
        try:
            return config.find(f"{self.cfg.recipes}/{name}.yaml")
        except UserError:
            return config.find(f"{self.cfg.recipes}/{STAGES[name].recipe}.yaml")

    def job(self, name: str) -> stages.Job:
        """The stage as a command; a stage that was cut off goes on where it was."""
        stage, directory = STAGES[name], self.directory(name)
        inputs = [
            f"{CALLED.get(i, i)}={_quoted(self.directory(PATHS[i][0]) / PATHS[i][1])}"
            for i in stage.inputs
        ]
        command = [
            *(sys.executable, str(config.recipe(f"train/{stage.recipe}.py"))),
            *("-c", str(self.yaml(name)), "world=null", f"out={_quoted(directory)}"),
            *(f"seed={self.world.seed}", *self.changes(name), *inputs, *stage.overrides),
            "resume=true",
        ]
        steps = (config.read(self.yaml(name)) | self.cfg.stage.get(name, {})).get("steps")
        length = steps if isinstance(steps, int) else 0  # what else it is, the recipe will say
        needs = frozenset(self.needs(name))
        return stages.Job(name, directory, command, needs, length, result="final")

    def changes(self, name: str) -> list[str]:
        """The overrides that `stage` adds to the YAML file; what the file says already is none."""
        return config.overrides(config.read(self.yaml(name)), self.cfg.stage.get(name, {}))

    def key(self, name: str) -> str:
        """SHA-256 of what decides the stage's result: settings, and the keys of what it needs."""
        if name not in self.keys:
            parts: list[Any] = [self.world.model_dump(mode="json")]
            parts += [self.cfg.vocabulary, self.cfg.chunk_tokens]
            if name != "data":
                settings = config.read(self.yaml(name))
                settings = {k: v for k, v in settings.items() if k not in Inputs.model_fields}
                overrides = [*self.changes(name), *STAGES[name].overrides]
                parts += [settings, overrides, *map(self.key, self.needs(name))]
            text = json.dumps(parts, sort_keys=True)
            self.keys[name] = hashlib.sha256(text.encode()).hexdigest()
        return self.keys[name]

    def mark(self, name: str, done: bool = True) -> None:
        """Note from what the stage is made, and whether it is complete.

        Noted at its start too: a stage that was cut off goes on only under the same settings.
        """
        directory = self.directory(name)
        artifact.make_folders(directory)
        artifact.replace(directory / MARK, self.note(name, done))

    def note(self, name: str, done: bool = True) -> str:
        """What `mark` writes."""
        return json.dumps({"key": self.key(name), "done": done})

    def is_done(self, name: str) -> bool:
        """Complete and made from today's settings; raises UserError if from other settings.

        What was only begun under other settings is removed: nothing can go on from it.
        """
        directory = self.directory(name)
        mark = marked(directory)
        if mark is None:
            return False
        if mark["key"] != self.key(name) and not mark["done"]:
            shutil.rmtree(directory)
            return False
        if mark["key"] != self.key(name):
            raise UserError(
                f"{directory} was made with other settings (world, YAML or inputs): "
                "choose another home= (of a demo: --out), or delete it"
            )
        return mark["done"]


def marked(directory: Path) -> dict[str, Any] | None:
    """What is noted of a stage, or None where none was begun; raises UserError if damaged."""
    try:
        return json.loads((directory / MARK).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{directory / MARK} is damaged ({error}): delete {directory}") from None


def _exists(path: str) -> bool:
    """Whether there is a config file of that name, here or shipped."""
    try:
        return config.find(path).is_file()
    except UserError:
        return False


def _quoted(path: Path) -> str:
    """A path as a YAML string, its characters as they are."""
    return json.dumps(str(path), ensure_ascii=False)

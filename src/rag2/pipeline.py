"""A world's job as stages: what a recipe needs and nobody gave is found in `home`, or made there.

`home` holds one directory per stage (data, base, retriever, ft, ..., joint), each a run directory.
Every stage is its own process with one thread: two of those beat one process with two threads.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from rag2 import artifact, config
from rag2.generator.bpe import train_bpe
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.registry import UserError
from rag2.training.choices import World
from rag2.training.log import progress


class Inputs(config.Config):
    """Where a recipe's inputs come from: a world's `home`, unless their paths are given."""

    world: World | None = None
    """the world whose stages make what is not given; null: every input must be given"""
    home: str = "runs/demo"
    """directory of the world's stages"""
    recipes: str = "configs/demo"
    """directory of the YAML files of those stages"""
    vocabulary: int = 640
    """size of the tokenizer that is trained on the world's pretraining text"""
    chunk_tokens: int = 128
    """chunk length of the world's knowledge base, in tokens of that tokenizer"""
    jobs: int = 2
    """stages that run at once, one thread each"""


InputsT = TypeVar("InputsT", bound=Inputs)

# input of a recipe -> the stage that makes it and where in the stage's directory it lies
PATHS = {
    "kb": ("data", "kb.sqlite"),
    "questions": ("data", "questions.jsonl"),
    "corpus": ("data", "pretrain.jsonl"),
    "paraphrases": ("data", "paraphrases.jsonl"),
    "tokenizer": ("data", "tokenizer"),
    "generator": ("base", "final/generator"),
    "retriever": ("retriever", "final/retriever"),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One directory of `home`: the YAML and recipe that fill it, its inputs, what differs."""

    recipe: str
    inputs: tuple[str, ...]
    overrides: tuple[str, ...] = ()


STAGES = {
    "base": Stage("pretrain", ("corpus", "tokenizer")),
    "retriever": Stage("retriever", ("kb", "questions", "tokenizer")),
    "ft": Stage("finetune", ("generator", "kb"), ("objective.name=unsupervised",)),
    "ft_paraphrase": Stage(
        "finetune", ("generator", "kb", "paraphrases"), ("objective.name=unsupervised",)
    ),
    "sft": Stage("finetune", ("generator", "questions"), ("objective.name=supervised",)),
    # Equal supervision: the loop of joint training on the same questions, its retriever frozen.
    "sft_rag": Stage(
        "joint",
        ("generator", "retriever", "kb", "questions"),
        ("train=[generator]", "refresh.name=none"),
    ),
    "joint": Stage("joint", ("generator", "retriever", "kb", "questions")),
}


def resolve(cfg: InputsT) -> InputsT:
    """`cfg` with every missing input filled in by its stage, which runs first if it has to.

    Raises UserError for an input that is neither given nor made by a world.
    """
    missing = [name for name in PATHS if name in type(cfg).model_fields and not getattr(cfg, name)]
    missing = [name for name in missing if name != "paraphrases"]
    if not missing:
        return cfg
    if cfg.world is None:
        raise UserError(f"{missing[0]} is not given: set {missing[0]}=PATH (or world.name=almanac)")
    ensure(cfg, {PATHS[name][0] for name in missing})
    found = {name: str(locate(cfg.home, name)) for name in missing}
    return cfg.model_copy(update=found)


def locate(home: str | Path, name: str) -> Path:
    """The path of an input inside `home`."""
    stage, inside = PATHS[name]
    return Path(home) / stage / inside


def ensure(cfg: Inputs, names: Iterable[str]) -> None:
    """Run every stage of `names`, and what these need, that `home` does not hold complete.

    Raises UserError when a stage was made with other settings, or when its recipe fails.
    """
    assert cfg.world is not None
    home = Path(cfg.home)
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        plan = _Plan(cfg)
        wanted = plan.closure(names)
        todo = [name for name in wanted if not plan.is_done(name)]
        if "data" in todo:
            with progress("data", total=3) as advance:
                _write_data(cfg, home / "data", advance)
            todo.remove("data")
        _run_all(plan, todo, cfg.jobs)


def _write_data(cfg: Inputs, directory: Path, advance: Any) -> None:
    """The world's files, a tokenizer trained on its pretraining text, and the knowledge base."""
    assert cfg.world is not None
    with artifact.committing(directory, kind="data") as staging:
        cfg.world.write(staging)
        advance()
        with (staging / "pretrain.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts = (f"{r['title']}\n{r['text']}\n" + "\n".join(map(" ".join, r["qa"])) for r in rows)
        train_bpe(texts, cfg.vocabulary).save_pretrained(str(staging / "tokenizer"))
        advance()
        chunker = TokenChunker(
            tokens=cfg.chunk_tokens,
            overlap=min(16, cfg.chunk_tokens // 4),
            tokenizer=str(staging / "tokenizer"),
        )
        build(staging / "kb.sqlite", [staging / "documents.jsonl"], chunker)
        advance()
        (staging / "stage.json").write_text(json.dumps({"key": _Plan(cfg).key("data")}))


@dataclass
class _Plan:
    """The commands of a job's stages, and a key per stage that says what it was made from."""

    cfg: Inputs
    keys: dict[str, str] = field(default_factory=dict)

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
        if name == "data":
            return []
        return sorted({PATHS[source][0] for source in STAGES[name].inputs})

    def yaml(self, name: str) -> Path:
        """The stage's own YAML file if the folder has one, else that of its recipe."""
        folder = self.cfg.recipes
        try:
            return config.find(f"{folder}/{name}.yaml")
        except UserError:
            return config.find(f"{folder}/{STAGES[name].recipe}.yaml")

    def overrides(self, name: str) -> list[str]:
        assert self.cfg.world is not None
        given = [f"{i}={locate(self.cfg.home, i)}" for i in STAGES[name].inputs]
        out = f"out={Path(self.cfg.home) / name}"
        return ["world=null", out, f"seed={self.cfg.world.seed}", *given, *STAGES[name].overrides]

    def command(self, name: str) -> list[str]:
        script = config.recipe(f"train/{STAGES[name].recipe}.py")
        resume = "resume=true"  # a stage that was cut off goes on where it was
        return [
            sys.executable, str(script), "-c", str(self.yaml(name)), *self.overrides(name), resume
        ]  # fmt: skip

    def key(self, name: str) -> str:
        """SHA-256 of what decides the stage's result: settings, and the keys of what it needs."""
        if name not in self.keys:
            assert self.cfg.world is not None
            parts: list[Any] = [self.cfg.world.model_dump(mode="json")]
            parts += [self.cfg.vocabulary, self.cfg.chunk_tokens]
            if name != "data":
                settings = yaml.safe_load(self.yaml(name).read_text(encoding="utf-8"))
                parts += [settings, STAGES[name].overrides, *map(self.key, self.needs(name))]
            text = json.dumps(parts, sort_keys=True)
            self.keys[name] = hashlib.sha256(text.encode()).hexdigest()
        return self.keys[name]

    def is_done(self, name: str) -> bool:
        """Complete and made from today's settings; raises UserError if from other settings."""
        directory = Path(self.cfg.home) / name
        mark = directory / "stage.json"
        if not mark.exists():
            return False
        if json.loads(mark.read_text(encoding="utf-8"))["key"] != self.key(name):
            raise UserError(
                f"{directory} was made with other settings (world, YAML or inputs); "
                "choose another directory, or delete this one"
            )
        return True


def _run_all(plan: _Plan, todo: list[str], jobs: int) -> None:
    """Run the stages, at most `jobs` at once, each when what it needs is done."""
    waiting, running = list(todo), {}
    with ExitStack() as bars:
        try:
            while waiting or running:
                for name in list(waiting):
                    blocked = {*waiting, *running} & set(plan.needs(name))
                    if len(running) < jobs and not blocked:
                        waiting.remove(name)
                        running[name] = bars.enter_context(_Process.start(plan, name))
                for name, process in list(running.items()):
                    if process.finished():
                        del running[name]
                time.sleep(0.2)
        finally:
            for process in running.values():
                process.stop()


class _Process:
    """One running stage: a subprocess whose log.jsonl moves a progress bar."""

    def __init__(self, plan: _Plan, name: str, advance: Any, total: int) -> None:
        self.plan, self.name, self._advance, self._total = plan, name, advance, total
        self.directory = Path(plan.cfg.home) / name
        self.directory.mkdir(parents=True, exist_ok=True)
        self._output = (self.directory / "stage.log").open("w", encoding="utf-8")
        threads = {key: "1" for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._popen = subprocess.Popen(
            plan.command(name),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
        )
        self._seen = 0

    @classmethod
    @contextmanager
    def start(cls, plan: _Plan, name: str) -> Iterator["_Process"]:
        """Start the stage with a progress bar of its own."""
        settings = yaml.safe_load(plan.yaml(name).read_text(encoding="utf-8"))
        total = int(settings.get("steps", 0))
        with progress(name, total=total or 1) as advance:
            yield cls(plan, name, advance, total)

    def finished(self) -> bool:
        """Move the bar; True at the end of a success; raises UserError with the last line."""
        done = self._popen.poll()
        self._follow()
        if done is None:
            return False
        self._output.close()
        if done != 0:
            lines = (self.directory / "stage.log").read_text(encoding="utf-8").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            raise UserError(
                f"stage {self.name} failed: {last.removeprefix('error: ')} "
                f"(all of it: {self.directory / 'stage.log'})"
            )
        mark = {"key": self.plan.key(self.name)}
        (self.directory / "stage.json").write_text(json.dumps(mark), encoding="utf-8")
        self._advance(max(0, (self._total or 1) - self._seen))
        return True

    def stop(self) -> None:
        """End the process; what it has checkpointed is found by the next try."""
        self._popen.terminate()
        self._popen.wait()

    def _follow(self) -> None:
        path = self.directory / "log.jsonl"
        if not path.exists():
            return
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        if lines and len(lines) > self._seen:
            try:
                note = {k: v for k, v in json.loads(lines[-1]).items() if k in ("loss", "recall")}
            except json.JSONDecodeError:  # half a line, still being written
                return
            self._advance(len(lines) - self._seen, **note)
            self._seen = len(lines)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time fills a home; the lock goes with the process, however it ends."""
    with (home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

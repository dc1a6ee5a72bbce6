"""A world's job as stages: what a recipe needs and nobody gave is found in `home`, or made there.

`home` holds one directory per stage (data, base, retriever, ft, ..., joint), each a run directory.
A stage is made once; `stage.json` in it says from which settings, and other settings are refused.
A stage may be a link to where homes share it (see `share`): those that a setting leaves alone.
"""

import fcntl
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from rag2 import artifact, stages
from rag2.generator.bpe import train_bpe
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.plan import MARK, PATHS, STAGES, Plan, marked
from rag2.plan import Inputs as Inputs
from rag2.registry import UserError
from rag2.training.log import progress
from rag2.training.sequences import plain, read_rows

InputsT = TypeVar("InputsT", bound=Inputs)

# inputs that a recipe can do without, so that a missing one is no reason to run a stage
OPTIONAL = {"paraphrases", "tokenizer"}
# inputs that another key of the recipe can stand in for
INSTEAD = {"retriever": "encoder"}


def resolve(cfg: InputsT, unused: Collection[str] = ()) -> InputsT:
    """`cfg` with every missing input filled in by its stage, which runs first if it has to.

    `unused` are inputs that this run of the recipe does without. Raises UserError for an input that
    is neither given nor made by a world.
    """
    given = {name for name, value in cfg if value or getattr(cfg, INSTEAD.get(name, name), None)}
    needed = type(cfg).model_fields.keys() - given - set(unused)
    fields = [name for name in PATHS if name in needed]
    missing = [name for name in fields if name not in OPTIONAL or cfg.world and name == "tokenizer"]
    if not missing:
        return cfg
    if cfg.world is None:
        raise UserError(f"{missing[0]} is not given: set {missing[0]}=PATH, or a world to make it")
    ensure(cfg, {PATHS[name][0] for name in missing})
    return cfg.model_copy(update={name: str(locate(cfg.home, name)) for name in missing})


def locate(home: str | Path, name: str) -> Path:
    """The path of an input inside `home`."""
    stage, inside = PATHS[name]
    return Path(home) / stage / inside


def ensure(cfg: Inputs, names: Iterable[str]) -> None:
    """Run every stage of `names`, and what these need, that `home` does not hold complete.

    Raises UserError without a world, when a stage was made with other settings, or when its recipe
    fails.
    """
    if cfg.world is None:
        raise UserError("world is not given: set world=NAME, or -c a config that names one")
    plan = Plan(cfg)
    home = Path(cfg.home)
    artifact.make_folders(home)
    with _locked(home):
        todo = [name for name in plan.closure(names) if not plan.is_done(name)]
        if "data" in todo:
            todo.remove("data")
            _write_data(cfg, plan.directory("data"), plan.note("data"))
        if todo:
            jobs = [plan.job(name) for name in todo]
            for name in todo:
                plan.mark(name, done=False)
            stages.run(jobs, cfg.jobs, plan.mark)


def needed(cfg: Inputs) -> list[str]:
    """The stages that a recipe with this configuration may ask of its world's home.

    A comparison may ask for all; of those, the ones whose YAML file its folder does not have are
    left out. Raises UserError for a YAML file that cannot be read.
    """
    plan = Plan(cfg)
    fields = type(cfg).model_fields
    asked = {stage for name, (stage, _) in PATHS.items() if name in fields}
    if "arms" in fields:  # a comparison may need every stage
        asked = set(STAGES)
    return [name for name in plan.closure(asked or STAGES) if plan.has_yaml(name)]


def keys(cfg: Inputs, names: Iterable[str]) -> dict[str, str]:
    """The key of each stage: a name with an equal key has equal results.

    Raises UserError for a YAML file that cannot be read.
    """
    plan = Plan(cfg)
    return {name: plan.key(name) for name in names}


def jobs(cfg: Inputs, names: Iterable[str]) -> list[stages.Job]:
    """The commands that make these stages; `data` has none."""
    plan = Plan(cfg)
    return [plan.job(name) for name in names if name != "data"]


def share(cfg: Inputs, home: Path, shared: Path, names: Iterable[str]) -> None:
    """Fill `home` with links, so that homes with equal stages have them in common.

    A stage lies, or will be made, in `shared` under its name and key; only one that `cfg.home`
    holds complete, made from the same settings, and that `shared` has not begun, is used there.
    """
    artifact.make_folders(home)
    for name, key in keys(cfg, names).items():
        there, link = shared / f"{name}-{key[:16]}", home / name
        complete = {"key": key, "done": True}
        if marked(there) is None and marked(Path(cfg.home) / name) == complete:
            there = Path(cfg.home) / name
        link.unlink(missing_ok=True)
        link.symlink_to(there.absolute())


def _write_data(cfg: Inputs, directory: Path, note: str) -> None:
    """The world's files, a tokenizer trained on its pretraining text, and the knowledge base.

    `note`, of what they are made from, is committed with them: neither is there without the other.
    """
    assert cfg.world is not None
    with (
        progress("data", total=3) as advance,
        artifact.committing(directory, kind="data") as staging,
    ):
        cfg.world.write(staging)
        advance()
        texts = map(plain, read_rows(staging / "pretrain.jsonl"))
        train_bpe(texts, cfg.vocabulary).save_pretrained(str(staging / "tokenizer"))
        advance()
        overlap = min(16, cfg.chunk_tokens // 4)
        tokenizer = str(staging / "tokenizer")
        chunker = TokenChunker(tokens=cfg.chunk_tokens, overlap=overlap, tokenizer=tokenizer)
        documents = staging / "documents.jsonl"  # named by questions, every one of them
        build(staging / "kb.sqlite", [documents], chunker, keep_duplicates=True)
        (staging / MARK).write_text(note, encoding="utf-8")
        advance()


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time fills a home; the lock goes with the process, however it ends."""
    with (home / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Console(stderr=True).print(f"home={home} is in use by another command; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

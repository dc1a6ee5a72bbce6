"""A run directory from its first file to its last: config.yaml, log.jsonl, checkpoints/, final/."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from rag2 import artifact, config
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.training import checkpoint, distributed, optim, sharding, track
from rag2.training.log import NoLog, RunLog
from rag2.training.optim import Optimizer

# Keys that may differ between a run and its continuation: they do not change what its steps up to
# there have computed. (Other `steps` change the schedule from there on, where it decays.)
FREE = ("steps", "resume", "jobs", "log_with", "guard.action") + tuple(
    f"refresh.{key}" for key in ("patience", "retries", "nice", "duty", "cpus")
)


class Settings(Protocol):
    """What every recipe's configuration has."""

    @property
    def out(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def checkpoint_every(self) -> int: ...
    @property
    def log_with(self) -> list[str]: ...


# What must be as it was when a run goes on, by its name in a checkpoint.
GIVEN = {
    "data": "questions, texts or knowledge base that it learns from",
    "frozen": "weights that it builds on and leaves as they are",
}
UNDER_WAY = ("checkpoints", "generations", "snapshots")
MADE = (*UNDER_WAY, "final")
LOGS = ("log.jsonl", "swaps.jsonl")


class Run:
    """Opens `cfg.out`, restores what is there if `cfg.resume`, and commits what is asked for."""

    def __init__(
        self, cfg: Any, modules: dict[str, nn.Module], optimizer: Optimizer, data: Iterable[Any]
    ) -> None:
        """Start or continue the run, which learns from `data`, told apart by what its repr is.

        Raises UserError when it was begun with another config or other data, when `out` holds what
        this run did not make, when it is further than cfg.steps, when another process is writing to
        it, and when a tracker cannot start.
        """
        track.check_installed(cfg.log_with)
        self._cfg = cfg
        self.out = Path(cfg.out)
        self.modules, self.optimizer = modules, optimizer
        saved = self.out / "config.yaml"
        if cfg.resume and saved.exists():
            _refuse_changes(cfg, saved)
        elif there := [name for name in (*MADE, saved.name, *LOGS) if _is_there(self.out / name)]:
            raise UserError(
                f"{self.out} holds {there[0]} of another run; resume=true goes on with the same "
                "settings, else choose another out= or delete it"
            )
        state = checkpoint.load(self.out, modules, optimizer) if cfg.resume else None
        self.start: int = state["step"] if state else 0
        if cfg.steps is not None and self.start > cfg.steps:
            raise UserError(f"{self.out} is at step {self.start}: steps={cfg.steps} is behind it")
        self.extra: dict[str, Any] = state["extra"] if state else {}
        self.given = {"data": _digest(_lines(data)), "frozen": _digest(_frozen(modules))}
        for name, what in GIVEN.items():
            if self.extra.pop(name, self.given[name]) != self.given[name]:
                raise UserError(
                    f"{self.out}: the {what} have changed since it began; resume with the same "
                    "or choose another out="
                )
        distributed.barrier()  # every process has read what the first one may now replace
        self.log: RunLog | track.TrackedLog | NoLog = NoLog()
        if distributed.rank() == 0:
            self.log = log = RunLog(self.out, self.start)
            if cfg.log_with:
                self.log = track.TrackedLog(log, cfg, self.out, self.start)
            # From step 0: what was left before the first checkpoint goes, but for a result, which
            # stays until this run has one of its own.
            if state is None:
                for made in (path for name in UNDER_WAY for path in (self.out / name).glob("*")):
                    artifact.remove(made) if made.is_dir() else made.unlink()
            artifact.replace(saved, config.dump(cfg))

    def due(self, step: int) -> bool:
        """Whether a checkpoint follows `step`; the last always, for what comes then may fail.

        Without `steps`, which step is the last is the caller's to know.
        """
        return (step + 1) % self._cfg.checkpoint_every == 0 or step + 1 == self._cfg.steps

    def checkpoint(self, step: int, **extra: Any) -> None:
        """Commit everything needed to go on at `step`; all processes call it.

        Raises NonFiniteError when the last update left weights that are not numbers.
        """
        optim.check_finite(self.modules, step)
        self.log.sync()
        checkpoint.save(self.out, step, self.modules, self.optimizer, self.given | extra)

    def finish(
        self,
        generator: Generator | None = None,
        retriever: DualEncoder | None = None,
        prompt: Prompt | None = None,
        **meta: Any,
    ) -> None:
        """Commit final/: the trained halves, the prompt, and `meta` in the manifest.

        All processes call it, for they may hold pieces of the generator; the first one writes.
        Raises NonFiniteError as `checkpoint` does.
        """
        optim.check_finite(self.modules)
        weights = None
        if generator is not None and sharding.is_sharded(generator.model):
            weights = sharding.whole(generator.model.state_dict(keep_vars=True))
        if distributed.rank() != 0:
            return
        with artifact.committing(
            self.out / "final", kind="system", meta=meta, replacing=True
        ) as staging:
            if generator is not None:
                generator.save(staging / "generator", weights)
            if retriever is not None:
                retriever.save(staging / "retriever")
            if prompt is not None:
                text = json.dumps(prompt.model_dump(mode="json"), indent=2)
                (staging / "prompt.json").write_text(text, encoding="utf-8")
        self.log.close()


def _is_there(path: Path) -> bool:
    """A run that died at its first breath may have left an empty log."""
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of the parts one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _lines(rows: Iterable[Any]) -> Iterator[bytes]:
    """The repr of each row."""
    return (repr(row).encode("utf-8", "surrogatepass") + b"\n" for row in rows)


def _frozen(modules: Mapping[str, nn.Module]) -> Iterator[memoryview]:
    """The weights that do not learn, which no checkpoint holds; those in pieces are left out."""
    for module in modules.values():
        for weight in module.parameters():
            if not (weight.requires_grad or isinstance(weight, DTensor)):
                yield weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _refuse_changes(cfg: config.Config, saved: Path) -> None:
    """Raise UserError if the run in `saved` was begun with other settings than `cfg`."""
    old = _flat(config.load(type(cfg), str(saved), without=FREE).model_dump(mode="json"))
    new = _flat(cfg.model_dump(mode="json"))
    for key in {**old, **new}:
        if key not in (*FREE, "out") and old.get(key) != new.get(key):
            raise UserError(
                f"{saved.parent} was begun with {key}={old.get(key)!r}, not {new.get(key)!r}; "
                "resume with the same settings or choose another out="
            )


def _flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Settings by the keys of the command line: {"refresh.every": 40, ...}."""
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{within}{key}"
        rows |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return rows

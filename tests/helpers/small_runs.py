"""Short runs of the training recipes, and what they leave."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rag2.training.log import RunLog
from small_world import SHAPE

Load = Callable[[str], ModuleType]
KINDS = ("pretrain", "retriever", "finetune", "joint")


class Killed(Exception):
    """What stands for the kill of a process."""


def settings(kind: str, home: Path) -> dict[str, Any]:
    """A run of nine steps with a checkpoint every four, small and fast to change its weights."""
    data = home / "data"
    common = {"seed": 3, "steps": 9, "checkpoint_every": 4, "schedule": {"warmup": 2}}
    made = {"kb": str(data / "kb.sqlite"), "questions": str(data / "questions.jsonl")}
    base = {"generator": str(home / "generator")}
    return (
        common
        | {
            "pretrain": {
                "corpus": str(data / "pretrain.jsonl"),
                "tokenizer": str(data / "tokenizer"),
                "network": SHAPE,
                "batch_size": 4,
            },
            "retriever": made
            | {
                "tokenizer": str(data / "tokenizer"),
                "encoder": SHAPE,
                "batch_size": 8,
                "validate_every": 3,
                "schedule": {"warmup": 2, "decay": "constant"},
            },
            # Dropout: only a run that restores the random state goes on as it would have.
            "finetune": made
            | base
            | {
                "tuning": {"name": "lora", "rank": 4, "dropout": 0.2},
                "objective": {"name": "unsupervised", "block": 64},
                "batch_size": 4,
                "lr": 1e-2,
            },
            # Re-indexed after steps 3, 6, 9: at the kill the index is younger than the checkpoint.
            "joint": made
            | base
            | {
                "retriever": str(home / "retriever"),
                "refresh": {"name": "sync", "every": 3},
                "batch_size": 4,
                "lr_retriever": 3e-3,
                "lr_generator": 1e-3,
            },
        }[kind]
    )


def start(recipe: Load, kind: str, home: Path, out: Path, **changes: Any) -> dict[str, float]:
    """Run a recipe in this process."""
    module = recipe(f"train/{kind}.py")
    cls = getattr(module, f"{kind.title()}Config")
    return module.main(cls(**settings(kind, home) | {"out": str(out)} | changes))


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run die in the middle of writing the line of `step` to its log."""
    honest = RunLog.write

    def write(self: RunLog, **values: Any) -> dict[str, Any]:
        if values["step"] == step:
            self._file.write(json.dumps(values)[:20])
            self.close()
            raise Killed
        return honest(self, **values)

    monkeypatch.setattr(RunLog, "write", write)


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without wall-clock times."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "_bytes"))} for row in rows]


def weights(out: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in final/."""
    paths = sorted((out / "final").rglob("*.safetensors"))
    assert paths
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def generations(out: Path) -> dict[str, str]:
    """SHA-256 of the index files that lie in generations/."""
    paths = sorted((out / "generations").rglob("*"))
    return {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in paths
        if p.is_file()
    }

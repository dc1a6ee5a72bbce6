"""Save and resume a run exactly: weights, optimizer, RNG and step as safetensors and JSON."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rag2 import artifact
from rag2.registry import UserError
from rag2.training import distributed, sharding
from rag2.training.optim import Optimizer


def save(
    out: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizer: Optimizer,
    extra: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Commit checkpoints/step-NNNNNN and move `latest` to it; older ones go only after that.

    All processes call it, for they may hold pieces of the weights; the first one writes.
    """
    folder = out / "checkpoints"
    directory = folder / f"step-{step:06d}"
    files = {name: sharding.whole(_tensors(module)) for name, module in modules.items()}
    tensors, scalars = _optimizer_state(optimizer)
    tensors |= _random_state()
    if distributed.rank() != 0:
        return directory
    artifact.sweep(folder)
    # A run that was killed between a checkpoint's commit and its pointer went on from before it.
    for ahead in _in_order(folder):
        if _step(ahead) >= step:
            artifact.remove(ahead)
    with artifact.committing(
        directory, kind="checkpoint", meta={"step": step}, pointer=folder / "latest"
    ) as staging:
        for name, rows in files.items():
            save_file(rows, staging / f"{name}.safetensors")
        save_file(tensors, staging / "optimizer.safetensors")
        state = {"step": step, "optimizer": scalars, "extra": extra}
        (staging / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in _in_order(folder)[:-keep]:
        artifact.remove(old)
    return directory


def load(out: Path, modules: dict[str, nn.Module], optimizer: Optimizer) -> dict[str, Any] | None:
    """Restore the checkpoint that `latest` names; returns its state, or None when there is none.

    Without a pointer it is the last whole one: the first may have been committed and not named yet.
    """
    folder = out / "checkpoints"
    whole = [directory for directory in _in_order(folder) if artifact.is_complete(directory)]
    directory = artifact.follow(folder / "latest") or (whole[-1] if whole else None)
    if directory is None:
        return None
    artifact.verify(directory, kind="checkpoint")
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    for name, module in modules.items():
        _restore(module, load_file(directory / f"{name}.safetensors"), directory / name)
    tensors = load_file(directory / "optimizer.safetensors")
    _restore_random_state({key: tensors.pop(key) for key in list(tensors) if key in RANDOM})
    _restore_optimizer(optimizer, tensors, state["optimizer"])
    return state


def retained(out: Path) -> list[dict[str, Any]]:
    """What the run stored beside its weights in each checkpoint that is still there."""
    paths = (folder / "state.json" for folder in _in_order(out / "checkpoints"))
    there = (path for path in paths if path.is_file())  # one may be half removed
    return [json.loads(path.read_text(encoding="utf-8"))["extra"] for path in there]


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random; every batch has its own counter-based generator besides."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _in_order(folder: Path) -> list[Path]:
    """Checkpoints by their step, which may have more digits than the name has room for."""
    return sorted(folder.glob("step-*"), key=_step)


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


RANDOM = ("rng/torch", "rng/cuda")


def _random_state() -> dict[str, torch.Tensor]:
    """The state [world, bytes] of each process's generators; all processes call it."""
    state = {"rng/torch": distributed.each(torch.get_rng_state()).cpu()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["rng/cuda"] = distributed.each(torch.cuda.get_rng_state()).cpu()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """This process's own; where there are more processes than before, those take turns."""
    own = {key: rows[distributed.rank() % len(rows)].clone() for key, rows in state.items()}
    torch.set_rng_state(own["rng/torch"])
    if "rng/cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["rng/cuda"])


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes of a module's state; tied tensors once, as safetensors demands.

    Frozen weights come from where the run began: under adapters a checkpoint holds these alone,
    with the networks that make virtual tokens.
    """
    # Of tied weights named_parameters knows one name, state_dict all: compare the objects (weights
    # in pieces have no memory of their own to compare). A quantised layer's scales are neither.
    left = {id(weight) for weight in module.parameters() if weight.requires_grad}
    left |= {id(buffer) for buffer in module.buffers()}
    rows = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in left:
            left.remove(id(tensor))
            rows[name] = tensor
    return rows


def _restore(module: nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    own = _tensors(module)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise UserError(f"checkpoint {where}: tensor {odd!r} does not fit this configuration")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"checkpoint {where}: tensor {name!r} is {list(tensor.shape)}, but "
                f"{list(own[name].shape)} in this configuration"
            )
    pieces = {name: sharding.cut(tensor, own[name]) for name, tensor in tensors.items()}
    module.load_state_dict(pieces, strict=False)


def _optimizer_state(
    optimizer: Optimizer,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """AdamW's moments as flat tensors `index/key`; the groups' scalars as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}/{key}": value
        for index, row in state["state"].items()
        for key, value in row.items()
    }
    whole = {name: value.clone() for name, value in sharding.whole(tensors).items()}
    return whole, state["param_groups"]


def _restore_optimizer(
    optimizer: Optimizer,
    tensors: dict[str, torch.Tensor],
    groups: list[dict[str, Any]],
) -> None:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    rows: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        moment = value.ndim > 0  # the count of steps is a scalar
        value = sharding.cut(value, weights[int(index)]) if moment else value
        rows.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": rows, "param_groups": groups})

"""AdamW over named groups of parameters, Muon beside it, and learning rates by step."""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from rag2.config import Config
from rag2.registry import UserError
from rag2.training import distributed, sharding

_Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[_Decay, _Decay]  # of AdamW's running means: of gradients, of their squares


class Schedule(Config):
    """Linear warm-up over `warmup` steps, then constant, linear or cosine decay to `floor` x lr."""

    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(default=30, ge=0)
    floor: float = Field(default=0.05, ge=0, le=1)

    def factor(self, step: int, steps: int) -> float:
        """The share of the peak learning rate at `step` (counted from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        left = 1.0 - done if self.decay == "linear" else (1.0 + math.cos(math.pi * done)) / 2
        return self.floor + (1.0 - self.floor) * left


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Every parameter that takes a gradient, each once, in module order."""
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def adamw(
    groups: Mapping[str, tuple[Iterable[nn.Parameter], float]],
    weight_decay: float,
    betas: tuple[float, float],
) -> torch.optim.AdamW:
    """AdamW with one pair of groups per name: weights decay, vectors and scalars do not.

    Raises UserError for weights in half precision: most of AdamW's steps would round to nothing.
    """
    rows = []
    for name, (parameters, lr) in groups.items():
        parameters = list(parameters)
        for dtype in {p.dtype for p in parameters if p.dtype.itemsize < 4}:
            what = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name}: {what} weights cannot be trained: dtype=float32, or tuning=lora"
            )
        for decay in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2) == decay]
            if chosen:
                rows.append(
                    {
                        "params": chosen,
                        "lr": lr,
                        "peak": lr,
                        "name": name,
                        "weight_decay": weight_decay if decay else 0.0,
                    }
                )
    if not rows:  # all is frozen; torch takes an empty group, but not an empty list
        rows.append({"params": [], "lr": 0.0, "peak": 0.0, "name": "nothing"})
    return torch.optim.AdamW(rows, betas=betas)


def muon(
    model: Any, lr_hidden: float, lr: float, weight_decay: float, betas: tuple[float, float]
) -> "Joined":
    """Muon for the hidden matrices, AdamW for embeddings, head and vectors (Jordan et al. 2024).

    Training from scratch it needs fewer steps than AdamW alone.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    outer = {id(weight) for end in ends for weight in end.parameters()}
    weights = trainable([model])
    hidden = [p for p in weights if p.ndim == 2 and id(p) not in outer]
    rest = [p for p in weights if p.ndim != 2 or id(p) in outer]
    group = {"params": hidden, "lr": lr_hidden, "peak": lr_hidden, "name": "hidden"}
    return Joined(
        torch.optim.Muon([group], lr=lr_hidden, weight_decay=weight_decay),
        adamw({"generator": (rest, lr)}, weight_decay, betas),
    )


class Joined:
    """Several optimizers over different weights, used and saved as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """Update every weight once."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """In torch's form: the parameters of all parts are numbered in one row."""
        state, groups, offset = {}, [], 0
        for part in self.parts:
            own = part.state_dict()
            state.update({offset + index: row for index, row in own["state"].items()})
            for group in own["param_groups"]:
                groups.append({**group, "params": [offset + i for i in group["params"]]})
            offset += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        groups, offset = list(saved["param_groups"]), 0
        for part in self.parts:
            mine, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            count = sum(len(group["params"]) for group in mine)
            part.load_state_dict(
                {
                    "state": {
                        index - offset: row
                        for index, row in saved["state"].items()
                        if offset <= index < offset + count
                    },
                    "param_groups": [
                        {**group, "params": [i - offset for i in group["params"]]} for group in mine
                    ],
                }
            )
            offset += count


Optimizer = torch.optim.Optimizer | Joined


def set_lr(optimizer: Optimizer, factor: float, **left: float) -> dict[str, float]:
    """Set every group's learning rate to `factor` x its peak; returns name -> learning rate.

    `left`: name -> the share of it that a group is left with.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor * left.get(group["name"], 1.0)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class NonFiniteError(UserError):
    """The loss or the gradient is not a number: raised before the update is applied."""


def clip(parameters: list[nn.Parameter], loss: float, max_norm: float, step: int) -> float:
    """Clip the gradient; returns its norm, raises NonFiniteError before an update could happen."""
    norm = float(sharding.clip(parameters, max_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {norm}: not finite; try a lower learning rate"
        )
    return norm


def check_finite(modules: Mapping[str, nn.Module], step: int | None = None) -> None:
    """Raise NonFiniteError naming a trained weight that is not finite in any process.

    Before a commit: the update of the last step is looked at by no later loss.
    """
    bad = [
        f"{name}.{path}"
        for name, module in modules.items()
        for path, weight in module.named_parameters()
        if weight.requires_grad and not sharding.piece(weight).isfinite().all()
    ]
    if distributed.any_of(bool(bad)):
        where = f"after {step} steps" if step is not None else "at the end"
        what = bad[0] if bad else "a weight of another process"
        raise NonFiniteError(f"{what} is not finite {where}; try a lower learning rate")

"""AdamW over named groups of parameters, and learning rates as functions of the step."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from rag2.config import Config
from rag2.registry import UserError


class Schedule(Config):
    """Linear warm-up over `warmup` steps, then constant, linear or cosine decay to `floor` x lr."""

    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 30
    floor: float = 0.05

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
    groups: dict[str, tuple[Iterable[nn.Parameter], float]],
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
    return torch.optim.AdamW(rows, betas=betas)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate to `factor` x its peak; returns name -> learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number: raised before the update is applied."""


def clip(parameters: list[nn.Parameter], loss: float, max_norm: float, step: int) -> float:
    """Clip the gradient; returns its norm, raises NonFiniteError before an update could happen."""
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {norm}: not finite")
    return norm

"""What a step of joint training leaves at the parameters, and whether two leave the same."""

import copy

import torch
from torch import Tensor

from rag2.losses.marginal import Marginal
from rag2.rag import RagModel
from rag2.training.step import OnePass, TwoPass
from rag2.types import Chunk

Batch = tuple[list[str], list[str], list[list[Chunk]]]


def gradients(
    rag: RagModel, step: OnePass | TwoPass, batch: Batch, seed: int = 0
) -> dict[str, Tensor]:
    """The gradient that one step leaves at every parameter; zeros where it leaves none."""
    rag.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    step(rag, Marginal(), *batch)
    return left(rag)


def left(rag: RagModel) -> dict[str, Tensor]:
    """The gradients that lie at the parameters."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in rag.named_parameters()
    }


def differing(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-3) -> list[str]:
    """The parameters whose gradients differ by more than `tolerance` of the module's largest."""
    assert a.keys() == b.keys()
    largest = {
        half: max(float(g.abs().max()) for name, g in a.items() if name.startswith(half))
        for half in ("retriever", "generator")
    }
    return [
        name
        for name, g in a.items()
        if float((g - b[name]).abs().max()) > tolerance * largest[name.split(".")[0]]
    ]


def dead(rag: RagModel, step: OnePass | TwoPass, batch: Batch) -> set[str]:
    """The parameters without a gradient, in double precision: rounding is far below the bar."""
    found = gradients(copy.deepcopy(rag).double(), step, batch)
    return {name for name, g in found.items() if float(g.abs().max()) < 1e-13}

"""Several processes, one run: who am I, all rows of a batch, one average over all gradients.

A joint step sends several backward passes through the generator, so the gradients are averaged once
after the last of them instead of by a wrapper that would synchronise each.
"""

import os
import re
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from rag2.registry import UserError


def start(name: str = "cpu") -> torch.device:
    """This process's device, after it joined the group that torchrun or accelerate launched.

    `name` is cpu, cuda (each process of the group takes its own GPU) or cuda:N. Raises UserError
    for a device that is not there.
    """
    where = device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    return where


def device(name: str) -> torch.device:
    """The device that `name` (cpu, cuda, cuda:N) means; UserError for one that is not there."""
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; allowed: cpu, cuda, cuda:N")
    where = torch.device(name)
    number = where.index if where.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: there are {torch.cuda.device_count()} GPUs; try device=cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def rank() -> int:
    """This process's number, 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def any_of(value: bool) -> bool:
    """Whether it is true in any process; the same answer in all."""
    return bool(largest(value))


def largest(value: int) -> int:
    """The largest of all processes' values; the same answer in all."""
    if world() == 1:
        return value
    found = torch.tensor(value, dtype=torch.long, device=_where())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def gathered(mine: Tensor) -> Tensor:
    """The rows of all processes in the order of the batch, whose row i process i % world() took.

    `mine` has equally many rows [B / world, ...] in every process; returns [B, ...].
    """
    return rearrange(each(mine), "w b ... -> (b w) ...")


def each(mine: Tensor) -> Tensor:
    """What each process has, [world, ...] of equal shapes, in the order of their numbers."""
    if world() == 1:
        return rearrange(mine, "... -> 1 ...")
    mine = mine.to(_where()).contiguous()
    shares = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(shares, mine)
    return torch.stack(shares)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; a missing one counts as zero.

    A weight that has none in any process keeps none: AdamW would let it decay. FSDP2 has left
    those of weights in pieces averaged.
    """
    if world() == 1:
        return
    own = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    felt_P = torch.tensor([p.grad is not None for p in own], dtype=torch.uint8, device=_where())
    dist.all_reduce(felt_P, op=dist.ReduceOp.MAX)
    for parameter, felt in zip(own, felt_P.tolist(), strict=True):
        if not felt:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def _where() -> str:
    """The kind of device that the group's messages lie on."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"

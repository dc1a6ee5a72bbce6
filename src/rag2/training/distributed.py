"""Several processes, one run: who am I, and one average over all gradients.

A joint step sends several backward passes through the generator, so the gradients are averaged once
after the last of them instead of by a wrapper that would synchronise each.
"""

import os
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch import nn


def start() -> None:
    """Join the group that torchrun or accelerate launched; a single process does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """This process's number, 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; a missing one counts as zero."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world()


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()

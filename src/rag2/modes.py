"""What holds for a while: a model in evaluation mode, a precision of products, more cores."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rag2.registry import UserError

Precision = Literal["highest", "high", "medium"]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module of the torch model is in the mode it had."""
    training = [module for module in model.modules() if module.training]
    if training:  # setting the mode of every module takes longer than embedding a short text
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def matmul(precision: Precision, device: str = "cpu") -> Iterator[None]:
    """torch.set_float32_matmul_precision inside, as it was before afterwards.

    Sums are always in float32. What a factor is rounded to depends on the device: at "medium", to
    bfloat16 on a CPU with AMX or AVX512-BF16; at "high" and "medium", to TensorFloat-32 on CUDA; on
    others nothing is rounded. At "medium" a CPU's library keeps compiled code for every shape, up
    to some GiB where shapes vary (ONEDNN_PRIMITIVE_CACHE_CAPACITY bounds it, and costs time).
    """
    before = torch.get_float32_matmul_precision()
    # The CPU's fused kernel multiplies small blocks, each rounded anew: at 80 tokens its backward
    # pass takes twice the time that it takes at "highest".
    fused = precision != "medium" or device != "cpu"
    with sdpa_kernel([SDPBackend.MATH, *(FUSED if fused else [])]):
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def computing_on(threads: int | None, cpus: Collection[int] | None) -> Iterator[None]:
    """So many threads of torch, on these cores, inside; null: as before."""
    bound = cpus if hasattr(os, "sched_setaffinity") else None  # Linux alone can
    before = torch.get_num_threads(), os.sched_getaffinity(0) if bound else None
    if bound:
        try:  # first: a new thread is bound to the cores of its maker
            os.sched_setaffinity(0, bound)
        except OSError:
            raise UserError(f"cpus={list(bound)}: this process may not use these cores") from None
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if before[1]:
            os.sched_setaffinity(0, before[1])

"""How precisely float32 matrices are multiplied while a recipe trains."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["highest", "high", "medium"]


@contextmanager
def matmul(precision: Precision, device: str = "cpu") -> Iterator[None]:
    """torch.set_float32_matmul_precision inside, as it was before afterwards.

    Sums are always in float32. What a factor is rounded to depends on the device: at "medium", to
    bfloat16 on a CPU with AMX or AVX512-BF16; at "high" and "medium", to TensorFloat-32 on CUDA; on
    others nothing is rounded.
    """
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if precision == "medium" and device == "cpu":
            # The fused kernel multiplies small blocks, each rounded anew: at 80 tokens its backward
            # pass takes twice the time that it takes at "highest".
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

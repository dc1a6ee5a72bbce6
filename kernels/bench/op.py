"""What a benchmark knows about an operation: shapes, inputs, truth, work, and who computes it."""

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# Ceilings of one H200, measured: a copy in HBM (read and write), and a large bf16 product.
COPY_BYTES = 4.3e12  # a second
MATMUL_FLOPS = 790e12  # a second

HEADLINE, FURTHER, SWEEP, LAST = range(4)  # the order in which shapes are run
HALF = torch.bfloat16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHORT = {dtype: name for name, dtype in DTYPES.items()}

Inputs = dict[str, Any]
"""Tensors by name; `upstream`, if there, is the gradient of the first output."""
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One shape of an operation: sizes by letter, the dtype, forward or forward and backward."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    backward: bool = False
    f: float = 1.0  # share of rows that carry posterior
    turn: int = HEADLINE
    target_ms: float | None = None
    target_mib: float | None = None

    @property
    def timed(self) -> bool:
        """Whether times and memory are asked for; a sweep is for correctness alone."""
        return self.turn != SWEEP

    @property
    def bytes_each(self) -> int:
        """Bytes of one number of the inputs."""
        return self.dtype.itemsize

    def of(self, letters: str) -> tuple[int, ...]:
        """The sizes of some letters: `case.of("BK")`."""
        return tuple(self.sizes[letter] for letter in letters)


@dataclass(frozen=True)
class Provider:
    """Who computes an operation; `needs` are modules, `module:name` where a name must be there."""

    call: Callable[[Inputs, Case], Outputs]
    needs: tuple[str, ...] = ("torch",)
    gpu_only: bool = False
    cpu_only: bool = False
    interpretable: bool = False  # Triton's interpreter takes the place of the GPU
    compiles: bool = False
    note: str = ""

    @property
    def ours(self) -> bool:
        """Whether it must match the truth and be equal twice."""
        return any(need.startswith("rag2_kernels") for need in self.needs)

    def absent(self, device: torch.device) -> str:
        """Why it cannot run on the device, or nothing."""
        for need in self.needs:
            module, _, name = need.partition(":")
            if find_spec(module.partition(".")[0]) is None:
                return f"not installed: {module.replace('_', '-')}"
            if name and not hasattr(importlib.import_module(module), name):
                return f"not installed: {module} has no {name}"
        if self.gpu_only and device.type != "cuda" and not (self.interpretable and interpreted()):
            return "not run: needs a GPU"
        if self.cpu_only and device.type != "cpu":
            return "not run: runs on a CPU only"
        return ""

    def versions(self) -> str:
        """Of the packages it is made of: `torch 2.13.0, triton 3.7.1`."""
        tops = {need.partition(":")[0].partition(".")[0] for need in self.needs}
        if "rag2_kernels" in tops:  # has no version of its own
            tops = (tops - {"rag2_kernels"}) | {"torch"}
        found = (f"{top} {version_of(top)}" for top in sorted(tops) if find_spec(top) is not None)
        return ", ".join(found)


@dataclass(frozen=True)
class Op:
    """An operation. `judged` makes of outputs what is compared with that of the truth."""

    name: str
    suites: dict[str, tuple[Case, ...]]
    make: Callable[[Case, torch.device], Inputs]
    leaves: tuple[str, ...]  # the inputs that get gradients, where a case has a backward pass
    providers: dict[str, Provider]  # `plain` first: what errors and times are compared with
    exact: Callable[[Inputs, Case], Outputs]  # in fp64, a block at a time
    flops: Callable[[Case], float]  # of what must be computed, backward included
    moved: Callable[[Case], float]  # bytes of inputs, outputs and gradients, each once
    judged: Callable[[Inputs, Outputs], Outputs] = field(default=lambda given, outputs: outputs)

    def floor_s(self, case: Case) -> float:
        """Seconds below which an H200 cannot be; fp32 products are not the tensor cores'."""
        halves = case.bytes_each == 2
        return max(self.moved(case) / COPY_BYTES, self.flops(case) / MATMUL_FLOPS * halves)


def ours(call: Callable[[Inputs, Case], Outputs], name: str, impl: str) -> Provider:
    """`rag2_kernels.<name>` with `impl`."""
    triton = impl == "triton"
    needs = (f"rag2_kernels:{name}", *(("triton",) if triton else ()))
    return Provider(call, needs, gpu_only=triton, interpretable=triton)


def swept(*cases: Case) -> tuple[Case, ...]:
    """For correctness: forward and backward in every dtype."""
    return tuple(
        replace(case, dtype=dtype, backward=True, turn=SWEEP)
        for case in cases
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def generator(device: torch.device) -> torch.Generator:
    """The same numbers in every run."""
    return torch.Generator(device).manual_seed(0)


def unit_rows(rows_ND: Tensor) -> Tensor:
    """To length 1, in place and in blocks: a corpus may fill a third of the device."""
    for block_nD in rows_ND.split(1 << 20):
        block_nD /= block_nD.norm(dim=1, keepdim=True)
    return rows_ND


def blocks(rows: int, each: int, device: torch.device) -> list[slice]:
    """Slices of the rows whose fp64 block of `each` numbers a row fits: 1 GiB on a GPU."""
    step = max(1, (1 << (27 if device.type == "cuda" else 24)) // each)
    return [slice(start, start + step) for start in range(0, rows, step)]


def compiled(plain: Callable[[Inputs, Case], Outputs]) -> Provider:
    """torch.compile of the plain function; where kernels are interpreted, only its tracing."""
    built = cache(
        lambda backend: torch.compile(plain, dynamic=False, backend=backend)  # one a process
    )
    return Provider(
        lambda given, case: built("eager" if interpreted() else "inductor")(given, case),
        compiles=True,
    )


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def version_of(module: str) -> str:
    """The installed version of a top-level module."""
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return getattr(importlib.import_module(module), "__version__", "unknown")

"""What every launch needs: tile shapes, descriptors, the accumulator's type, the device."""

import json
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

CONFIGS = Path(__file__).parent / "configs"
TMA_BYTES = 16  # rows that a tensor descriptor takes begin at a multiple of this


@dataclass(frozen=True, slots=True)
class Tiles:
    """The shape of a matrix kernel's work: rows, columns and depth of a tile, tiles a program."""

    BM: int
    BN: int
    BH: int
    SPAN: int
    GROUP: int
    warps: int
    stages: int
    TMA: bool = False


def tiles(kernel: str, hidden_MH: Tensor, rows: int, weight: tuple[int, ...]) -> Tiles:
    """The tuned shape for the device: that of the nearest (rows, *weight) in log space."""
    if interpreted():  # a program costs a millisecond there; small tiles meet the edges
        return Tiles(32, 64, 32, 2, 2, 4, 1)
    name = torch.cuda.get_device_name(hidden_MH.device) if hidden_MH.is_cuda else "any"
    wanted = [math.log(max(1, size)) for size in (rows, *weight)]
    bits = 8 * hidden_MH.element_size()
    entries = [e for e in table(kernel, name) if e["bits"] == bits]
    entries = entries or [e for e in table(kernel, "any") if e["bits"] == bits]
    nearest = min(entries, key=lambda e: math.dist(wanted, [math.log(s) for s in e["shape"]]))
    shape = Tiles(**nearest["tiles"])
    aligned = weight[-1] * hidden_MH.element_size() % TMA_BYTES == 0
    return shape if aligned else Tiles(**{**nearest["tiles"], "TMA": False, **nearest["pointer"]})


@cache
def table(kernel: str, device: str) -> list[dict]:
    """The entries of CONFIGS/<kernel>.json for a device, or those for any."""
    table = json.loads((CONFIGS / f"{kernel}.json").read_text(encoding="utf-8"))
    return table.get(device) or table["any"]


def descriptors(shape: Tiles, x_MH: Tensor, w_VH: Tensor) -> tuple:
    """Tensor descriptors of both factors for the tiles, or two numbers where none are used."""
    if not shape.TMA:
        return 0, 0
    return (
        TensorDescriptor.from_tensor(_aligned(x_MH), [shape.BM, shape.BH]),
        TensorDescriptor.from_tensor(_aligned(w_VH), [shape.BN, shape.BH]),
    )


def _aligned(tensor: Tensor) -> Tensor:
    """A copy of one that begins in the middle of another's 16 bytes."""
    return tensor if tensor.data_ptr() % TMA_BYTES == 0 else tensor.clone()


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter (TRITON_INTERPRET=1 before the import)."""
    return knobs.runtime.interpret


def rounds(dtype: torch.dtype) -> bool:
    """Whether a kernel must help itself: the interpreter computes with the bits of bfloat16."""
    return interpreted() and dtype == torch.bfloat16


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Sums are in fp32, in fp64 for fp64 (gradcheck)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def arithmetic(dtype: torch.dtype) -> dict:
    """The compile-time arguments of every matrix kernel that go by its inputs' dtype."""
    exact = torch.get_float32_matmul_precision() == "highest" or dtype == torch.float64
    return {
        "UP": rounds(dtype),
        "ACC": accumulator(dtype),
        "PRECISION": "ieee" if exact else "tf32",
    }


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

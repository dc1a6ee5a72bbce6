"""Which implementation an operation takes: one switch for all of them.

A call's `impl` decides; where that is "auto", the environment variable RAG2_KERNELS (auto, torch or
triton). Left at auto, tensors on a GPU go through a kernel where `measured.json` lists the
operation for that device: `make gpu-bench` has found it right there. With RAG2_KERNELS=triton all
tensors on a GPU do. Tensors on a CPU go through torch, unless a call asks for the interpreter.
"""

import json
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")
VARIABLE = "RAG2_KERNELS"
MISSING = "triton is not installed; impl='torch' runs anywhere"
MEASURED = Path(__file__).parent / "gpu" / "configs" / "measured.json"


def takes_kernel(operation: str, impl: str, tensor: Tensor) -> bool:
    """Whether its kernels are to run; raises ValueError, RuntimeError where they cannot."""
    _known(impl, "impl")
    if impl == "triton":
        _require(tensor)
        return True
    asked = check() if impl == "auto" else impl
    if asked == "torch" or not tensor.is_cuda or tensor.dtype == torch.float64:
        return False
    if asked == "triton":
        _require(tensor)
        return True
    listed = operation in measured().get(torch.cuda.get_device_name(tensor.device), ())
    return listed and find_spec("triton") is not None


def check() -> str:
    """What RAG2_KERNELS asks for; ValueError if that is unknown, RuntimeError if it is missing."""
    asked = _known(os.environ.get(VARIABLE) or "auto", VARIABLE)
    if asked == "triton" and find_spec("triton") is None:
        raise RuntimeError(f"{VARIABLE}=triton: {MISSING}")
    return asked


@cache
def measured() -> dict[str, list[str]]:
    """The operations that were measured on each device, by its name."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))


def _known(impl: str, where: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLEMENTATIONS)}, not {impl!r}")
    return impl


def _require(tensor: Tensor) -> None:
    if find_spec("triton") is None:
        raise RuntimeError(f"impl='triton': {MISSING}")
    from rag2_kernels.gpu.launch import interpreted

    if not (tensor.is_cuda or interpreted()):
        raise RuntimeError(
            f"impl='triton' needs tensors on a GPU, not on {tensor.device} (or TRITON_INTERPRET=1, "
            "set before triton is imported, to run its interpreter)"
        )

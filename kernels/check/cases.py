"""Every kernel in every shape that is launched on a GPU: what the compile-only check builds."""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from rag2_kernels.gpu import linear, marginal
from rag2_kernels.gpu.launch import Tiles, table

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BITS = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its arguments, its compile-time arguments and options."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    tensor_cores: bool = False


def all_cases() -> list[Case]:
    """Those of the marginal, and of each tuned shape of the matrix kernels."""
    return [*_marginal(), *_logits_gradient(), *_linear()]


def _marginal() -> list[Case]:
    found = []
    for kernel, outputs in (
        (marginal._forward, ("loss_ptr", "posterior_ptr")),
        (marginal._backward, ("posterior_ptr", "grad_ptr", "dscores_ptr", "dlogp_ptr")),
    ):
        for token in (False, True):
            types = {"K": "i32", "T": "i32", "scores_ptr": "*fp32", "logp_ptr": "*fp32"}
            types |= {"mask_ptr": "*i1", **dict.fromkeys(outputs, "*fp32")}
            constants = {"TILES": 2, "BK": 16, "BT": 64, "TOKEN": token, "ACC": tl.float32}
            name = f"marginal{kernel.fn.__name__}_{'token' if token else 'sequence'}"
            found.append(Case(name, kernel, types, constants))
    return found


def _logits_gradient() -> list[Case]:
    found = []
    for short in NAMES.values():
        types = {"logits_ptr": f"*{short}", "lse_ptr": "*fp32", "grad_ptr": "*fp32"}
        types["logp_ptr"] = "*fp32"
        constants = {"V": 131_072, "BV": 4096, "UP": False, "ACC": tl.float32}
        kernel = linear.logits_gradient
        found.append(
            Case(f"logits_gradient_{short}", kernel, {**types, "labels_ptr": "*i64"}, constants)
        )
    return found


def _linear() -> list[Case]:
    """Each entry of linear_lse.json, with descriptors and without, storing logits and not."""
    found = []
    for entry in table("linear_lse", "any"):
        shapes = {Tiles(**entry["tiles"])}
        shapes.add(Tiles(**{**entry["tiles"], "TMA": False, **entry["pointer"]}))
        for shape in sorted(shapes, key=str):
            for dtype in BITS[entry["bits"]]:
                for store in (False, True):
                    found.append(_linear_case(entry["shape"][1:], shape, dtype, store))
    return found


def _linear_case(weight: list[int], shape: Tiles, dtype: torch.dtype, store: bool) -> Case:
    short = NAMES[dtype]
    descriptor = {
        name: f"tensordesc<{short}[{rows}, {shape.BH}]>" if shape.TMA else "i32"
        for name, rows in (("x_desc", shape.BM), ("w_desc", shape.BN))
    }
    types = {**descriptor, "x_ptr": f"*{short}", "w_ptr": f"*{short}", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("most_ptr", "total_ptr", "label_ptr"), "*fp32")
    types |= {"out_ptr": f"*{short}" if store else "*fp32", "M": "i32"}
    constants = linear.constants(shape, torch.empty(*weight, dtype=dtype, device="meta"), store)
    how = ("tma" if shape.TMA else "pointer") + ("_store" if store else "")
    name = f"linear_lse_{short}_{shape.BM}x{shape.BN}x{shape.BH}_{weight[1]}_{how}"
    # Exact products of fp32 are not the tensor cores'.
    cores = dtype != torch.float32
    return Case(
        name, linear.linear_lse, types, constants, shape.warps, shape.stages, tensor_cores=cores
    )

"""Every kernel in every shape that is launched on a GPU: what the compile-only check builds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton.language as tl

from rag2_kernels.gpu import contrast, groupmax, linear, marginal, pool
from rag2_kernels.gpu.launch import Tiles, accumulator, table
from rag2_kernels.reference import promoted

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.float32: "fp32", torch.float64: "fp64"}
BITS = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,), 64: (torch.float64,)}


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
    """Those without tuned shapes, and each tuned shape of the matrix kernels."""
    return [*_marginal(), *_pool(), *_logits_gradient(), *_linear(), *_group_maxima(), *_contrast()]


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


def _pool() -> list[Case]:
    """The widths of a small and a large encoder, the smaller one normalised."""
    found = []
    for dtype, short in NAMES.items():
        states = {"hidden_ptr": f"*{short}", "mask_ptr": "*i1", "L": "i32"}
        sums = dict.fromkeys(("out_ptr", "norm_ptr", "grad_ptr"), _sum(dtype))
        types = {**states, **sums, "dhidden_ptr": f"*{short}"}
        for width, normalize in ((384, True), (1024, False)):
            constants = pool.constants(width, normalize, promoted(torch.empty(0, dtype=dtype)))
            for kernel, tiles in (
                (pool._forward, {"TILES": 512 // constants["BL"]}),
                (pool._backward, {}),
            ):
                name = f"pool{kernel.fn.__name__}_{short}_{width}"
                found.append(Case(name, kernel, types, {**constants, **tiles}))
    return found


def _logits_gradient() -> list[Case]:
    found = []
    for dtype, short in NAMES.items():
        types = {"logits_ptr": f"*{short}", "grad_ptr": _sum(dtype)}
        types["logp_ptr"] = _sum(dtype)
        constants = {
            "V": 131_072,
            "BV": linear.columns(131_072, promoted(torch.empty(0, dtype=dtype))),
            "UP": False,
            "ACC": accumulator(dtype),
        }
        kernel = linear.logits_gradient
        found.append(
            Case(f"logits_gradient_{short}", kernel, {**types, "labels_ptr": "*i64"}, constants)
        )
    return found


def _linear() -> list[Case]:
    """Each shape of linear_lse, storing logits and not."""
    found = []
    for weight, shape, dtype in _tuned("linear_lse"):
        for store in (False, True):
            types = dict.fromkeys(("most_ptr", "total_ptr", "label_ptr"), _sum(dtype))
            types |= {"out_ptr": f"*{NAMES[dtype]}" if store else _sum(dtype)}
            types |= {"labels_ptr": "*i64", "M": "i32"}
            constants = linear.constants(shape, weight, store)
            case = _matrix(linear.linear_lse, "xw", weight, shape, types, constants)
            found.append(replace(case, name=case.name + "_store") if store else case)
    return found


def _group_maxima() -> list[Case]:
    found = []
    for corpus, shape, dtype in _tuned("group_maxima"):
        types = {"out_ptr": _sum(dtype), "B": "i32", "N": "i32"}
        constants = groupmax.constants(shape, corpus)
        found.append(_matrix(groupmax.group_maxima, "qc", corpus, shape, types, constants))
    return found


def _contrast() -> list[Case]:
    """Both kernels, in one direction and in two, with groups and without."""
    found = []
    for chunks, shape, dtype in _tuned("contrast"):
        ids = dict.fromkeys(("positive_ptr", "question_ptr", "chunk_ptr"), "*i64")
        sums = dict.fromkeys(("scale_ptr", "own_ptr", "row_ptr", "column_ptr"), _sum(dtype))
        pulls = dict.fromkeys(("pull_ptr", "spread_ptr"), _sum(dtype))
        types = {**ids, **sums, **pulls, "out_ptr": f"*{NAMES[dtype]}", "B": "i32", "N": "i32"}
        for groups, symmetric in product((0, 1), (False, True)):
            constants = contrast.constants(shape, chunks, groups, symmetric)
            suffix = ("_groups" if groups else "") + ("_symmetric" if symmetric else "")
            for kernel in (contrast.contrast_sums, contrast.contrast_gradient):
                case = _matrix(kernel, "qc", chunks, shape, types, constants)
                found.append(replace(case, name=case.name + suffix))
    return found


def _tuned(kernel: str) -> Iterator[tuple[torch.Tensor, Tiles, torch.dtype]]:
    """Second factor (without data), tiles and dtype of each entry, with descriptors and without."""
    for entry in table(kernel, "any"):
        shapes = {Tiles(**entry["tiles"])}
        shapes.add(Tiles(**{**entry["tiles"], "TMA": False, **entry["pointer"]}))
        for shape in sorted(shapes, key=str):
            for dtype in BITS[entry["bits"]]:
                yield torch.empty(*entry["shape"][1:], dtype=dtype, device="meta"), shape, dtype


def _matrix(
    kernel: Any,
    factors: str,
    second: torch.Tensor,
    shape: Tiles,
    types: dict[str, str],
    constants: dict[str, Any],
) -> Case:
    """A kernel of the product of two factors, whose arguments begin with these letters."""
    short = NAMES[second.dtype]
    for factor, rows in zip(factors, (shape.BM, shape.BN), strict=True):
        descriptor = f"tensordesc<{short}[{rows}, {shape.BH}]>"
        types |= {
            f"{factor}_desc": descriptor if shape.TMA else "i32",
            f"{factor}_ptr": f"*{short}",
        }
    tile = f"{shape.BM}x{shape.BN}x{shape.BH}_{second.shape[1]}"
    name = f"{kernel.fn.__name__}_{short}_{tile}_{'tma' if shape.TMA else 'pointer'}"
    # Exact products of fp32 and fp64 are not those of wgmma.
    cores = second.dtype.itemsize == 2
    return Case(name, kernel, types, constants, shape.warps, shape.stages, tensor_cores=cores)


def _sum(dtype: torch.dtype) -> str:
    """A pointer to what sums of this dtype are in."""
    return f"*{NAMES[promoted(torch.empty(0, dtype=dtype))]}"

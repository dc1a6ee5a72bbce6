"""The generator in pieces over all processes (FSDP2), and whole tensors of it for the disk."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rag2.training import distributed


def shard(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Leave each process its piece of every weight, on `device`; layers are whole while in use.

    Of several processes, which all call it before there is an optimizer. Where `dtype` is half
    precision, adapters compute in it too, while trained weights, sums of gradients over processes
    and the optimizer's state are float32.
    """
    half = dtype if dtype.itemsize < 4 else None
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (distributed.world(),)),
        "mp_policy": MixedPrecisionPolicy(half, torch.float32 if half else None),
        # The outermost weights too: left whole after a pass without gradients, the output head
        # would be taken for an ordinary matrix, and be read outside of the model's forward.
        "reshard_after_forward": True,
    }
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in layers]:
        fully_shard(module, **settings)
    fully_shard(model, **settings)


def is_sharded(model: nn.Module) -> bool:
    """Whether a pass through it needs all processes, so that each must make as many."""
    return isinstance(model, FSDPModule)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without gradient, those in pieces gathered on the CPU; all processes call it.

    The first process gets them, the others nothing. What is tied comes back tied.
    """
    first = distributed.rank() == 0
    gathered: dict[int, Tensor | None] = {}
    for tensor in tensors.values():
        if id(tensor) not in gathered:
            full = tensor.detach()
            full = full.full_tensor().cpu() if isinstance(full, DTensor) else full
            gathered[id(tensor)] = full.contiguous() if first else None
    rows = {name: gathered[id(tensor)] for name, tensor in tensors.items()}
    return {name: full for name, full in rows.items() if full is not None}


def cut(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's piece of a whole tensor, cut as `model` is."""
    if not isinstance(model, DTensor):
        return tensor
    # Every process has read the file: nobody needs to be sent anything.
    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_ by the norm of all gradients, of which some may be in pieces."""
    pieces = [p for p in parameters if isinstance(p, DTensor)]
    if not pieces:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    groups = [pieces, [p for p in parameters if not isinstance(p, DTensor)]]
    norms = [nn.utils.get_total_norm([p.grad for p in g if p.grad is not None]) for g in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.stack([norm.to(norms[0]) for norm in norms]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total

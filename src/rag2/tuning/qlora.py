"""Model -> model in 4 bits whose linear layers learn a low-rank update."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from rag2.registry import UserError
from rag2.tuning.low_rank import LowRank


class QLoRA(LowRank):
    """dequantised(W) + (alpha / rank) B A (Dettmers et al. 2023, eq. 5).

    W lies in 4-bit NormalFloat (nf4) with its scales quantised once more, in every linear layer but
    the output head; nothing else of the base changes. Trained weights: as LoRA's, the sum of
    rank x (in + out) over the layers. Needs bitsandbytes, the extra `qlora`.
    """

    name: Literal["qlora"] = "qlora"

    def merge(self, model: Any) -> nn.Module:
        """The plain model: the update is added to the dequantised weights, not to the 4 bits."""
        layers = dict(model.named_modules())
        for path, layer in layers.items():
            if hasattr(layer, "get_delta_weight"):
                plain = _dequantised(layer.base_layer)
                plain.weight.data += layer.get_delta_weight("default").to(plain.weight.dtype)
                _replace(model, path, plain)
        base = model.get_base_model()
        for path, layer in dict(base.named_modules()).items():
            if hasattr(getattr(layer, "weight", None), "quant_state"):
                _replace(base, path, _dequantised(layer))
        base.is_loaded_in_4bit = False
        return base

    def _around(self, model: PreTrainedModel) -> nn.Module:
        return super()._around(quantised(model))

    def _from(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        return super()._from(quantised(base), folder)


def quantised(model: Any) -> PreTrainedModel:
    """`model` with every linear layer but the output head in 4 bits, in place.

    Raises UserError without bitsandbytes, for a model in float64, and for one without such layers.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise UserError("tuning=qlora needs bitsandbytes: pip install rag2[qlora]") from None
    bits: Any = bitsandbytes.nn
    if model.dtype == torch.float64:
        raise UserError("tuning=qlora: 4-bit weights compute in float32 or less, not dtype=float64")
    head = model.get_output_embeddings()
    plain = {p: m for p, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not plain:
        raise UserError(
            f"tuning=qlora: a {model.config.model_type} has no nn.Linear layers to quantise; "
            "use tuning=lora"
        )
    for path, linear in plain.items():
        layer = bits.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bits.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", module=layer
        )
        layer.bias = linear.bias
        # Left on, the first pass in evaluation mode packs the weights for inference on CPUs with
        # AVX512-BF16; passes in training mode then go through a product without a gradient.
        layer.support_avx512bf16_for_cpu = False
        _replace(model, path, layer.to(linear.weight.device))  # which quantises
    model.is_loaded_in_4bit = True  # by which PEFT knows
    return model


def _dequantised(layer: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).contiguous()
    shape = (layer.in_features, layer.out_features)
    plain = nn.Linear(*shape, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    plain.bias = layer.bias
    return plain


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

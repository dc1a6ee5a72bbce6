"""Model -> model whose keys, values and MLP activations are scaled by learned vectors."""

from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from rag2.registry import UserError
from rag2.tuning.adapter import PeftAdapter, check_targets, has_conv1d, linear_layers, task

# Where families have keys and values (fused with the queries: those are scaled too), and the layer
# that leads out of the MLP, whose input is scaled.
KNOWN = (
    (["k_proj", "v_proj"], ["down_proj"]),
    (["qkv_proj"], ["down_proj"]),
    (["c_attn"], ["mlp.c_proj"]),
    (["query_key_value"], ["dense_4h_to_h"]),
    (["key", "value"], ["intermediate.dense"]),
)
Names = Annotated[list[str], Field(min_length=1)]


class IA3(PeftAdapter):
    """l_k * K, l_v * V in attention, l_ff * MLP activations (Liu et al. 2022, section 3.3).

    The vectors start as ones. Trained weights: out of each key and value layer, and in of the layer
    that leads out of the MLP, summed over the layers.
    """

    name: Literal["ia3"] = "ia3"
    target_modules: Names | None = None
    """layers whose output is scaled; null: keys and values, where the family is known"""
    feedforward_modules: Names | None = None
    """layers whose input is scaled; null: those out of the MLP"""

    def _config(self, model: PreTrainedModel) -> Any:
        from peft import IA3Config

        outputs, inputs = self._names(model)
        check_targets(model, outputs, "tuning.target_modules")
        check_targets(model, inputs, "tuning.feedforward_modules")
        return IA3Config(
            task_type=task(model),
            target_modules=[*outputs, *inputs],
            feedforward_modules=inputs,
            fan_in_fan_out=has_conv1d(model),
        )

    def _names(self, model: PreTrainedModel) -> tuple[list[str], list[str]]:
        if self.target_modules and self.feedforward_modules:
            return self.target_modules, self.feedforward_modules
        paths = [f".{path}" for path in linear_layers(model)]
        for outputs, inputs in KNOWN:
            if all(any(p.endswith(f".{n}") for p in paths) for n in (*outputs, *inputs)):
                return self.target_modules or outputs, self.feedforward_modules or inputs
        raise UserError(
            f"tuning=ia3 does not know the layers of a {model.config.model_type}: "
            "set tuning.target_modules and tuning.feedforward_modules"
        )

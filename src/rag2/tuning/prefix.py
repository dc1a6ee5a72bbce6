"""Model -> model whose attention sees learned keys and values before every text."""

from typing import Any, Literal

from pydantic import Field, StrictInt
from torch import nn
from transformers import PreTrainedModel

from rag2.registry import UserError
from rag2.tuning.virtual import Virtual


class Prefix(Virtual):
    """Prefix tuning: learned keys and values before those of the text, in every layer.

    Li and Liang 2021, eq. 3. With d = key-value heads x head size, trained weights: tokens x 2 x
    layers x d; where a projection of width w makes them: tokens x d + (d w + w) + (2 layers d) x
    (w + 1).
    """

    name: Literal["prefix"] = "prefix"
    projection: StrictInt | None = Field(default=None, ge=1)
    """width of a two-layer MLP that makes keys and values while training; null: they are weights"""

    def _config(self, model: PreTrainedModel) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tokens,
            prefix_projection=self.projection is not None,
            encoder_hidden_size=self.projection or 0,
        )

    def _around(self, model: PreTrainedModel) -> nn.Module:
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise UserError(
                "tuning=prefix does not work with gradient checkpointing, which drops the cache "
                "that the prefix lies in: set gradient_checkpointing=false, or use tuning=prompt"
            )
        return super()._around(model)

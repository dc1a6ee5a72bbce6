"""Model -> model whose linear layers learn a low-rank update: what the kinds of it share."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt
from transformers import PreTrainedModel

from rag2.tuning.adapter import PeftAdapter, check_targets, has_conv1d, task


class LowRank(PeftAdapter):
    """B A beside a weight W [out, in]: A [rank, in] is random, B [out, rank] zero at the start.

    So the adapted model starts equal to the base; only the adapters train.
    """

    kind: ClassVar[dict[str, Any]] = {}
    """what PEFT is told of the kind of update"""

    rank: StrictInt = Field(default=16, ge=1)
    alpha: StrictInt = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """names of the layers, as in [q_proj, v_proj]; all-linear: every one but the output head"""

    def _config(self, model: PreTrainedModel) -> Any:
        from peft import LoraConfig

        if isinstance(self.target_modules, list):
            check_targets(model, self.target_modules, "tuning.target_modules")
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            fan_in_fan_out=has_conv1d(model),
            task_type=task(model),
            **self.kind,
        )

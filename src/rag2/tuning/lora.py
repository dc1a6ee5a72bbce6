"""Model -> model whose linear layers learn a low-rank update."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, StrictInt
from torch import nn
from transformers import PreTrainedModel

from rag2.config import Config
from rag2.registry import UserError

if TYPE_CHECKING:
    from peft import PeftModel


class LoRA(Config):
    """W + (alpha / rank) B A in every linear layer but the output head (Hu et al. 2021, eq. 3).

    A is random and B zero, so that the adapted model starts equal to the base; only A and B train.
    """

    name: Literal["lora"] = "lora"
    rank: StrictInt = Field(default=16, ge=1)
    alpha: StrictInt = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def apply(self, model: PreTrainedModel) -> nn.Module:
        """The PEFT model around `model`, the adapters its only trainable weights.

        Raises UserError for a model that is an adapter on a base already: the second adapter would
        be saved as one on that base, and the first be lost.
        """
        from peft import LoraConfig, TaskType, get_peft_model

        if hasattr(model, "peft_config"):
            raise UserError("tuning=lora: the generator is an adapter already; use tuning=full")
        task = TaskType.CAUSAL_LM if model.can_generate() else TaskType.FEATURE_EXTRACTION
        lora = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="all-linear",
            task_type=task,
        )
        return get_peft_model(model, lora)

    def merge(self, model: "PeftModel") -> nn.Module:
        """The plain model with W + (alpha / rank) B A written into its weights."""
        return model.merge_and_unload()

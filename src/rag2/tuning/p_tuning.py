"""Model -> model that reads embeddings before every text that a small network makes."""

from typing import Any, Literal

from pydantic import Field, StrictInt
from transformers import PreTrainedModel

from rag2.tuning.virtual import Virtual


class PTuning(Virtual):
    """P-tuning: [MLP(E); embeddings of the text], E and the MLP learned (Liu et al. 2021, eq. 4).

    The MLP has three layers with ReLU between them, in the place of the paper's LSTM. Trained
    weights, with h hidden and w wide: tokens x h + (h w + w) + (w w + w) + (w h + h).
    """

    name: Literal["p_tuning"] = "p_tuning"
    width: StrictInt = Field(default=128, ge=1)
    """of the MLP's hidden layers"""

    def _config(self, model: PreTrainedModel) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tokens,
            encoder_hidden_size=self.width,
        )

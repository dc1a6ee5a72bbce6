"""Model -> model that reads learned embeddings before every text."""

from typing import Any, Literal

from transformers import PreTrainedModel

from rag2.tuning.virtual import Virtual


class Prompt(Virtual):
    """Prompt tuning: [P; embeddings of the text], P learned (Lester et al. 2021, section 2).

    P starts as the embeddings of random tokens of the vocabulary. Trained weights: tokens x hidden.
    """

    name: Literal["prompt"] = "prompt"

    def _config(self, model: PreTrainedModel) -> Any:
        from peft import PromptTuningConfig

        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="SAMPLE_VOCAB",
        )

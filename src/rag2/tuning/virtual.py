"""Model -> model that reads virtual tokens before every text: what the kinds of it share."""

from typing import Any

from pydantic import Field, StrictInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from rag2.registry import UserError
from rag2.tuning.adapter import PeftAdapter


class Virtual(PeftAdapter):
    """`tokens` learned vectors stand before every sequence and take positions; the base is frozen.

    What is saved are the vectors, not the network that may have made them: a run goes on from its
    checkpoints, which hold all trained weights, and not from a saved adapter.
    """

    tokens: StrictInt = Field(default=16, ge=1)
    """virtual tokens; a text may be that much shorter than the model's positions"""

    def _around(self, model: PreTrainedModel) -> nn.Module:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.tokens >= limit:
            raise UserError(
                f"tuning.tokens={self.tokens} leaves no room: the generator has {limit} positions"
            )
        adapted: Any = super()._around(model)
        encoder = adapted.prompt_encoder["default"]
        encoder.register_forward_pre_hook(_first_row)
        encoder.register_forward_hook(_every_row)
        return adapted


# The rows of a batch have the same virtual tokens: computed once, they cost less, and are to the
# bit those that are saved.


def _first_row(encoder: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    encoder.rows = len(args[0])
    return (args[0][:1],)


def _every_row(encoder: Any, _: Any, vectors_1VD: Tensor) -> Tensor:
    return vectors_1VD.expand(encoder.rows, -1, -1)

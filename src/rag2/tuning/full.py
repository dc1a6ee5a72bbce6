"""Model -> model with every weight trainable."""

from typing import ClassVar, Literal

from torch import nn

from rag2.config import Config


class Full(Config):
    """Full fine-tuning: every weight is trained."""

    shards: ClassVar[bool] = True

    name: Literal["full"] = "full"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` itself, every parameter requiring a gradient; an adapter is merged before.

        Raises UserError for an adapter that cannot be merged.
        """
        adapter = getattr(model, "tuning", None)
        return (adapter.merge(model) if adapter else model).requires_grad_(True)

    def merge(self, model: nn.Module) -> nn.Module:
        """`model` itself: there is nothing to merge."""
        return model

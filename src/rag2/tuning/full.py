"""Model -> model with every weight trainable."""

from typing import Literal

from torch import nn

from rag2.config import Config


class Full(Config):
    """Full fine-tuning: every weight is trained."""

    name: Literal["full"] = "full"

    def apply(self, model: nn.Module) -> nn.Module:
        """`model` itself, every parameter requiring a gradient; an adapter is merged before."""
        merge = getattr(model, "merge_and_unload", None)
        return (merge() if merge else model).requires_grad_(True)

    def merge(self, model: nn.Module) -> nn.Module:
        """`model` itself: there is nothing to merge."""
        return model

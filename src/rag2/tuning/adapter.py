"""What all methods have in common that leave the base as it is and train weights beside it."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rag2.config import Config
from rag2.registry import UserError, nearest


class Adapter(Config, ABC):
    """A method whose trained weights are saved alone, beside the name of the base."""

    shards: ClassVar[bool] = False
    """whether it trains in pieces over processes (shard=true)"""

    @property
    def called(self) -> str:
        """The name in the registry."""
        return type(self).model_fields["name"].default

    def apply(self, model: PreTrainedModel) -> nn.Module:
        """`model` with the method's own weights, which alone are trainable, in float32 or wider.

        Raises UserError for a model that is an adapter on a base already: the second adapter would
        be saved as one on that base, and the first be lost.
        """
        if hasattr(model, "peft_config") or hasattr(model, "tuning"):
            raise UserError(
                f"tuning={self.called}: the generator is an adapter already; use tuning=full, "
                "which merges it, or start from its base"
            )
        adapted: Any = self._around(model)
        wide = torch.promote_types(model.dtype, torch.float32)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wide)
        adapted.tuning = self
        return adapted

    def load(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """`base` with the adapter that was saved in `folder`; nothing is trainable."""
        adapted: Any = self._from(base, folder)
        adapted.tuning = self
        return adapted.requires_grad_(False)

    def merge(self, model: Any) -> nn.Module:
        """The plain model that computes the same; UserError where there is none."""
        raise UserError(
            f"an adapter of tuning={self.called} cannot be merged into its base's weights: "
            "it is used with its base"
        )

    @abstractmethod
    def _around(self, model: PreTrainedModel) -> nn.Module:
        """`model` with weights of the method's own."""

    @abstractmethod
    def _from(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        """`base` with the weights that were saved in `folder`."""


class PeftAdapter(Adapter):
    """A method of the PEFT library, saved in its format."""

    def merge(self, model: Any) -> nn.Module:
        """The plain model with the update written into its weights; UserError for a prompt."""
        if model.active_peft_config.is_prompt_learning:
            return super().merge(model)
        return model.merge_and_unload()

    @abstractmethod
    def _config(self, model: PreTrainedModel) -> Any:
        """The PeftConfig for `model`."""

    def _around(self, model: PreTrainedModel) -> nn.Module:
        from peft import get_peft_model

        return get_peft_model(model, self._config(model))

    def _from(self, base: PreTrainedModel, folder: Path) -> nn.Module:
        from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
        from peft import set_peft_model_state_dict as restore

        before = set(base.parameters())
        with warnings.catch_warnings():  # of missing tensors, which are an error below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(base, str(folder))
        # Some methods make their weights in the base's half precision, or in float32 on a base in
        # float64: once more, into weights that are wide enough for what was saved.
        wide = torch.promote_types(base.dtype, torch.float32)
        for parameter in set(adapted.parameters()) - before:
            parameter.data = parameter.data.to(wide)
        saved = load_peft_weights(str(folder), device="cpu")
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if missing := sorted(own.keys() - saved.keys()):
            raise UserError(f"adapter {folder}: tensor {missing[0]!r} of its method is missing")
        restore(adapted, saved)
        return adapted


def task(model: PreTrainedModel) -> str:
    """What PEFT calls the task of a generator, or of an encoder."""
    return "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"


def has_conv1d(model: PreTrainedModel) -> bool:
    """Whether its linear layers are those of GPT-2, whose weights lie the other way round."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The paths of all linear layers but the output head."""
    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def check_targets(model: PreTrainedModel, names: Sequence[str], key: str) -> None:
    """Raise UserError for a name that is not the end of the path of a linear layer."""
    paths = linear_layers(model)
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            there = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            raise UserError(
                f"{key}: no linear layer of the model is called {name!r}; "
                f"there are: {', '.join(there)}.{nearest(name, [*there, *paths])}"
            )

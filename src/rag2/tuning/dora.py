"""Model -> model whose weights learn their direction by a low-rank update, and their lengths."""

import logging
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import PreTrainedModel

from rag2.registry import UserError
from rag2.tuning.adapter import linear_layers
from rag2.tuning.low_rank import LowRank

logger = logging.getLogger(__name__)


class DoRA(LowRank):
    """m (W + s B A) / |W + s B A|, s = alpha / rank, |.| by output (Liu et al. 2024, eq. 5).

    The lengths m [out] start as those of W. A layer with an output whose weights are all zero, and
    so have no direction, is left as it is. Trained weights: the sum of rank x (in + out) + out over
    the other layers.
    """

    kind: ClassVar[dict[str, Any]] = {"use_dora": True}

    name: Literal["dora"] = "dora"

    def _config(self, model: PreTrainedModel) -> Any:
        config = super()._config(model)
        head = model.get_output_embeddings()
        flat = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head and _has_no_direction(module)
        ]
        if flat:
            logger.warning("tuning=dora leaves layers with zero rows as they are: %s", flat)
            config.exclude_modules = flat
            if isinstance(self.target_modules, list) and not any(
                f".{path}".endswith(f".{name}")
                for path in set(linear_layers(model)) - set(flat)
                for name in self.target_modules
            ):
                raise UserError(
                    f"tuning.target_modules={self.target_modules}: tuning=dora can adapt none of "
                    "these, which have zero rows; use tuning=lora"
                )
        return config


def _has_no_direction(layer: nn.Linear) -> bool:
    return bool((layer.weight.detach().norm(dim=1) == 0).any())

"""Model -> model whose linear layers learn a low-rank update."""

from typing import ClassVar, Literal

from rag2.tuning.low_rank import LowRank


class LoRA(LowRank):
    """W + (alpha / rank) B A in every linear layer but the output head (Hu et al. 2021, eq. 3).

    Trained weights: the sum of rank x (in + out) over the layers.
    """

    shards: ClassVar[bool] = True

    name: Literal["lora"] = "lora"

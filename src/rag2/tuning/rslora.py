"""Model -> model with low-rank updates whose size does not depend on the rank."""

from typing import Any, ClassVar, Literal

from rag2.tuning.low_rank import LowRank


class RsLoRA(LowRank):
    """W + (alpha / sqrt(rank)) B A (Kalajdzievski 2023, eq. 4: rank-stabilised LoRA).

    Trained weights: as LoRA's, the sum of rank x (in + out) over the layers.
    """

    kind: ClassVar[dict[str, Any]] = {"use_rslora": True}
    shards: ClassVar[bool] = True

    name: Literal["rslora"] = "rslora"

"""Model -> model whose weights learn their direction by a low-rank update, and their lengths."""

from typing import Any, ClassVar, Literal

from rag2.tuning.low_rank import LowRank


class DoRA(LowRank):
    """m (W + s B A) / |W + s B A|, s = alpha / rank, |.| by output (Liu et al. 2024, eq. 5).

    The lengths m [out] start as those of W. Trained weights: the sum of rank x (in + out) + out
    over the layers.
    """

    kind: ClassVar[dict[str, Any]] = {"use_dora": True}

    name: Literal["dora"] = "dora"

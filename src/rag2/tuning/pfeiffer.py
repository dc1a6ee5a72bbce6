"""Model -> model with a bottleneck behind the MLP of every block."""

from typing import ClassVar, Literal

from rag2.tuning.bottleneck import Bottlenecks


class Pfeiffer(Bottlenecks):
    """y + U relu(D y + d) + u behind the MLP alone (Pfeiffer et al. 2021, section 3.2.1).

    Trained weights, with h hidden and m wide: layers x (2 h m + h + m).
    """

    behind: ClassVar[tuple[int, ...]] = (1,)

    name: Literal["pfeiffer"] = "pfeiffer"

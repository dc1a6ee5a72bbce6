"""Model -> model with a bottleneck behind attention and behind the MLP of every block."""

from typing import ClassVar, Literal

from rag2.tuning.bottleneck import Bottlenecks


class Houlsby(Bottlenecks):
    """y + U relu(D y + d) + u behind both sub-layers (Houlsby et al. 2019, section 2.1).

    The paper trains the layer norms too; here they stay. Trained weights, with h hidden and m wide:
    layers x 2 x (2 h m + h + m).
    """

    behind: ClassVar[tuple[int, ...]] = (0, 1)

    name: Literal["houlsby"] = "houlsby"

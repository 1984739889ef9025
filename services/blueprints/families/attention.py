"""``attention``: every position looks at every other one, added to the span it bridges.

Normalization, queries, keys and values of ``size`` features in all, scaled dot products over the positions, back to the
span's channels: Vaswani et al. 2017 (arXiv:1706.03762), before the sum as Xiong et al. 2020 (arXiv:2002.04745).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import BranchFamily, Options, Whole, is_map, mixing, normalizing
from services.blueprints.spec import Interface, Scalar, channels_of, positions_of
from services.blueprints.vocabulary import LayerSpec, Operation

MAX_POSITIONS: Final = 256
"""Most positions of a span: the scores of one sample grow with their square, times heads, times the batch."""


class Attention(BranchFamily):
    """See the module. Parameters: ``heads``, ``reduction`` (default size = C / reduction).

    The largest number of heads up to ``heads`` that divides the size is taken.
    """

    name = "attention"
    description = "Self-attention over the positions of maps or tokens, added to the span it bridges."
    options: ClassVar[Options] = {"heads": Whole(2, 1, 64), "reduction": Whole(2, 1, 256)}

    def refusal(self, interface: Interface) -> str | None:
        """It needs several positions, and few enough for a score between any two."""
        positions = positions_of(interface.output_shape)
        if positions == 1:
            return "attention looks from one position at the others; here is only one"
        if positions > MAX_POSITIONS:
            return f"{positions} positions are more than {MAX_POSITIONS}: their scores would need too much memory"
        return None

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``normalize``, ``project`` (queries, keys, values), ``attend``, ``leave``."""
        channels, operation = channels_of(interface.output_shape), mixing(interface)
        attend = Operation.ATTENTION2D if is_map(interface) else Operation.ATTENTION1D
        heads = next(count for count in range(min(int(parameters["heads"]), size), 0, -1) if size % count == 0)
        return (
            LayerSpec("normalize", normalizing(interface), channels, channels),
            LayerSpec("project", operation, channels, 3 * size),
            LayerSpec("attend", attend, 3 * size, size, heads=heads),
            LayerSpec("leave", operation, size, channels),
        )


FAMILY: Final = Attention()

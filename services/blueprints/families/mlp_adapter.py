"""``mlp_adapter``: a perceptron on each position by itself, added to the span it bridges.

After Houlsby et al. 2019 (arXiv:1902.00751): down to ``size`` features, an activation, up again, over normalized input
as the perceptrons of transformers. It mixes channels, never positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import (
    ACTIVATION,
    BranchFamily,
    Options,
    Whole,
    activation,
    mixing,
    normalizing,
)
from services.blueprints.spec import Interface, Scalar, channels_of
from services.blueprints.vocabulary import LayerSpec


class MlpAdapter(BranchFamily):
    """See the module. Parameters: ``reduction`` (default size = C / reduction), ``activation``."""

    name = "mlp_adapter"
    description = "A normalized perceptron on the channels of each position, added to the span it bridges."
    options: ClassVar[Options] = {"reduction": Whole(1, 1, 256), "activation": ACTIVATION}

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``normalize``, ``enter``, ``activation``, ``leave``."""
        channels, operation = channels_of(interface.output_shape), mixing(interface)
        return (
            LayerSpec("normalize", normalizing(interface), channels, channels),
            LayerSpec("enter", operation, channels, size),
            activation(parameters, size),
            LayerSpec("leave", operation, size, channels),
        )


FAMILY: Final = MlpAdapter()

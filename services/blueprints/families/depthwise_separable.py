"""``depthwise_separable``: a spatial branch at the price of pointwise ones, added to the span it bridges.

A pointwise convolution to ``size`` channels, a spatial convolution of each channel by itself, an activation, a
pointwise convolution back: the block of Sandler et al. 2018 (arXiv:1801.04381), which separates space from channels as
Howard et al. 2017 (arXiv:1704.04861) do. With ``size`` above the span's channels it is their inverted bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import (
    ACTIVATION,
    KERNEL_SIZE,
    BranchFamily,
    Options,
    Whole,
    activation,
    is_map,
)
from services.blueprints.spec import Interface, Scalar, channels_of
from services.blueprints.vocabulary import LayerSpec, Operation


class DepthwiseSeparable(BranchFamily):
    """See the module. Parameters: ``reduction`` (default size = C / reduction), ``kernel_size``, ``activation``."""

    name = "depthwise_separable"
    description = "A spatial branch that filters each channel by itself, added to the maps it bridges."
    options: ClassVar[Options] = {
        "reduction": Whole(1, 1, 256),
        "kernel_size": KERNEL_SIZE,
        "activation": ACTIVATION,
    }

    def refusal(self, interface: Interface) -> str | None:
        """It needs space to filter."""
        return None if is_map(interface) else "depthwise_separable filters over [C, H, W]; features have no positions"

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``enter``, ``filter``, ``activation``, ``leave``."""
        channels = channels_of(interface.output_shape)
        side = int(parameters["kernel_size"])
        return (
            LayerSpec("enter", Operation.CONV2D, channels, size),
            LayerSpec("filter", Operation.DEPTHWISE_CONV2D, size, size, kernel_size=side),
            activation(parameters, size),
            LayerSpec("leave", Operation.CONV2D, size, channels),
        )


FAMILY: Final = DepthwiseSeparable()

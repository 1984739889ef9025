"""``residual_bottleneck``: a branch that bridges a span and is added to it: C to a few and back to C.

After He et al. 2016 (arXiv:1512.03385): a spatial convolution into the narrow middle, an activation, a pointwise
convolution back; two linear layers where the span carries features. While isolated it learns by an auxiliary loss of
its own on a detached input: a zero read-out would starve it, a straight-through trick diverges.
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
    mixing,
    side_of,
)
from services.blueprints.spec import Interface, Scalar, channels_of
from services.blueprints.vocabulary import LayerSpec


class ResidualBottleneck(BranchFamily):
    """See the module. Parameters: ``reduction`` (default size = C / reduction), ``kernel_size``, ``activation``."""

    name = "residual_bottleneck"
    description = "A residual branch through a narrow middle, added to the span it bridges."
    options: ClassVar[Options] = {"reduction": Whole(4, 1, 256), "kernel_size": KERNEL_SIZE, "activation": ACTIVATION}

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``reduce``, ``activation``, ``expand``: convolutions over [C, H, W], linear layers over features."""
        channels, operation = channels_of(interface.output_shape), mixing(interface)
        return (
            LayerSpec("reduce", operation, channels, size, kernel_size=side_of(parameters, interface)),
            activation(parameters, size),
            LayerSpec("expand", operation, size, channels),
        )


FAMILY: Final = ResidualBottleneck()

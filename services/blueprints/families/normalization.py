"""``normalization``: what the span puts out, normalized; alpha goes from the values themselves to normalized ones.

Over maps and vectors the statistics are those of the batch (Ioffe and Szegedy 2015, arXiv:1502.03167), over tokens
those of each token (Ba et al. 2016, arXiv:1607.06450): what is usual in networks of each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import BranchFamily
from services.blueprints.families.family import BranchSource
from services.blueprints.spec import Interface, Scalar, channels_of
from services.blueprints.vocabulary import InitRule, LayerSpec, Operation

_BY_DIMENSIONS: Final = {3: Operation.BATCH_NORM2D, 2: Operation.LAYER_NORM, 1: Operation.BATCH_NORM1D}


class Normalization(BranchFamily):
    """See the module. It takes no parameters, and has one size: every size makes the same."""

    name = "normalization"
    description = "Normalizes what the span puts out, blended from the values themselves to normalized ones."
    source: ClassVar[BranchSource] = "output"
    keeps_shape = False
    rules = frozenset({InitRule.KAIMING_NORMAL})

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """One: there is nothing to choose."""
        del parameters, interface
        return 1

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``normalize``, then ``difference``: added to the values, it leaves the normalized ones."""
        del parameters, size
        channels = channels_of(interface.output_shape)
        return (
            LayerSpec("normalize", _BY_DIMENSIONS[len(interface.output_shape)], channels, channels),
            LayerSpec("difference", Operation.DIFFERENCE, channels, channels),
        )


FAMILY: Final = Normalization()

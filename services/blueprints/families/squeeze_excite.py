"""``squeeze_excite``: one factor per channel and sample, computed from the whole sample, on what the span puts out.

After Hu et al. 2018 (arXiv:1709.01507): mean over positions, ``size`` features, back to one number z per channel. Here
the factor is 1 + alpha * tanh(z), within 0..2: it begins at exactly 1 (the last layer starts at zero, and alpha 0 is
exact), where the original's sigmoid(2 z) = (1 + tanh(z)) / 2 would begin by halving every channel. The factor 2 between
the two is absorbed by whatever reads the channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import ACTIVATION, BranchFamily, Options, Whole, activation, mixing
from services.blueprints.families.family import BranchSource
from services.blueprints.spec import InitRecipe, Interface, Scalar, channels_of
from services.blueprints.vocabulary import InitRule, LayerSpec, Operation


class SqueezeExcite(BranchFamily):
    """See the module. Parameters: ``reduction`` (default size = C / reduction), ``activation``."""

    name = "squeeze_excite"
    description = "A gate that scales each channel the span puts out by what the whole sample shows."
    options: ClassVar[Options] = {"reduction": Whole(4, 1, 256), "activation": ACTIVATION}
    source: ClassVar[BranchSource] = "output"
    keeps_shape = False
    initialization = InitRecipe(InitRule.ZERO_OUTPUT)

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``squeeze`` (not over vectors), ``reduce``, ``activation``, ``expand``, ``gate``."""
        channels, operation = channels_of(interface.output_shape), mixing(interface)
        pool = {3: Operation.MEAN_POOL2D, 2: Operation.MEAN_POOL1D}.get(len(interface.output_shape))
        squeeze = () if pool is None else (LayerSpec("squeeze", pool, channels, channels),)
        return (
            *squeeze,
            LayerSpec("reduce", operation, channels, size),
            activation(parameters, size),
            LayerSpec("expand", operation, size, channels),
            LayerSpec("gate", Operation.GATE, channels, channels),
        )


FAMILY: Final = SqueezeExcite()

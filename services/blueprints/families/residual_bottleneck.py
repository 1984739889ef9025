"""``residual_bottleneck``: a branch that bridges a span and is added to it: C to a few and back to C.

After He et al. 2016 (arXiv:1512.03385): a spatial convolution into the narrow middle, an activation, a pointwise
convolution back; two linear layers where the span carries features. While isolated it learns by an auxiliary loss of
its own on a detached input: a zero read-out would starve it, a straight-through trick diverges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.blueprints.families.family import LifecyclePath
from services.blueprints.spec import (
    InitRecipe,
    Interface,
    Scalar,
    SlotKind,
    SpecError,
    channels_of,
    integer,
    positions_of,
)
from services.blueprints.vocabulary import ACTIVATIONS, InitRule, LayerSpec, Operation


class ResidualBottleneck:
    """See the module. Parameters: ``reduction`` (default size = C / reduction), ``kernel_size``, ``activation``."""

    name: Final = "residual_bottleneck"
    description: Final = "A residual branch through a narrow middle, added to the span it bridges."
    slot_kind: Final = SlotKind.SPAN
    path: Final[LifecyclePath] = "branch"
    defaults: Final[Mapping[str, Scalar]] = {"reduction": 4, "kernel_size": 3, "activation": "gelu"}
    initialization: Final = InitRecipe(InitRule.KAIMING_NORMAL)
    rules: Final = frozenset({InitRule.KAIMING_NORMAL, InitRule.ZERO_OUTPUT})

    def validate(self, parameters: Mapping[str, Scalar]) -> None:
        """Return if all three parameters are there and in range; raises SpecError naming the field otherwise."""
        for name in {*self.defaults, *parameters}:
            where = f"blueprint.parameters.{name}"
            if name not in self.defaults:
                raise SpecError(where, f"is unknown; {self.name} takes {', '.join(sorted(self.defaults))}")
            if name not in parameters:
                raise SpecError(where, f"is missing; its default is {self.defaults[name]}")
        integer(parameters["reduction"], "blueprint.parameters.reduction", 1, 256)
        if integer(parameters["kernel_size"], "blueprint.parameters.kernel_size", 1, 7) % 2 == 0:
            raise SpecError("blueprint.parameters.kernel_size", "must be odd, so that the positions stay")
        if parameters["activation"] not in ACTIVATIONS:
            raise SpecError("blueprint.parameters.activation", f"must be one of {', '.join(sorted(ACTIVATIONS))}")

    def applies_to(self, interface: Interface) -> str | None:
        """Why a branch cannot bridge this span, in words; ``None`` if it can."""
        if interface.kind is not SlotKind.SPAN:
            return "residual_bottleneck goes into SPAN slots, this is a WIDTH"
        if interface.input_shape != interface.output_shape:
            return (
                f"the span turns {list(interface.input_shape)} into {list(interface.output_shape)}: "
                "a residual branch needs equal shapes"
            )
        if len(interface.output_shape) > 3:
            return f"a sample has {len(interface.output_shape)} dimensions, known are [C, H, W], [T, D] and [D]"
        return None

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """The span's channels divided by ``reduction``, at least one."""
        reduction = integer(parameters["reduction"], "blueprint.parameters.reduction", 1, 256)
        return max(1, channels_of(interface.output_shape) // reduction)

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``reduce``, ``activation``, ``expand``: convolutions over [C, H, W], linear layers over features."""
        channels = channels_of(interface.output_shape)
        spatial = len(interface.output_shape) == 3
        operation = Operation.CONV2D if spatial else Operation.LINEAR
        side = integer(parameters["kernel_size"], "blueprint.parameters.kernel_size", 1, 7) if spatial else 1
        return (
            LayerSpec("reduce", operation, channels, size, kernel_size=side),
            LayerSpec("activation", Operation(str(parameters["activation"])), size, size),
            LayerSpec("expand", operation, size, channels),
        )

    def parameters(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int:
        """Parameters it adds; the head of its auxiliary loss, which goes with the isolation, is not counted."""
        return sum(layer.parameters for layer in self.layers(parameters, interface, size))

    def flops(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int | None:
        """Forward FLOPs per sample it adds."""
        positions = positions_of(interface.output_shape)
        return sum(layer.flops(positions) for layer in self.layers(parameters, interface, size))


FAMILY: Final = ResidualBottleneck()

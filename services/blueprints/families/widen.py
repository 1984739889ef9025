"""``widen``: more channels for a set of layers, the network's output unchanged at birth.

New filters are born at the live layer's scale, everything that reads them starts at zero (function-preserving growth
as in Net2Net, Chen et al. 2016, arXiv:1511.05641, without its duplication, which costs accuracy). A kernel carries no
weights: Kasmina makes them from the live host by the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from services.blueprints.families.family import LifecyclePath
from services.blueprints.spec import InitRecipe, Interface, LayerInterface, Scalar, SlotKind, SpecError, positions_of
from services.blueprints.vocabulary import NORMALIZATIONS, InitRule, LayerSpec, Operation

_WRITES: Final = frozenset({Operation.CONV2D, Operation.LINEAR})
_FOLLOWS: Final = NORMALIZATIONS | {Operation.DEPTHWISE_CONV2D}


class Widen:
    """See the module."""

    name: Final = "widen"
    description: Final = "More channels for a set of layers that change together; the output is unchanged at birth."
    slot_kind: Final = SlotKind.WIDTH
    path: Final[LifecyclePath] = "widening"
    defaults: Final[Mapping[str, Scalar]] = {}
    initialization: Final = InitRecipe(InitRule.LIVE_RMS)
    rules: Final = frozenset({InitRule.LIVE_RMS})

    def validate(self, parameters: Mapping[str, Scalar]) -> None:
        """It takes no parameters; raises SpecError for any."""
        for name in parameters:
            raise SpecError(f"blueprint.parameters.{name}", "is unknown; widen takes no parameters")

    def applies_to(self, interface: Interface) -> str | None:
        """Why these layers cannot be widened together, in words; ``None`` if they can."""
        if interface.kind is not SlotKind.WIDTH:
            return "widen goes into WIDTH slots, this is a SPAN"
        if not interface.writers or not interface.readers:
            return "nothing writes the channels" if not interface.writers else "nothing reads the channels"
        width = interface.writers[0].weight_shape[0]
        for layer in interface.writers:
            if layer.operation not in _WRITES or layer.weight_shape[0] != width:
                return f"{layer.path} ({layer.operation}) does not write {width} channels"
        for layer in interface.readers:
            # A linear layer behind a flatten reads each channel at several positions.
            if layer.operation not in _WRITES or len(layer.weight_shape) < 2 or layer.weight_shape[1] % width:
                return f"{layer.path} ({layer.operation}) does not read {width} channels"
        for layer in interface.followers:
            if layer.operation not in _FOLLOWS or layer.weight_shape[0] != width:
                return f"{layer.path} ({layer.operation}) does not follow {width} channels one by one"
        return None

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """Half as many channels again, at least one."""
        del parameters
        return max(1, interface.writers[0].weight_shape[0] // 2)

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """None: it widens layers that are there."""
        del parameters, interface, size
        return ()

    def parameters(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int:
        """Parameters it adds: wider weights and, where there are, biases."""
        del parameters
        writers = {layer.path for layer in interface.writers}
        return sum(
            _added(layer, interface, size) + (size if _bias_grows(layer, writers) else 0)
            for layer in _touched(interface)
        )

    def flops(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int | None:
        """Forward FLOPs per sample it adds; ``None`` if a layer's output shape is not known."""
        del parameters
        layers = _touched(interface)
        if not all(layer.output_shape for layer in layers):
            return None
        return sum(2 * _added(layer, interface, size) * positions_of(layer.output_shape) for layer in layers)


def _touched(interface: Interface) -> tuple[LayerInterface, ...]:
    """Every layer at the slot, once."""
    layers = (*interface.writers, *interface.followers, *interface.readers)
    return tuple({layer.path: layer for layer in layers}.values())


def _added(layer: LayerInterface, interface: Interface, size: int) -> int:
    """Weights a layer gains; one that both writes and reads the channels grows in both directions."""
    width = interface.writers[0].weight_shape[0]
    ends = sum(
        any(other.path == layer.path for other in group)
        for group in (interface.writers, interface.followers, interface.readers)
    )
    weights = math.prod(layer.weight_shape)
    grown: int = weights * (width + size) ** ends // width**ends
    return grown - weights


def _bias_grows(layer: LayerInterface, writers: set[str]) -> bool:
    if layer.operation in NORMALIZATIONS:
        return True
    return layer.bias and (layer.path in writers or layer.operation is Operation.DEPTHWISE_CONV2D)


FAMILY: Final = Widen()

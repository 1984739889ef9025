"""``widen``: more channels for a set of layers, the network's output unchanged at birth.

New filters are born at the live layer's scale, everything that reads them starts at zero (function-preserving growth
as in Net2Net, Chen et al. 2016, arXiv:1511.05641, without its duplication, which costs accuracy). A kernel carries no
weights: Kasmina makes them from the live host by the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from services.blueprints.families.family import BranchSource, LifecyclePath
from services.blueprints.spec import InitRecipe, Interface, LayerInterface, Scalar, SlotKind, SpecError
from services.blueprints.vocabulary import CONVOLUTIONS, DEPTHWISE, NORMALIZATIONS, InitRule, LayerSpec, Operation

_READS: Final = CONVOLUTIONS | {Operation.LINEAR}
_WRITES: Final = _READS | {Operation.PARAMETER}
_FOLLOWS: Final = NORMALIZATIONS | DEPTHWISE | {Operation.RMS_NORM, Operation.PARAMETER}


class Widen:
    """See the module."""

    name: Final = "widen"
    description: Final = "More channels for a set of layers that change together; the output is unchanged at birth."
    slot_kind: Final = SlotKind.WIDTH
    path: Final[LifecyclePath] = "widening"
    source: Final[BranchSource] = "input"
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
        width = width_of(interface)
        for layer in interface.writers:
            if layer.operation not in _WRITES or layer.weight_shape[0] != width * (layer.unit or 1):
                return f"{layer.path} ({layer.operation}) does not write {width} channels"
        for layer in interface.readers:
            # A linear layer behind a flatten reads each channel at several positions, one behind a concatenation
            # other channels too.
            if layer.operation not in _READS or len(layer.weight_shape) < 2 or not _fits(layer, width):
                return f"{layer.path} ({layer.operation}) does not read {width} channels"
        for layer in interface.followers:
            # Behind a concatenation it follows other channels too.
            channels = layer.weight_shape[0]
            fits = channels >= width * layer.unit if layer.unit else channels == width
            if layer.operation not in _FOLLOWS or not fits:
                return f"{layer.path} ({layer.operation}) does not follow {width} channels one by one"
        return None

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """Half as many channels again, at least one."""
        del parameters
        return max(1, width_of(interface) // 2)

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """None: it widens layers that are there."""
        del parameters, interface, size
        return ()

    def parameters(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int:
        """Parameters it adds: wider weights and, where there are, biases."""
        del parameters
        return sum(
            _added(layer, growth, size) + (growth.outputs * size if _bias_grows(layer) else 0)
            for layer, growth in growths(interface)
        )

    def flops(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int | None:
        """Forward FLOPs per sample that its layers add; ``None`` if a layer's output shape is not known.

        Products of an attention between its layers are no layers: the network's cost terms have them.
        """
        del parameters
        total = 0
        for layer, growth in growths(interface):
            if layer.operation is Operation.PARAMETER:
                continue
            if not layer.output_shape:
                return None
            positions = math.prod(layer.output_shape) // layer.weight_shape[0]
            total += 2 * _added(layer, growth, size) * positions
        return total


@dataclass(frozen=True, slots=True)
class Growth:
    """Entries that one more channel adds to a layer's outputs and inputs."""

    outputs: int
    inputs: int


def width_of(interface: Interface) -> int:
    """Channels of a WIDTH slot: what its first writer writes, in its units."""
    writer = interface.writers[0]
    return writer.weight_shape[0] // (writer.unit or 1)


def growths(interface: Interface) -> tuple[tuple[LayerInterface, Growth], ...]:
    """Every layer at the slot, once, with what a channel adds to it."""
    width = width_of(interface)
    outputs = {layer.path: layer.unit or 1 for layer in (*interface.writers, *interface.followers)}
    inputs = {layer.path: layer.unit or layer.weight_shape[1] // width for layer in interface.readers}
    layers = {layer.path: layer for layer in (*interface.writers, *interface.followers, *interface.readers)}
    return tuple((layer, Growth(outputs.get(path, 0), inputs.get(path, 0))) for path, layer in layers.items())


def _fits(layer: LayerInterface, width: int) -> bool:
    inputs = layer.weight_shape[1]
    return width * layer.unit <= inputs if layer.unit else inputs % width == 0


def _added(layer: LayerInterface, growth: Growth, size: int) -> int:
    """Weights a layer gains; one that both writes and reads the channels grows in both directions."""
    rows = layer.weight_shape[0] + growth.outputs * size
    if not growth.inputs:
        return growth.outputs * size * math.prod(layer.weight_shape[1:])
    columns = layer.weight_shape[1] + growth.inputs * size
    return rows * columns * math.prod(layer.weight_shape[2:]) - math.prod(layer.weight_shape)


def _bias_grows(layer: LayerInterface) -> bool:
    return layer.operation in NORMALIZATIONS or layer.bias


FAMILY: Final = Widen()

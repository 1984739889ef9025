"""Reference widening of the layers at a slot, on stand-ins with random weights.

It says what Kasmina does with a live host, in its plainest form: new outputs for writers and followers, new inputs
that start at zero for readers. Tezzeret runs it to see that the recipe holds for an interface, and what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from services.blueprints.families.widen import growths
from services.blueprints.spec import Interface, LayerInterface, SpecError
from services.blueprints.vocabulary import CONVOLUTIONS, DEPTHWISE, NORMALIZATIONS, Operation

_CONVOLUTIONS: Final[Mapping[int, Callable[..., nn.Module]]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMALIZATIONS: Final[Mapping[Operation, Callable[[int], nn.Module]]] = {
    Operation.BATCH_NORM1D: nn.BatchNorm1d,
    Operation.BATCH_NORM2D: nn.BatchNorm2d,
    Operation.BATCH_NORM3D: nn.BatchNorm3d,
}
_OVER_CHANNELS: Final = frozenset({Operation.LAYER_NORM, Operation.RMS_NORM, Operation.GROUP_NORM})
_GAINS: Final = NORMALIZATIONS | {Operation.RMS_NORM}
_SPATIAL: Final[Mapping[Operation, tuple[int, ...]]] = {
    Operation.BATCH_NORM2D: (4, 4),
    Operation.BATCH_NORM3D: (4, 4, 4),
    Operation.GROUP_NORM: (4, 4),
}
"""Normalizations with positions, and those to take where the interface does not say."""


class NewbornNormalization(nn.Module):
    """A normalization over channels as it is at birth: statistics of the ``old`` first channels, gains for all.

    [N, C, ...] to the same shape; a GroupNorm of several groups is taken for one over all, whose statistics old
    channels share.
    """

    def __init__(self, operation: Operation, channels: int, old: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        if operation is not Operation.RMS_NORM:
            self.bias = nn.Parameter(torch.zeros(channels))
        self.operation = operation
        self.old = old

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape of the inputs."""
        values = inputs.transpose(1, -1)
        over = (1, 2, 3) if self.operation is Operation.GROUP_NORM else (-1,)
        own = values.narrow(-1, 0, self.old)
        if self.operation is Operation.RMS_NORM:
            scale = torch.rsqrt(own.square().mean(over, keepdim=True) + 1e-5)
            return (values * scale * self.weight).transpose(1, -1)
        mean = own.mean(over, keepdim=True)
        scale = torch.rsqrt((own - mean).square().mean(over, keepdim=True) + 1e-5)
        return ((values - mean) * scale * self.weight + self.bias).transpose(1, -1)


class AddedParameter(nn.Module):
    """A Parameter that is added to its input, [N, *shape] to the same shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape of the inputs."""
        return inputs + self.weight


@dataclass(frozen=True)
class Standin:
    """One layer at the slot before and after widening, and how many of its inputs and outputs are new."""

    interface: LayerInterface
    narrow: nn.Module
    wide: nn.Module
    input_shape: tuple[int, ...]
    new_inputs: int
    new_outputs: int

    def old_inputs(self, batch: Tensor) -> Tensor:
        """What the narrow layer gets of a batch for the wide one: new channels come last."""
        return batch[:, : batch.shape[1] - self.new_inputs]


def widened_standins(interface: Interface, size: int, scale: float, init_seed: int) -> tuple[Standin, ...]:
    """Stand-ins of all layers at a WIDTH slot, ``size`` channels wider; draws from a private generator only.

    Raises:
        SpecError: A layer has an operation that cannot be widened.
    """
    generator = torch.Generator().manual_seed(init_seed)
    followers = {layer.path for layer in interface.followers}
    found = []
    for layer, growth in growths(interface):
        outputs = size * growth.outputs
        follows = layer.path in followers or layer.operation is Operation.PARAMETER
        # A depthwise layer with several filters for a channel writes more channels than it reads.
        inputs = size * growth.inputs if not follows else outputs // _filters(layer)
        found.append(_standin(layer, new_outputs=outputs, new_inputs=inputs, scale=scale, generator=generator))
    return tuple(found)


def _filters(layer: LayerInterface) -> int:
    """Filters for each channel of a depthwise layer, where its unit says so; 1 for every other layer."""
    return max(1, layer.unit) if layer.operation in DEPTHWISE else 1


def _standin(
    layer: LayerInterface, *, new_outputs: int, new_inputs: int, scale: float, generator: torch.Generator
) -> Standin:
    narrow = _module(layer, 0, 0)
    wide = _module(layer, new_outputs, new_inputs)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(max(1, math.prod(layer.weight_shape[1:])))
    if layer.operation in _GAINS:
        weight = torch.ones(layer.weight_shape)
    grown = grown_weight(
        layer, weight, new_outputs=new_outputs, new_inputs=new_inputs, scale=scale, generator=generator
    )
    with torch.no_grad():
        for module in (narrow, wide):
            for parameter in module.parameters():
                parameter.zero_()
        _tensor(narrow).copy_(weight)
        _tensor(wide).copy_(grown)
    return Standin(layer, narrow, wide, _input_shape(layer, new_inputs), new_inputs, new_outputs)


def grown_weight(
    layer: LayerInterface,
    weight: Tensor,
    *,
    new_outputs: int,
    new_inputs: int,
    scale: float,
    generator: torch.Generator,
) -> Tensor:
    """``weight`` with new rows drawn at its live scale and, for its old rows, new columns of zero."""
    if layer.operation in _GAINS:
        return torch.cat([weight, torch.ones(new_outputs)])
    rms = weight.square().mean().sqrt()
    rows = torch.randn((new_outputs, *weight.shape[1:]), generator=generator) * rms * scale
    grown = torch.cat([weight, rows])
    if layer.operation in DEPTHWISE | {Operation.PARAMETER} or new_inputs == 0:
        return grown
    columns = torch.zeros((grown.shape[0], new_inputs, *weight.shape[2:]))
    return torch.cat([grown, columns], dim=1)


def _tensor(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def _module(layer: LayerInterface, new_outputs: int, new_inputs: int) -> nn.Module:
    shape = layer.weight_shape
    outputs = shape[0] + new_outputs
    if layer.operation in CONVOLUTIONS:
        sides = shape[2:]
        padding = tuple(side // 2 for side in sides)
        return _CONVOLUTIONS[len(sides)](shape[1] + new_inputs, outputs, sides, padding=padding, bias=layer.bias)
    if layer.operation in DEPTHWISE:
        sides, channels = shape[2:], outputs // _filters(layer)
        padding = tuple(side // 2 for side in sides)
        return _CONVOLUTIONS[len(sides)](channels, outputs, sides, padding=padding, groups=channels, bias=layer.bias)
    if layer.operation is Operation.LINEAR:
        return nn.Linear(shape[1] + new_inputs, outputs, bias=layer.bias)
    if layer.operation is Operation.PARAMETER:
        return AddedParameter((outputs, *shape[1:]))
    if layer.operation in _NORMALIZATIONS:
        return _NORMALIZATIONS[layer.operation](outputs)
    if layer.operation in _OVER_CHANNELS:
        return NewbornNormalization(layer.operation, outputs, outputs - new_outputs)
    raise SpecError("interface.followers", f"{layer.path}: {layer.operation} cannot be widened")


def _input_shape(layer: LayerInterface, new_inputs: int) -> tuple[int, ...]:
    """Shape of one sample of a wide layer's input, at the positions its output has."""
    shape, operation = layer.weight_shape, layer.operation
    if operation in CONVOLUTIONS | DEPTHWISE:
        dimensions = len(shape) - 2
        known = len(layer.output_shape) == dimensions + 1
        positions = layer.output_shape[1:] if known else (4,) * dimensions
        channels = shape[1] if operation in CONVOLUTIONS else shape[0] // _filters(layer)
        return (channels + new_inputs, *positions)
    if operation is Operation.LINEAR:
        return (shape[1] + new_inputs,)
    if operation is Operation.PARAMETER:
        return (shape[0] + new_inputs, *shape[1:])
    usual = _SPATIAL.get(operation, ())
    known = len(layer.output_shape) == len(usual) + 1
    return (shape[0] + new_inputs, *(layer.output_shape[1:] if known else usual))

"""Reference widening of the layers at a slot, on stand-ins with random weights.

It says what Kasmina does with a live host, in its plainest form: new outputs for writers and followers, new inputs
that start at zero for readers. Tezzeret runs it to see that the recipe holds for an interface, and what it costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.blueprints.spec import Interface, LayerInterface, SpecError
from services.blueprints.vocabulary import NORMALIZATIONS, Operation


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
    writers = {layer.path for layer in interface.writers}
    readers = {layer.path for layer in interface.readers}
    followers = {layer.path for layer in interface.followers}
    layers = {layer.path: layer for layer in (*interface.writers, *interface.followers, *interface.readers)}
    width = interface.writers[0].weight_shape[0]
    return tuple(
        _standin(
            layer,
            new_outputs=size if layer.path in writers | followers else 0,
            new_inputs=_new_inputs(layer, width, size, reads=layer.path in readers, follows=layer.path in followers),
            scale=scale,
            generator=generator,
        )
        for layer in layers.values()
    )


def _new_inputs(layer: LayerInterface, width: int, size: int, *, reads: bool, follows: bool) -> int:
    if follows:
        return size
    # A linear layer behind a flatten reads each channel at several positions.
    return layer.weight_shape[1] // width * size if reads else 0


def _standin(
    layer: LayerInterface, *, new_outputs: int, new_inputs: int, scale: float, generator: torch.Generator
) -> Standin:
    narrow = _module(layer, 0, 0)
    wide = _module(layer, new_outputs, new_inputs)
    weight = torch.randn(layer.weight_shape, generator=generator) / math.sqrt(max(1, math.prod(layer.weight_shape[1:])))
    if layer.operation in NORMALIZATIONS:
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
    if layer.operation in NORMALIZATIONS:
        return torch.cat([weight, torch.ones(new_outputs)])
    rms = weight.square().mean().sqrt()
    rows = torch.randn((new_outputs, *weight.shape[1:]), generator=generator) * rms * scale
    grown = torch.cat([weight, rows])
    if layer.operation is Operation.DEPTHWISE_CONV2D or new_inputs == 0:
        return grown
    columns = torch.zeros((grown.shape[0], new_inputs, *weight.shape[2:]))
    return torch.cat([grown, columns], dim=1)


def _tensor(module: nn.Module) -> nn.Parameter:
    return module.get_parameter("weight")


def _module(layer: LayerInterface, new_outputs: int, new_inputs: int) -> nn.Module:
    shape = layer.weight_shape
    match layer.operation:
        case Operation.CONV2D:
            side = (shape[2], shape[3])
            padding = (side[0] // 2, side[1] // 2)
            return nn.Conv2d(shape[1] + new_inputs, shape[0] + new_outputs, side, padding=padding, bias=layer.bias)
        case Operation.DEPTHWISE_CONV2D:
            width, side = shape[0] + new_outputs, (shape[2], shape[3])
            padding = (side[0] // 2, side[1] // 2)
            return nn.Conv2d(width, width, side, padding=padding, groups=width, bias=layer.bias)
        case Operation.LINEAR:
            return nn.Linear(shape[1] + new_inputs, shape[0] + new_outputs, bias=layer.bias)
        case Operation.BATCH_NORM2D:
            return nn.BatchNorm2d(shape[0] + new_outputs)
        case Operation.BATCH_NORM1D:
            return nn.BatchNorm1d(shape[0] + new_outputs)
        case operation:
            raise SpecError("interface.followers", f"{layer.path}: {operation} cannot be widened")


def _input_shape(layer: LayerInterface, new_inputs: int) -> tuple[int, ...]:
    """Shape of one sample of a wide layer's input, at the positions its output has."""
    spatial = layer.output_shape[1:] if len(layer.output_shape) == 3 else (4, 4)
    match layer.operation:
        case Operation.CONV2D:
            return (layer.weight_shape[1] + new_inputs, *spatial)
        case Operation.LINEAR:
            return (layer.weight_shape[1] + new_inputs,)
        case Operation.BATCH_NORM1D:
            return (layer.weight_shape[0] + new_inputs,)
        case _:
            return (layer.weight_shape[0] + new_inputs, *spatial)

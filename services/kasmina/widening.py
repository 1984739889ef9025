"""Layers that grow: the original layer, untouched, beside blocks of newborn weights.

A grown layer holds the host's layer and, per seed, the rows (new outputs) and columns (new inputs) that
the seed brought. All of it is concatenated in the forward pass into **one** convolution or product, so
that old Parameters, their optimizer state and their checkpoints stay what they are, and so that leaving a
seed out is exact: its blocks are skipped, and what is computed is the network without it.

What reads newborn channels starts at zero, so the output is unchanged at birth (within float rounding:
the sums have more terms, all of them zero). Newborn rows are drawn at the live weights' scale
(function-preserving growth as in Net2Net, Chen et al. 2016, arXiv:1511.05641, without its duplication).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.blueprints.vocabulary import Operation
from services.kasmina.model import Replacement

HOST = "host"
"""Name of the segment that the host's own layer fills."""

NEWBORN_MOMENTUM_FACTOR = 3.0
"""Newborn normalization statistics move this much faster than the host's, until they are fused."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How newborn rows are drawn.

    Attributes:
        generator: Private generator; the global streams stay untouched.
        scale: Factor on the root mean square of the live filters.
    """

    generator: torch.Generator
    scale: float = 1.0

    def rows(self, live: Tensor, shape: Sequence[int]) -> Tensor:
        """Rows of ``shape`` at the mean per-filter root mean square of ``live``.

        A layer that is all zero has no scale of its own: it gets 1 / sqrt(fan-in).
        """
        rms = float(live.detach().float().flatten(1).square().mean(1).sqrt().mean())
        if not math.isfinite(rms) or rms == 0.0:
            rms = 1.0 / math.sqrt(live[0].numel())
        drawn = torch.randn(tuple(shape), generator=self.generator) * (rms * self.scale)
        return drawn.to(device=live.device, dtype=live.dtype)


class GrownLayer(nn.Module):
    """A layer with newborn rows and columns; abstract.

    ``off`` names seeds whose blocks are skipped in the forward pass.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.cells = nn.ParameterDict()
        self.rows: list[str] = []
        self.columns: list[str] = []
        self.off: frozenset[str] = frozenset()
        self._owners: dict[str, str] = {}
        self.train(host.training)

    # -------------------------------------------------- structure

    @property
    def seeds(self) -> tuple[str, ...]:
        """Seeds that have blocks here."""
        return tuple(dict.fromkeys((*self.rows, *self.columns)))

    def parameters_of(self, seed: str) -> list[nn.Parameter]:
        """Newborn Parameters that ``seed`` owns, in an order that depends on nothing but the topology."""
        keys = sorted(key for key, owner in self._owners.items() if owner == seed)
        return [self.cells[key] for key in keys]

    def writer_parameters(self) -> list[nn.Parameter]:
        """All weights of the layer, the host's first."""
        weight = cast("nn.Linear", self.host).weight
        return [weight, *(self.cells[key] for key in sorted(self._owners) if key.startswith("weight:"))]

    def _put(self, key: str, value: Tensor, owner: str) -> nn.Parameter:
        parameter = nn.Parameter(value)
        self.cells[key] = parameter
        self._owners[key] = owner
        return parameter

    def _drop(self, key: str) -> nn.Parameter:
        parameter = self.cells.pop(key)
        del self._owners[key]
        return cast("nn.Parameter", parameter)

    def remove(self, seed: str) -> None:
        """Take out a seed's blocks, and the parts of others' blocks that connect to them."""
        for key in [key for key in self._owners if seed in key.split(":")[1:]]:
            self._drop(key)
        self.rows = [name for name in self.rows if name != seed]
        self.columns = [name for name in self.columns if name != seed]

    def _active(self, names: Iterable[str]) -> list[str]:
        return [HOST, *(name for name in names if name not in self.off)]

    # -------------------------------------------------- for subclasses

    def grow_outputs(self, seed: str, size: int, draw: Draw | None) -> None:
        """Add ``size`` output channels; zeros where ``draw`` is ``None`` (their values are loaded later)."""
        raise NotImplementedError

    def grow_inputs(self, seed: str, size: int) -> None:
        """Add ``size`` input channels, read with weight zero."""
        raise NotImplementedError

    def absorb(self, seed: str) -> list[Replacement]:
        """Make the oldest seed's blocks part of the host's tensors; says what replaced what."""
        raise NotImplementedError

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        raise NotImplementedError


class GrownMatrix(GrownLayer):
    """A convolution or a linear layer: a grid of blocks, one row of it per output segment, one column per input."""

    def __init__(self, host: nn.Module, factor: int = 1) -> None:
        super().__init__(host)
        self.factor = factor

    def _host(self) -> nn.Linear:
        return cast("nn.Linear", self.host)

    def _cell(self, row: str, column: str) -> Tensor:
        return self._host().weight if row == column == HOST else self.cells[f"weight:{row}:{column}"]

    def weight(self, rows: Sequence[str], columns: Sequence[str]) -> Tensor:
        """The weight of some output and input segments, [outputs, inputs, ...]."""
        strips = [_cat([self._cell(row, column) for column in columns], 1) for row in rows]
        return _cat(strips, 0)

    def bias(self, rows: Sequence[str]) -> Tensor | None:
        """The bias of some output segments, [outputs]; ``None`` for a layer without."""
        own = cast("Tensor | None", self._host().bias)
        if own is None:
            return None
        return _cat([own if row == HOST else self.cells[f"bias:{row}"] for row in rows], 0)

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        rows = [HOST, *self.rows]
        outputs = sum(self._cell(row, HOST).shape[0] for row in rows)
        inputs = sum(self._cell(HOST, column).shape[1] for column in (HOST, *self.columns))
        return (outputs, inputs, *self._host().weight.shape[2:])

    def grow_inputs(self, seed: str, size: int) -> None:
        """Add ``size`` channels (``factor`` entries each), read with weight zero by every output there is."""
        for row in (HOST, *self.rows):
            beside = self._cell(row, HOST)
            zeros = beside.new_zeros((beside.shape[0], size * self.factor, *beside.shape[2:]))
            self._put(f"weight:{row}:{seed}", zeros.detach(), seed)
        self.columns.append(seed)

    def grow_outputs(self, seed: str, size: int, draw: Draw | None) -> None:
        """Add ``size`` outputs that read every input there is; their bias is zero."""
        columns = [HOST, *self.columns]
        # The scale is that of the host's own weights: what newborn columns hold so far would pull it to zero.
        live = self._cell(HOST, HOST)
        for column in columns:
            above = self._cell(HOST, column)
            shape = (size, *above.shape[1:])
            fresh = above.new_zeros(shape).detach() if draw is None else draw.rows(live, shape)
            self._put(f"weight:{seed}:{column}", fresh, seed)
        bias = cast("Tensor | None", self._host().bias)
        if bias is not None:
            self._put(f"bias:{seed}", bias.new_zeros(size).detach(), seed)
        self.rows.append(seed)

    def absorb(self, seed: str) -> list[Replacement]:
        """Fuse the oldest seed of its rows or columns into the host's layer, a new plain one."""
        rows = [HOST, seed] if seed in self.rows else [HOST]
        columns = [HOST, seed] if seed in self.columns else [HOST]
        later_rows = [name for name in self.rows if name != seed]
        later_columns = [name for name in self.columns if name != seed]
        replaced: list[Replacement] = []
        merged: dict[str, tuple[nn.Parameter, str]] = {}

        def fuse(grid: list[list[nn.Parameter]]) -> nn.Parameter:
            if len(grid) == len(grid[0]) == 1:
                return grid[0][0]
            with torch.no_grad():
                value = _cat([_cat(strip, 1) for strip in grid], 0)
            trainable = any(part.requires_grad for strip in grid for part in strip)
            new = nn.Parameter(value.detach().clone(), requires_grad=trainable)
            replaced.append(Replacement(new, _placed(grid)))
            return new

        def cell(row: str, column: str) -> nn.Parameter:
            return cast("nn.Parameter", self._cell(row, column))

        weight = fuse([[cell(row, column) for column in columns] for row in rows])
        for row in later_rows:
            merged[f"weight:{row}:{HOST}"] = (fuse([[cell(row, column) for column in columns]]), row)
        for column in later_columns:
            merged[f"weight:{HOST}:{column}"] = (fuse([[cell(row, column)] for row in rows]), column)
        bias = cast("nn.Parameter | None", self._host().bias)
        if bias is not None and len(rows) == 2:
            bias = _fuse_vectors([bias, self.cells[f"bias:{seed}"]], replaced)
        self.remove(seed)
        for key, (parameter, owner) in merged.items():
            self.cells[key] = parameter
            self._owners[key] = owner
        self.host = resized(self.host, {"weight": weight, "bias": bias})
        return replaced


class GrownConvolution(GrownMatrix):
    """A widened :class:`torch.nn.Conv2d`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H', W'], as the host's layer with all active blocks."""
        host = cast("nn.Conv2d", self.host)
        rows = self._active(self.rows)
        weight = self.weight(rows, self._active(self.columns))
        return F.conv2d(inputs, weight, self.bias(rows), host.stride, host.padding, host.dilation)


class GrownLinear(GrownMatrix):
    """A widened :class:`torch.nn.Linear`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., C] to [..., C'], as the host's layer with all active blocks."""
        rows = self._active(self.rows)
        return F.linear(inputs, self.weight(rows, self._active(self.columns)), self.bias(rows))


class GrownVector(GrownLayer):
    """A layer that treats channels one by one: blocks in one dimension."""

    names: tuple[str, ...] = ("weight", "bias")

    def _own(self, name: str) -> Tensor | None:
        return cast("Tensor | None", getattr(self.host, name))

    def _block(self, name: str, segment: str) -> Tensor:
        return cast("Tensor", self._own(name) if segment == HOST else self.cells[f"{name}:{segment}"])

    def joined(self, name: str, segments: Sequence[str]) -> Tensor | None:
        """A Parameter of some segments, [channels, ...]; ``None`` where the layer has none of that name."""
        if self._own(name) is None:
            return None
        return _cat([self._block(name, segment) for segment in segments], 0)

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        weights = [self._block("weight", segment) for segment in (HOST, *self.rows)]
        return (sum(weight.shape[0] for weight in weights), *weights[0].shape[1:])

    def absorb(self, seed: str) -> list[Replacement]:
        """Fuse the oldest seed into the host's layer, a new plain one."""
        replaced: list[Replacement] = []
        fused: dict[str, Tensor | None] = {}
        for name in self.names:
            own = self._own(name)
            if own is not None:
                parts = [cast("nn.Parameter", own), self.cells[f"{name}:{seed}"]]
                fused[name] = _fuse_vectors(parts, replaced)
        fused |= self._absorb_buffers(seed)
        self.remove(seed)
        self.host = resized(self.host, fused)
        return replaced

    def _absorb_buffers(self, seed: str) -> dict[str, Tensor | None]:
        del seed
        return {}


class GrownDepthwise(GrownVector):
    """A widened depthwise :class:`torch.nn.Conv2d` (as many groups as channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, H', W'], each channel by its own filter."""
        host = cast("nn.Conv2d", self.host)
        segments = self._active(self.rows)
        weight = cast("Tensor", self.joined("weight", segments))
        bias = self.joined("bias", segments)
        return F.conv2d(inputs, weight, bias, host.stride, host.padding, host.dilation, weight.shape[0])

    def grow_outputs(self, seed: str, size: int, draw: Draw | None) -> None:
        """Add ``size`` channels with filters of their own."""
        own = cast("Tensor", self._own("weight"))
        shape = (size, *own.shape[1:])
        self._put(f"weight:{seed}", own.new_zeros(shape).detach() if draw is None else draw.rows(own, shape), seed)
        bias = self._own("bias")
        if bias is not None:
            self._put(f"bias:{seed}", bias.new_zeros(size).detach(), seed)
        self.rows.append(seed)


class GrownNormalization(GrownVector):
    """A widened batch normalization: newborn channels have gain 1 and running statistics of their own."""

    def _norm(self) -> nn.BatchNorm2d:
        return cast("nn.BatchNorm2d", self.host)

    def _statistics(self, name: str, segment: str) -> Tensor:
        return cast("Tensor", getattr(self.host, name) if segment == HOST else getattr(self, f"{name}:{segment}"))

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, ...] to the same shape; in training mode the running statistics of active channels move."""
        host = self._norm()
        segments = self._active(self.rows)
        gain, shift = self.joined("weight", segments), self.joined("bias", segments)
        mean = torch.cat([self._statistics("running_mean", segment) for segment in segments])
        variance = torch.cat([self._statistics("running_var", segment) for segment in segments])
        momentum = cast("float", host.momentum)
        outputs = F.batch_norm(inputs, mean, variance, gain, shift, self.training, momentum, host.eps)
        if self.training:
            cast("Tensor", host.num_batches_tracked).add_(1)
            self._write_back("running_mean", mean, segments, momentum)
            self._write_back("running_var", variance, segments, momentum)
        return outputs

    @torch.no_grad()
    def _write_back(self, name: str, updated: Tensor, segments: Sequence[str], momentum: float) -> None:
        # One call normalizes all channels with the host's momentum; newborn ones go on in the same direction.
        speed = min(NEWBORN_MOMENTUM_FACTOR, 1.0 / momentum) if momentum > 0 else 1.0
        start = 0
        for segment in segments:
            target = self._statistics(name, segment)
            value = updated[start : start + len(target)]
            start += len(target)
            if segment == HOST:
                target.copy_(value)
            else:
                target.add_(value - target, alpha=speed)

    def grow_outputs(self, seed: str, size: int, draw: Draw | None) -> None:
        """Add ``size`` channels: gain 1, shift 0, mean 0, variance 1; nothing is drawn."""
        del draw
        host = self._norm()
        self._put(f"weight:{seed}", host.weight.new_ones(size).detach(), seed)
        self._put(f"bias:{seed}", host.bias.new_zeros(size).detach(), seed)
        mean = cast("Tensor", host.running_mean)
        self.register_buffer(f"running_mean:{seed}", mean.new_zeros(size))
        self.register_buffer(f"running_var:{seed}", mean.new_ones(size))
        self.rows.append(seed)

    def remove(self, seed: str) -> None:
        """Take out a seed's channels, their statistics too."""
        super().remove(seed)
        for name in ("running_mean", "running_var"):
            self._buffers.pop(f"{name}:{seed}", None)

    def _absorb_buffers(self, seed: str) -> dict[str, Tensor | None]:
        names = ("running_mean", "running_var")
        return {name: torch.cat([self._statistics(name, HOST), self._statistics(name, seed)]) for name in names}


_GROWN: dict[Operation, Callable[[nn.Module], GrownLayer]] = {
    Operation.CONV2D: GrownConvolution,
    Operation.LINEAR: GrownLinear,
    Operation.DEPTHWISE_CONV2D: GrownDepthwise,
    Operation.BATCH_NORM1D: GrownNormalization,
    Operation.BATCH_NORM2D: GrownNormalization,
}


def grown(host: nn.Module, operation: Operation, factor: int = 1) -> GrownLayer:
    """The growing form of a host's layer; ``factor`` is the number of input entries per channel of a linear layer."""
    layer = _GROWN[operation](host)
    if isinstance(layer, GrownMatrix):
        layer.factor = factor
    return layer


def resized(host: nn.Module, tensors: dict[str, Tensor | None]) -> nn.Module:
    """A plain layer like ``host`` with other Parameters and buffers; ``host`` itself stays as it is.

    Nothing is initialized, so no random stream moves. Sizes that the layer keeps as numbers are set from the tensors.
    """
    layer = copy.copy(host)
    layer.__dict__["_parameters"] = dict(host._parameters)
    layer.__dict__["_buffers"] = dict(host._buffers)
    for name, tensor in tensors.items():
        if name in layer._parameters:
            layer._parameters[name] = cast("nn.Parameter | None", tensor)
        else:
            layer._buffers[name] = tensor
    weight = cast("Tensor", layer._parameters["weight"])
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = weight.shape[0]
        depthwise = layer.groups > 1
        layer.in_channels = weight.shape[0] if depthwise else weight.shape[1]
        layer.groups = weight.shape[0] if depthwise else 1
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        cast("nn.BatchNorm2d", layer).num_features = weight.shape[0]
    return layer


def with_shape(host: nn.Module, outputs: int, inputs: int | None) -> nn.Module:
    """A plain layer like ``host`` with ``outputs`` and ``inputs`` entries; ``host`` itself if it has that shape.

    Fresh tensors hold zeros: they are about to be loaded. ``inputs`` is ``None`` for layers without an input side.
    """
    own = cast("nn.Linear", host).weight
    shape = (outputs, own.shape[1] if inputs is None and own.dim() > 1 else inputs, *own.shape[2:])[: own.dim()]
    if tuple(own.shape) == shape:
        return host
    tensors: dict[str, Tensor | None] = {"weight": nn.Parameter(own.new_zeros(cast("tuple[int, ...]", shape)).detach())}
    for name in ("bias", "running_mean", "running_var"):
        old = cast("Tensor | None", getattr(host, name, None))
        if old is not None:
            fresh = old.new_zeros(outputs).detach()
            tensors[name] = nn.Parameter(fresh) if name == "bias" else fresh
    return resized(host, tensors)


def _cat(tensors: Sequence[Tensor], dimension: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dimension)


def _placed(grid: list[list[nn.Parameter]]) -> tuple[tuple[nn.Parameter, tuple[slice, ...]], ...]:
    parts: list[tuple[nn.Parameter, tuple[slice, ...]]] = []
    top = 0
    for strip in grid:
        left = 0
        for part in strip:
            height, width = part.shape[0], part.shape[1]
            rest = tuple(slice(0, extent) for extent in part.shape[2:])
            parts.append((part, (slice(top, top + height), slice(left, left + width), *rest)))
            left += width
        top += strip[0].shape[0]
    return tuple(parts)


def _fuse_vectors(parts: Sequence[nn.Parameter], replaced: list[Replacement]) -> nn.Parameter:
    with torch.no_grad():
        value = torch.cat([part.detach() for part in parts])
    new = nn.Parameter(value, requires_grad=any(part.requires_grad for part in parts))
    placed: list[tuple[nn.Parameter, tuple[slice, ...]]] = []
    start = 0
    for part in parts:
        rest = tuple(slice(0, extent) for extent in part.shape[1:])
        placed.append((part, (slice(start, start + len(part)), *rest)))
        start += len(part)
    replaced.append(Replacement(new, tuple(placed)))
    return new

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
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.kasmina.graph import Part
from services.kasmina.model import Replacement

HOST = "host"
"""Name of the block that the host's own layer fills."""


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


_Placed = tuple[str, slice | Tensor]
"""Name of a block, and the entries of a dimension that it fills."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive entries of one side of a grown layer.

    Attributes:
        name: ``host``, or the name of a seed's block.
        seed: Whose it is; empty for the host.
        start: First of the host's entries that it holds; 0 for a seed's.
        size: Entries.
    """

    name: str
    seed: str
    start: int
    size: int


@dataclass(slots=True)
class Side:
    """The outputs or inputs of a grown layer: the host's entries by part, seeds' entries behind the part they widen.

    Behind a concatenation a layer has several parts, so that newborn channels of the first come before the host's
    channels of the second, as in the plain layer they are fused into.

    Attributes:
        parts: What the host's entries are channels of.
        sizes: How many of the host's entries are in each part.
        grown: Blocks that seeds brought, oldest first, with the number of the part they stand behind.
    """

    parts: tuple[Part, ...]
    sizes: list[int]
    grown: list[tuple[int, Block]] = field(default_factory=list)

    @classmethod
    def whole(cls, size: int) -> Side:
        """One part of ``size`` entries that belong to no slot."""
        return cls((Part(None, 1),), [size])

    @property
    def divided(self) -> bool:
        """Whether the host's entries do not all stand together."""
        return len(self.parts) > 1

    @property
    def seeds(self) -> list[str]:
        """Seeds that brought entries, oldest first."""
        return [block.seed for _, block in self.grown]

    def grow(self, seed: str, slot: str | None, size: int) -> list[Block]:
        """Add ``size`` channels of a slot to each part that holds its channels; returns their blocks."""
        places = [number for number, part in enumerate(self.parts) if part.slot == slot]
        added = []
        for number in places:
            name = seed if len(places) == 1 else f"{seed}@{number}"
            added.append((number, Block(name, seed, 0, size * self.parts[number].factor)))
        self.grown += added
        return [block for _, block in added]

    def blocks(self, off: frozenset[str] = frozenset()) -> list[Block]:
        """All blocks in the order of the layer's entries, without those of the seeds in ``off``."""
        found: list[Block] = []
        start = 0
        for number, size in enumerate(self.sizes):
            found.append(Block(HOST, "", start, size))
            found += [block for place, block in self.grown if place == number and block.seed not in off]
            start += size
        return found

    def remove(self, seed: str) -> None:
        """Forget a seed's blocks."""
        self.grown = [(place, block) for place, block in self.grown if block.seed != seed]

    def merged(self, seed: str) -> list[tuple[str, slice | Tensor]]:
        """Where the host's entries and a seed's go in a layer that holds both, by the names of their blocks."""
        places: dict[str, list[int]] = {HOST: []}
        start = 0
        for block in self.blocks(frozenset(self.seeds) - {seed}):
            places.setdefault(block.name, []).extend(range(start, start + block.size))
            start += block.size
        return [(name, _index(entries)) for name, entries in places.items()]

    def absorb(self, seed: str) -> None:
        """Count a seed's entries as the host's."""
        for place, block in self.grown:
            if block.seed == seed:
                self.sizes[place] += block.size
        self.remove(seed)


def _seeds_in(key: str) -> list[str]:
    """Seeds that a tensor belongs to, of its name ``kind:block[:block]``."""
    return [name.partition("@")[0] for name in key.split(":")[1:]]


def _index(entries: list[int]) -> slice | Tensor:
    if entries and entries[-1] - entries[0] == len(entries) - 1:
        return slice(entries[0], entries[-1] + 1)
    return torch.tensor(entries)


def _total(places: Iterable[_Placed]) -> int:
    return sum(where.stop - where.start if isinstance(where, slice) else len(where) for _, where in places)


class GrownLayer(nn.Module):
    """A layer with newborn rows (outputs) and columns (inputs); abstract.

    ``off`` names seeds whose blocks are skipped in the forward pass.
    """

    def __init__(self, host: nn.Module, outputs: Side | None = None, inputs: Side | None = None) -> None:
        super().__init__()
        self.host = host
        self.cells = nn.ParameterDict()
        weight = cast("Tensor", host.weight)
        self.outputs = Side.whole(weight.shape[0]) if outputs is None else outputs
        self.inputs = Side.whole(weight.shape[1] if weight.dim() > 1 else 0) if inputs is None else inputs
        self.off: frozenset[str] = frozenset()
        self._owners: dict[str, str] = {}
        self.train(host.training)

    # -------------------------------------------------- structure

    @property
    def seeds(self) -> tuple[str, ...]:
        """Seeds that have blocks here."""
        return tuple(dict.fromkeys((*self.outputs.seeds, *self.inputs.seeds)))

    def parameters_of(self, seed: str) -> list[nn.Parameter]:
        """Newborn Parameters that ``seed`` owns, in an order that depends on nothing but the topology."""
        keys = sorted(key for key, owner in self._owners.items() if owner == seed)
        return [self.cells[key] for key in keys]

    def writer_parameters(self) -> list[nn.Parameter]:
        """All weights of the layer, the host's first."""
        weight = cast("nn.Linear", self.host).weight
        return [weight, *(self.cells[key] for key in sorted(self._owners) if key.startswith("weight:"))]

    def _put(self, key: str, value: Tensor, owner: str) -> None:
        self.cells[key] = nn.Parameter(value.detach())
        self._owners[key] = owner

    def remove(self, seed: str) -> None:
        """Take out a seed's blocks, and the parts of others' blocks that connect to them."""
        for key in [key for key in self._owners if seed in _seeds_in(key)]:
            del self.cells[key], self._owners[key]
        for key in [key for key in self._buffers if seed in _seeds_in(key)]:
            del self._buffers[key]
        self.outputs.remove(seed)
        self.inputs.remove(seed)

    # -------------------------------------------------- for subclasses

    def grow_outputs(self, seed: str, size: int, draw: Draw | None, slot: str | None = None) -> None:
        """Add ``size`` channels of ``slot`` to the outputs; without ``draw`` zeros, to be loaded later."""
        raise NotImplementedError

    def grow_inputs(self, seed: str, size: int, slot: str | None = None) -> None:
        """Add ``size`` channels of ``slot`` to the inputs, read with weight zero."""
        raise NotImplementedError

    def absorb(self, seed: str) -> list[Replacement]:
        """Make the oldest seed's blocks part of the host's tensors; says what replaced what."""
        raise NotImplementedError

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        raise NotImplementedError

    def set_share(self, seed: str, share: float) -> None:
        """Let a seed's channels count ``share`` (0..1) in statistics over all channels; nothing to do without any."""


class GrownMatrix(GrownLayer):
    """A convolution or a linear layer: a grid of blocks, one row of it per output block, one column per input block."""

    def _host(self) -> nn.Linear:
        return cast("nn.Linear", self.host)

    def _cell(self, row: str, column: str) -> nn.Parameter:
        own = self._host().weight if row == column == HOST else self.cells[f"weight:{row}:{column}"]
        return cast("nn.Parameter", own)

    @property
    def weight(self) -> Tensor:
        """The weight with all active blocks, [outputs, inputs, ...]; torch's own modules read it as a layer's."""
        columns = self.inputs.blocks(self.off)
        strips = [
            _cat([self._part(row.name, column) for column in columns], 1) for row in self.outputs.blocks(self.off)
        ]
        return _cat(strips, 0)

    def _part(self, row: str, column: Block) -> Tensor:
        cell = self._cell(row, column.name)
        whole = column.name != HOST or not self.inputs.divided
        return cell if whole else cell.narrow(1, column.start, column.size)

    @property
    def bias(self) -> Tensor | None:
        """The bias with all active blocks, [outputs]; ``None`` for a layer without."""
        own = cast("Tensor | None", self._host().bias)
        if own is None:
            return None
        rows = self.outputs.blocks(self.off)
        return _cat([own if row.name == HOST else self.cells[f"bias:{row.name}"] for row in rows], 0)

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        outputs, inputs = (sum(block.size for block in side.blocks()) for side in (self.outputs, self.inputs))
        return (outputs, inputs, *self._host().weight.shape[2:])

    def grow_inputs(self, seed: str, size: int, slot: str | None = None) -> None:
        """Add ``size`` channels, read with weight zero by every output there is."""
        rows = {block.name for block in self.outputs.blocks()}
        for column in self.inputs.grow(seed, slot, size):
            for row in sorted(rows):
                beside = self._cell(row, HOST)
                self._put(
                    f"weight:{row}:{column.name}",
                    beside.new_zeros((beside.shape[0], column.size, *beside.shape[2:])),
                    seed,
                )

    def grow_outputs(self, seed: str, size: int, draw: Draw | None, slot: str | None = None) -> None:
        """Add ``size`` channels that read every input there is; their bias is zero."""
        columns = dict.fromkeys(block.name for block in self.inputs.blocks())
        # The scale is that of the host's own weights: what newborn columns hold so far would pull it to zero.
        live = self._cell(HOST, HOST)
        for row in self.outputs.grow(seed, slot, size):
            for column in columns:
                above = self._cell(HOST, column)
                shape = (row.size, *above.shape[1:])
                fresh = above.new_zeros(shape) if draw is None else draw.rows(live, shape)
                self._put(f"weight:{row.name}:{column}", fresh, seed)
            bias = cast("Tensor | None", self._host().bias)
            if bias is not None:
                self._put(f"bias:{row.name}", bias.new_zeros(row.size), seed)

    def absorb(self, seed: str) -> list[Replacement]:
        """Fuse the oldest seed of its rows or columns into the host's layer, a new plain one."""
        rows, columns = self.outputs.merged(seed), self.inputs.merged(seed)
        later_rows = [block for block in self.outputs.blocks() if block.seed not in ("", seed)]
        later_columns = [block for block in self.inputs.blocks() if block.seed not in ("", seed)]
        replaced: list[Replacement] = []
        merged: dict[str, tuple[nn.Parameter, str]] = {}

        def fuse(down: Sequence[_Placed], across: Sequence[_Placed]) -> nn.Parameter:
            parts = [(self._cell(row, column), (y, x)) for row, y in down for column, x in across]
            shape = (_total(down), _total(across), *self._host().weight.shape[2:])
            return _fuse(parts, shape, replaced)

        weight = fuse(rows, columns)
        for block in later_rows:
            own = [(block.name, slice(0, block.size))]
            merged[f"weight:{block.name}:{HOST}"] = (fuse(own, columns), block.seed)
        for block in later_columns:
            own = [(block.name, slice(0, block.size))]
            merged[f"weight:{HOST}:{block.name}"] = (fuse(rows, own), block.seed)
        bias = cast("nn.Parameter | None", self._host().bias)
        if bias is not None:
            vectors = [(bias if name == HOST else self.cells[f"bias:{name}"], (where,)) for name, where in rows]
            bias = _fuse(vectors, (_total(rows),), replaced)
        self.outputs.absorb(seed)
        self.inputs.absorb(seed)
        self.remove(seed)
        for key, (parameter, owner) in merged.items():
            self.cells[key] = parameter
            self._owners[key] = owner
        self.host = resized(self.host, {"weight": weight, "bias": bias})
        return replaced


_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class GrownConvolution(GrownMatrix):
    """A widened :class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d``."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, ...] to [N, C', ...], as the host's layer with all active blocks."""
        host = cast("nn.Conv2d", self.host)
        convolve = _CONVOLVE[len(host.stride)]
        return convolve(inputs, self.weight, self.bias, host.stride, host.padding, host.dilation)


class GrownLinear(GrownMatrix):
    """A widened :class:`torch.nn.Linear`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., C] to [..., C'], as the host's layer with all active blocks."""
        return F.linear(inputs, self.weight, self.bias)


class GrownVector(GrownLayer):
    """A layer that treats channels one by one: blocks in one dimension, ``axis`` of its weight."""

    names: tuple[str, ...] = ("weight", "bias")
    axis = 0

    def _own(self, name: str) -> nn.Parameter | None:
        return cast("nn.Parameter | None", getattr(self.host, name, None))

    def _block(self, name: str, block: Block) -> Tensor:
        if block.name != HOST:
            return cast("Tensor", self.cells[f"{name}:{block.name}"])
        own = cast("Tensor", self._own(name))
        return own.narrow(self.axis, block.start, block.size) if self.outputs.divided else own

    def joined(self, name: str) -> Tensor | None:
        """A Parameter with all active blocks; ``None`` where the layer has none of that name."""
        if self._own(name) is None:
            return None
        return _cat([self._block(name, block) for block in self.outputs.blocks(self.off)], self.axis)

    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as concatenated, nothing left out."""
        shape = list(cast("Tensor", self._own("weight")).shape)
        shape[self.axis] = sum(block.size for block in self.outputs.blocks())
        return tuple(shape)

    def grow_outputs(self, seed: str, size: int, draw: Draw | None, slot: str | None = None) -> None:
        """Add ``size`` channels, see :meth:`newborn`."""
        for block in self.outputs.grow(seed, slot, size):
            for name in self.names:
                own = self._own(name)
                if own is not None:
                    shape = list(own.shape)
                    shape[self.axis] = block.size
                    self._put(f"{name}:{block.name}", self.newborn(name, own, shape, draw), seed)
            self._grow_buffers(block)

    def newborn(self, name: str, live: Tensor, shape: Sequence[int], draw: Draw | None) -> Tensor:
        """Newborn entries of a Parameter: weights at the live scale, biases zero."""
        return live.new_zeros(tuple(shape)) if draw is None or name != "weight" else draw.rows(live, shape)

    def absorb(self, seed: str) -> list[Replacement]:
        """Fuse the oldest seed into the host's layer, a new plain one."""
        replaced: list[Replacement] = []
        fused: dict[str, Tensor | None] = {}
        places = self.outputs.merged(seed)
        before = (slice(None),) * self.axis
        for name in self.names:
            own = self._own(name)
            if own is not None:
                parts = [(own if b == HOST else self.cells[f"{name}:{b}"], (*before, where)) for b, where in places]
                shape = list(own.shape)
                shape[self.axis] = _total(places)
                fused[name] = _fuse(parts, shape, replaced)
        fused |= self._absorb_buffers(seed)
        self.outputs.absorb(seed)
        self.remove(seed)
        self.host = resized(self.host, fused)
        return replaced

    def _grow_buffers(self, block: Block) -> None:
        """Give a newborn block statistics of its own, where the layer keeps any."""

    def _absorb_buffers(self, seed: str) -> dict[str, Tensor | None]:
        del seed
        return {}


class GrownDepthwise(GrownVector):
    """A widened depthwise convolution (as many groups as input channels, one or more filters for each)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, ...] to [N, C * filters, ...], each channel by its own filters."""
        host = cast("nn.Conv2d", self.host)
        weight, bias = cast("Tensor", self.joined("weight")), self.joined("bias")
        convolve = _CONVOLVE[len(host.stride)]
        return convolve(inputs, weight, bias, host.stride, host.padding, host.dilation, inputs.shape[1])


class HeldParameter(nn.Module):
    """Stands for a Parameter of the model's own where layers are asked for; ``weight`` is that very Parameter."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class GrownParameter(GrownVector):
    """A widened Parameter of the model's own, for example a position embedding.

    What is added to channels is drawn at the live scale; a ``gain`` that multiplies them is born at its present mean.
    """

    names = ("weight",)

    def __init__(self, host: nn.Module, outputs: Side, *, axis: int, gain: bool) -> None:
        super().__init__(host, outputs)
        self.axis = axis
        self.gain = gain

    def forward(self) -> Tensor:
        """The Parameter with all active blocks."""
        return cast("Tensor", self.joined("weight"))

    def newborn(self, name: str, live: Tensor, shape: Sequence[int], draw: Draw | None) -> Tensor:
        """At the live scale, or the mean for a gain; a Parameter that is all zero gets zeros."""
        del name
        values = live.detach()
        if self.gain:
            return values.mean(self.axis, keepdim=True).expand(*shape).clone()
        if draw is None or not bool(values.any()):
            return values.new_zeros(tuple(shape))
        ahead = [shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :]]
        return draw.rows(values.movedim(self.axis, 0), ahead).movedim(0, self.axis).contiguous()


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
    outputs = cast("Tensor", layer._parameters["weight"]).shape[0]
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.groups > 1:
            layer.groups = layer.in_channels = outputs // (layer.out_channels // layer.groups)
        else:
            layer.in_channels = layer.weight.shape[1]
        layer.out_channels = outputs
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = (outputs,)
    elif isinstance(layer, nn.GroupNorm):
        if layer.num_groups > 1:
            layer.num_groups = outputs // (layer.num_channels // layer.num_groups)
        layer.num_channels = outputs
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        layer.num_features = outputs
    return layer


def with_shape(host: nn.Module, outputs: int, inputs: int | None, axis: int = 0) -> nn.Module:
    """A plain layer like ``host`` with ``outputs`` and ``inputs`` entries; ``host`` itself if it has that shape.

    Fresh tensors hold zeros: they are about to be loaded. ``inputs`` is ``None`` for layers without an input side;
    ``axis`` is the dimension of the weight that holds the outputs.
    """
    own = cast("nn.Linear", host).weight
    shape = list(own.shape)
    shape[axis] = outputs
    if inputs is not None:
        shape[1] = inputs
    if list(own.shape) == shape:
        return host
    tensors: dict[str, Tensor | None] = {"weight": nn.Parameter(own.new_zeros(shape).detach())}
    for name in ("bias", "running_mean", "running_var"):
        old = cast("Tensor | None", getattr(host, name, None))
        if old is not None:
            fresh = old.new_zeros(outputs).detach()
            tensors[name] = nn.Parameter(fresh) if name == "bias" else fresh
    return resized(host, tensors)


def _cat(tensors: Sequence[Tensor], dimension: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dimension)


def _fuse(
    parts: Sequence[tuple[nn.Parameter, tuple[slice | Tensor, ...]]], shape: Sequence[int], replaced: list[Replacement]
) -> nn.Parameter:
    """One Parameter of ``shape`` from parts and the leading indices of where they go; a single part stays itself."""
    if len(parts) == 1:
        return parts[0][0]
    value = parts[0][0].new_empty(tuple(shape)).detach()
    placed = []
    for part, where in parts:
        index = (*where, *(slice(None) for _ in part.shape[len(where) :]))
        value[index] = part.detach()
        placed.append((part, index))
    new = nn.Parameter(value, requires_grad=any(part.requires_grad for part, _ in parts))
    replaced.append(Replacement(new, tuple(placed)))
    return new

"""The network as it grows: which layers are widened, which spans are bridged, and how to put it all back.

This is the only place that replaces modules of the host. A dormant slot has nothing in the forward path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from services.blueprints.spec import Interface, LayerInterface, SlotKind, channels_of
from services.blueprints.vocabulary import Operation
from services.kasmina.branches import Bridge
from services.kasmina.graph import Analysis, Part, Site
from services.kasmina.layers import ModulePlace, Place, grown_at, place_of
from services.kasmina.model import LayerChange, Replacement
from services.kasmina.widening import Draw, GrownLayer, with_shape

_CHANNELS_LAST = frozenset({Operation.LINEAR, Operation.LAYER_NORM, Operation.RMS_NORM})
"""Operations whose channels are the last dimension of a sample; else they are the first."""


@dataclass(frozen=True, slots=True)
class Graft:
    """A seed's part of the network that is not fused (yet).

    Attributes:
        seed: Id of the seed.
        slot: Slot it sits in.
        size: New channels of a widening, inner width of a branch.
        bridge: The branch; ``None`` for a widening.
    """

    seed: str
    slot: str
    size: int
    bridge: Bridge | None = None


class GrowingNetwork:
    """A host and everything grafted into it.

    Args:
        model: The host. It is grown in place; its Parameters keep their identity until they are fused.
        analysis: Where it can grow.
    """

    def __init__(self, model: nn.Module, analysis: Analysis) -> None:
        self.model = model
        self.analysis = analysis
        self.grafts: dict[str, Graft] = {}
        self.fused: dict[str, int] = dict.fromkeys(analysis.slots, 0)
        paths = {*analysis.sites, *(span.path for span in analysis.spans.values())}
        self._places = {path: place_of(model, path) for path in paths}
        self._layers: dict[str, GrownLayer] = {}
        self._original = {path: _weight_shape(self.layer(path)) for path in analysis.sites}

    # -------------------------------------------------- looking

    def _site_place(self, path: str) -> Place:
        place = self._places[path]
        while isinstance(module := place.get(), Bridge):
            place = ModulePlace(module, "host")
        return place

    def layer(self, path: str) -> nn.Module:
        """The layer at a path of the host, grown or plain, beneath any branch that bridges it."""
        return self._site_place(path).get()

    def settled_width(self, slot: str) -> int:
        """Channels of a WIDTH slot without seeds that may still leave."""
        return self.analysis.slots[slot].width + self.fused[slot]

    def width(self, slot: str) -> int:
        """Channels of a WIDTH slot as of now."""
        return self.settled_width(slot) + sum(
            graft.size for graft in self.grafts.values() if graft.slot == slot and graft.bridge is None
        )

    def stack(self, slot: str) -> list[str]:
        """Seeds with blocks of their own in a slot, oldest first."""
        return [graft.seed for graft in self.grafts.values() if graft.slot == slot]

    def parameters_of(self, seed: str) -> list[nn.Parameter]:
        """Parameters that a seed brought and that are not fused, in an order given by the topology alone."""
        graft = self.grafts[seed]
        if graft.bridge is None:
            layers = (self._layers[path] for path in self._touched(graft.slot))
            return [parameter for layer in layers for parameter in layer.parameters_of(seed)]
        owned = list(graft.bridge.branch.parameters())
        return owned if graft.bridge.head is None else [*owned, *graft.bridge.head.parameters()]

    def writer_parameters(self, slot: str) -> list[nn.Parameter]:
        """Weights that write the channels of a WIDTH slot."""
        found: list[nn.Parameter] = []
        for path in self.analysis.slots[slot].writers:
            layer = self.layer(path)
            found += (
                layer.writer_parameters() if isinstance(layer, GrownLayer) else [cast("nn.Parameter", layer.weight)]
            )
        return found

    def interface(self, slot: str) -> Interface:
        """Shapes and layers that a blueprint for this slot must fit, as of now.

        Of a SPAN: at its settled width, because a branch keeps the channels it was built for.
        """
        dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
        if slot in self.analysis.spans:
            span = self.analysis.spans[slot]
            last = span.path
            return Interface(
                SlotKind.SPAN,
                self._settled_shape(span.input_shape, self._slot_before(last)),
                self._settled_shape(span.output_shape, self._slot_behind(last)),
                dtype,
            )
        width = self.analysis.slots[slot]
        before, behind = self.analysis.shapes[width.name]
        site = self.analysis.sites[width.name]
        return Interface(
            SlotKind.WIDTH,
            self._resized(before, site, site.inputs),
            self._resized(behind, site, site.outputs),
            dtype,
            writers=tuple(self._layer_interface(path, slot) for path in width.writers),
            readers=tuple(self._layer_interface(path, slot, reads=True) for path in width.readers),
            followers=tuple(self._layer_interface(path, slot) for path in width.followers),
        )

    def _entries(self, parts: Iterable[Part]) -> int:
        return sum(part.entries(self.width) for part in parts)

    def _resized(self, shape: tuple[int, ...], site: Site, parts: tuple[Part, ...]) -> tuple[int, ...]:
        """Shape of a sample on one side of a layer, as of now."""
        if not parts:
            return shape
        entries = self._entries(parts)
        return (*shape[:-1], entries) if site.operation in _CHANNELS_LAST else (entries, *shape[1:])

    def _layer_interface(self, path: str, slot: str, *, reads: bool = False) -> LayerInterface:
        site = self.analysis.sites[path]
        layer = self.layer(path)
        host = layer.host if isinstance(layer, GrownLayer) else layer
        shape = list(self.weight_shape(path))
        shape.insert(0, shape.pop(site.axis))
        behind = self.analysis.shapes[path][1] if path in self.analysis.shapes else ()
        bias = getattr(host, "bias", None) is not None
        parts = site.inputs if reads else site.outputs
        unit = sum(part.factor for part in parts if part.slot == slot)
        # What the layer's shape says by itself is left out: one entry, or all inputs in equal shares.
        usual = unit * self.width(slot) == shape[1] if reads else unit == 1 and self.width(slot) == shape[0]
        outputs = self._resized(behind, site, site.outputs) if behind else ()
        return LayerInterface(path, site.operation, tuple(shape), outputs, bias, 0 if usual else unit)

    def weight_shape(self, path: str) -> tuple[int, ...]:
        """Shape of the weight of a site, all blocks together."""
        return _weight_shape(self.layer(path))

    def _settled_shape(self, shape: tuple[int, ...], slot: str | None) -> tuple[int, ...]:
        return shape if slot is None else _with_channels(shape, self.settled_width(slot))

    def _slot_before(self, path: str) -> str | None:
        """WIDTH slot of the channels that enter a span: read by the first of its layers."""
        inside = [site for name, site in self.analysis.sites.items() if name == path or name.startswith(f"{path}.")]
        channels = channels_of(self.analysis.spans[f"span:{path}"].input_shape)
        for site in inside:
            if site.inputs:
                fits = site.in_slot is not None and self.analysis.slots[site.in_slot].width == channels
                return site.in_slot if fits else None
        return None

    def _slot_behind(self, path: str) -> str | None:
        """WIDTH slot of the channels that leave a span: written by the last of its layers."""
        inside = [site for name, site in self.analysis.sites.items() if name == path or name.startswith(f"{path}.")]
        channels = channels_of(self.analysis.spans[f"span:{path}"].output_shape)
        for site in reversed(inside):
            if site.inputs:
                fits = site.out_slot is not None and self.analysis.slots[site.out_slot].width == channels
                return site.out_slot if fits else None
        return None

    def changes(self) -> list[LayerChange]:
        """Layers that were widened so far, in forward order."""
        return [
            LayerChange(path, site.operation.value, self._original[path], self.weight_shape(path))
            for path, site in self.analysis.sites.items()
            if self.weight_shape(path) != self._original[path]
        ]

    # -------------------------------------------------- growing

    def _touched(self, slot: str) -> list[str]:
        return [path for path, site in self.analysis.sites.items() if site.reads(slot) or site.writes(slot)]

    def widen(self, seed: str, slot: str, size: int, draw: Draw | None) -> None:
        """Add ``size`` channels to a slot; the output is unchanged. All layers grow, or none does."""
        try:
            for path in self._touched(slot):
                self._grow(self.analysis.sites[path], seed=seed, slot=slot, size=size, draw=draw)
        except BaseException:
            self._strip(seed, slot)
            raise
        self.grafts[seed] = Graft(seed, slot, size)

    def _grow(self, site: Site, *, seed: str, slot: str, size: int, draw: Draw | None) -> None:
        path = site.path
        if path not in self._layers:
            place = self._site_place(path)
            layer = grown_at(site, place.get(), self.settled_width)
            place.put(layer)
            self._layers[path] = layer
        layer = self._layers[path]
        if site.reads(slot):
            layer.grow_inputs(seed, size, slot)
        if site.writes(slot):
            layer.grow_outputs(seed, size, draw, slot)

    def bridge(self, seed: str, slot: str, size: int, bridge: Bridge) -> None:
        """Put a bridge, made around what :meth:`spanned` returned, in its place."""
        self._places[self.analysis.spans[slot].path].put(bridge)
        self.grafts[seed] = Graft(seed, slot, size, bridge)

    def spanned(self, slot: str) -> nn.Module:
        """The module that stands at a SPAN, older branches included."""
        return self._places[self.analysis.spans[slot].path].get()

    def remove(self, seed: str) -> None:
        """Take a seed out: exactly the network without it, at its present weights."""
        graft = self.grafts.pop(seed)
        if graft.bridge is None:
            self._strip(seed, graft.slot)
            return
        place = self._places[self.analysis.spans[graft.slot].path]
        while (module := place.get()) is not graft.bridge:
            place = ModulePlace(module, "host")
        place.put(graft.bridge.host)

    def _strip(self, seed: str, slot: str) -> None:
        for path in self._touched(slot):
            layer = self._layers.get(path)
            if layer is not None:
                layer.remove(seed)
                self._unwrap(path, layer)

    def _unwrap(self, path: str, layer: GrownLayer) -> None:
        if not layer.seeds:
            self._site_place(path).put(layer.host)
            del self._layers[path]

    def absorb(self, seed: str) -> list[Replacement]:
        """Fuse the oldest widening of a slot into plain layers of the host."""
        graft = self.grafts.pop(seed)
        replaced: list[Replacement] = []
        for path in self._touched(graft.slot):
            layer = self._layers[path]
            replaced += layer.absorb(seed)
            self._unwrap(path, layer)
        self.fused[graft.slot] += graft.size
        return replaced

    def blends(self, slot: str) -> bool:
        """Whether newborn channels of a slot come in by degrees, see :meth:`set_share`."""
        return slot in self.analysis.slots and self.analysis.slots[slot].blended

    def set_share(self, seed: str, share: float) -> None:
        """Let a seed count ``share`` (0..1): a branch in the sum, new channels in the statistics of normalizations."""
        graft = self.grafts[seed]
        if graft.bridge is not None:
            graft.bridge.set_share(share)
            return
        for path in self.analysis.slots[graft.slot].followers:
            self._layers[path].set_share(seed, share)

    def probes(self, slot: str) -> list[tuple[nn.Module, int, int, int]]:
        """What reads a WIDTH slot.

        Returns:
            For each: the layer, where the channels begin among its inputs, how many inputs they take, and how many
            consecutive ones are one feature at several positions.
        """
        found = []
        unit = self.analysis.slots[slot].unit
        for path in self.analysis.slots[slot].readers:
            start = 0
            for part in self.analysis.sites[path].inputs:
                entries = part.entries(self.width)
                if part.slot == slot:
                    found.append((self.layer(path), start, entries, max(1, part.factor // unit)))
                start += entries
        return found

    @contextmanager
    def without(self, seeds: Iterable[str]) -> Iterator[None]:
        """Exactly the network without some seeds, as long as the context lasts."""
        chosen = frozenset(seeds)
        layers = [(layer, layer.off) for layer in self._layers.values()]
        bridges = [(g.bridge, g.bridge.off) for s, g in self.grafts.items() if g.bridge is not None and s in chosen]
        try:
            for layer, off in layers:
                layer.off = off | chosen
            for bridge, _ in bridges:
                bridge.off = True
            yield
        finally:
            for layer, off in layers:
                layer.off = off
            for bridge, was_off in bridges:
                bridge.off = was_off

    # -------------------------------------------------- putting back

    def reset(self, fused: Mapping[str, int]) -> None:
        """Take out every seed and give the host's layers the widths they had once ``fused`` channels were in.

        Layers that already have their shape keep their Parameters; others get fresh ones, to be loaded.
        """
        for seed in reversed(list(self.grafts)):
            self.remove(seed)
        self.fused = {slot: fused.get(slot, 0) for slot in self.analysis.slots}
        for path, site in self.analysis.sites.items():
            place = self._site_place(path)
            original = self._original[path]
            outputs, inputs = (
                sum(part.entries(self.settled_width) for part in parts) if parts else None
                for parts in (site.outputs, site.inputs)
            )
            place.put(with_shape(place.get(), original[0] if outputs is None else outputs, inputs, site.axis))


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, GrownLayer):
        return layer.shape()
    return tuple(cast("Tensor", layer.weight).shape)


def _with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    return (channels, *shape[1:]) if len(shape) == 3 else (*shape[:-1], channels)

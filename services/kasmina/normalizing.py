"""Normalizations that grow.

Batch normalization treats channels one by one: newborns have gain 1 and running statistics of their own. A
normalization over all channels (LayerNorm, RMSNorm, GroupNorm of one group) would change what the host computes as soon
as newborn channels count in its statistics: there each seed has a share, 0 at birth, by which its channels are weighed.
At share 0 the host's channels come out as they did, at share 1 the layer is the plain one of the new width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.kasmina.widening import HOST, Block, Draw, GrownVector, Side

NEWBORN_MOMENTUM_FACTOR = 3.0
"""Newborn normalization statistics move this much faster than the host's, until they are fused."""

_STATISTICS = ("running_mean", "running_var")


class GrownBatchNorm(GrownVector):
    """A widened batch normalization: newborn channels have gain 1 and running statistics of their own."""

    def _norm(self) -> nn.BatchNorm2d:
        return cast("nn.BatchNorm2d", self.host)

    def _statistics(self, name: str, block: Block) -> Tensor:
        if block.name != HOST:
            return cast("Tensor", getattr(self, f"{name}:{block.name}"))
        return cast("Tensor", getattr(self.host, name)).narrow(0, block.start, block.size)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, ...] to the same shape; in training mode the running statistics of active channels move."""
        host, blocks = self._norm(), self.outputs.blocks(self.off)
        mean, variance = (torch.cat([self._statistics(name, block) for block in blocks]) for name in _STATISTICS)
        momentum = cast("float", host.momentum)
        gain, shift = self.joined("weight"), self.joined("bias")
        outputs = F.batch_norm(inputs, mean, variance, gain, shift, self.training, momentum, host.eps)
        if self.training:
            cast("Tensor", host.num_batches_tracked).add_(1)
            self._write_back("running_mean", mean, blocks, momentum)
            self._write_back("running_var", variance, blocks, momentum)
        return outputs

    @torch.no_grad()
    def _write_back(self, name: str, updated: Tensor, blocks: Sequence[Block], momentum: float) -> None:
        # One call normalizes all channels with the host's momentum; newborn ones go on in the same direction.
        speed = min(NEWBORN_MOMENTUM_FACTOR, 1.0 / momentum) if momentum > 0 else 1.0
        for block, value in zip(blocks, torch.split(updated, [block.size for block in blocks]), strict=True):
            target = self._statistics(name, block)
            if block.name == HOST:
                target.copy_(value)
            else:
                target.add_(value - target, alpha=speed)

    def newborn(self, name: str, live: Tensor, shape: Sequence[int], draw: Draw | None) -> Tensor:
        """Gain 1, shift 0; nothing is drawn."""
        del draw
        return live.new_full(tuple(shape), float(name == "weight"))

    def _grow_buffers(self, block: Block) -> None:
        mean = cast("Tensor", self._norm().running_mean)
        self.register_buffer(f"running_mean:{block.name}", mean.new_zeros(block.size))
        self.register_buffer(f"running_var:{block.name}", mean.new_ones(block.size))

    def _absorb_buffers(self, seed: str) -> dict[str, Tensor | None]:
        blocks = self.outputs.blocks(frozenset(self.outputs.seeds) - {seed})
        return {name: torch.cat([self._statistics(name, block) for block in blocks]) for name in _STATISTICS}


class GrownOverChannels(GrownVector):
    """A widened normalization over channels; abstract. Subclasses say over which dimensions, and their plain form."""

    def __init__(self, host: nn.Module, outputs: Side | None = None) -> None:
        super().__init__(host, outputs)
        self._shares: dict[str, float] = {}

    def newborn(self, name: str, live: Tensor, shape: Sequence[int], draw: Draw | None) -> Tensor:
        """Gain 1, shift 0; nothing is drawn."""
        del draw
        return live.new_full(tuple(shape), float(name == "weight"))

    def grow_outputs(self, seed: str, size: int, draw: Draw | None, slot: str | None = None) -> None:
        """Add ``size`` channels that do not count yet."""
        super().grow_outputs(seed, size, draw, slot)
        self.register_buffer(f"alpha:{seed}", cast("Tensor", self._own("weight")).new_zeros(()))
        self._shares[seed] = 0.0

    def set_share(self, seed: str, share: float) -> None:
        """Let a seed's channels count ``share`` (0..1) in the statistics."""
        cast("Tensor", self._buffers[f"alpha:{seed}"]).fill_(share)
        self._shares[seed] = share

    def remove(self, seed: str) -> None:
        """Take out a seed's channels and its share."""
        super().remove(seed)
        self._shares.pop(seed, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape of the inputs; statistics over active channels, each weighed by its seed's share."""
        if all(share == 1.0 for seed, share in self._shares.items() if seed not in self.off):
            return self._plain(inputs, self.joined("weight"), self.joined("bias"))
        gain, shift = cast("Tensor", self.joined("weight")), self.joined("bias")
        values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
        blocks = self.outputs.blocks(self.off)
        shares = torch.cat([self._weights(block, values.dtype) for block in blocks])
        outputs = self._normalized(values, shares / shares.sum(), gain, shift)
        # As torch's own: in full precision under autocast, else in that of the inputs.
        return outputs if torch.is_autocast_enabled(inputs.device.type) else outputs.to(inputs.dtype)

    def _weights(self, block: Block, dtype: torch.dtype) -> Tensor:
        alpha = cast("Tensor", self._own("weight")).new_ones(()) if block.name == HOST else self._alpha(block.seed)
        return alpha.to(dtype).expand(block.size)

    def _alpha(self, seed: str) -> Tensor:
        return cast("Tensor", self._buffers[f"alpha:{seed}"])

    def _plain(self, inputs: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _normalized(self, values: Tensor, shares: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        raise NotImplementedError


class GrownLayerNorm(GrownOverChannels):
    """A widened :class:`torch.nn.LayerNorm` over one dimension, [..., C]."""

    def _plain(self, inputs: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.layer_norm(inputs, (inputs.shape[-1],), gain, shift, cast("nn.LayerNorm", self.host).eps)

    def _normalized(self, values: Tensor, shares: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        centered = values - (values * shares).sum(-1, keepdim=True)
        variance = (centered.square() * shares).sum(-1, keepdim=True)
        normalized = centered * torch.rsqrt(variance + cast("nn.LayerNorm", self.host).eps) * gain
        return normalized if shift is None else normalized + shift


class GrownRMSNorm(GrownOverChannels):
    """A widened :class:`torch.nn.RMSNorm` over one dimension, [..., C]."""

    names = ("weight",)

    def _plain(self, inputs: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        del shift
        return F.rms_norm(inputs, (inputs.shape[-1],), gain, cast("nn.RMSNorm", self.host).eps)

    def _normalized(self, values: Tensor, shares: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        del shift
        eps = cast("nn.RMSNorm", self.host).eps
        floor = torch.finfo(values.dtype).eps if eps is None else eps
        return values * torch.rsqrt((values.square() * shares).sum(-1, keepdim=True) + floor) * gain


class GrownSingleGroupNorm(GrownOverChannels):
    """A widened :class:`torch.nn.GroupNorm` of one group, [N, C, ...]: over all channels and positions."""

    def _plain(self, inputs: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
        return F.group_norm(inputs, 1, gain, shift, cast("nn.GroupNorm", self.host).eps)

    def _normalized(self, values: Tensor, shares: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        column = (-1, *(1 for _ in values.shape[2:]))
        every = tuple(range(1, values.dim()))
        weights = shares.reshape(column) / values[0, 0].numel()
        centered = values - (values * weights).sum(every, keepdim=True)
        variance = (centered.square() * weights).sum(every, keepdim=True)
        normalized = centered * torch.rsqrt(variance + cast("nn.GroupNorm", self.host).eps) * gain.reshape(column)
        return normalized if shift is None else normalized + shift.reshape(column)


class GrownGroupNorm(GrownVector):
    """A widened :class:`torch.nn.GroupNorm` of several groups: newborn channels form groups of their own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, C, ...] to the same shape, in groups of the host's size."""
        host = cast("nn.GroupNorm", self.host)
        groups = inputs.shape[1] * host.num_groups // host.num_channels
        return F.group_norm(inputs, groups, self.joined("weight"), self.joined("bias"), host.eps)

    def newborn(self, name: str, live: Tensor, shape: Sequence[int], draw: Draw | None) -> Tensor:
        """Gain 1, shift 0; nothing is drawn."""
        del draw
        return live.new_full(tuple(shape), float(name == "weight"))

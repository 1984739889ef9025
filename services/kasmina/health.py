"""How much of its width a slot uses, measured by looking at what its readers read.

Effective rank is exp(entropy of the eigenvalues) of the channels' correlation matrix (Roy & Vetterli, "The
effective rank: a measure of effective dimensionality", EUSIPCO 2007); the participation ratio is
(sum of eigenvalues)^2 / (sum of their squares) of the covariance. Both are taken after the activation, over
all positions of the sample, in evaluation mode, forward only. Positions of one image are correlated, so images
count as samples: fewer than twenty per channel are no measurement.

Where a channel is a unit of several entries (a head of an attention, a group of a normalization), the ranks are those
of all entries of all units, divided by the entries of one. Taking a unit's entries for positions instead would
correlate the j-th entry of one head with the j-th of another, although each head may rotate its entries as it likes:
the figure would depend on a basis that means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from services.kasmina.graph import undisturbed
from services.kasmina.model import HealthReport, SlotHealth
from services.kasmina.widening import GrownLinear

SAMPLES_PER_CHANNEL = 20
"""Images that a measurement needs for each channel."""

_LINEAR = (nn.Linear, GrownLinear)

_DEAD_RATIO = 1e-8
"""A channel that varies less than this share of the mean variance is dead: it has no direction of its own."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What reads a slot's channels.

    Attributes:
        module: The layer.
        start: Where the channels begin among its inputs.
        entries: How many of its inputs they take.
        factor: How many consecutive inputs are one feature at several positions.
        axis: Dimension of the channels among its inputs; ``None``: that of a layer of its kind.
    """

    module: nn.Module
    start: int
    entries: int
    factor: int
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Where a slot's channels are looked at.

    Attributes:
        slot: Name of the slot.
        width: Its channels.
        readers: What reads them.
        writers: Weights that write them; their gradients are looked at.
        unit: Features per channel.
    """

    slot: str
    width: int
    readers: Sequence[Reader]
    writers: Sequence[nn.Parameter] = ()
    unit: int = 1


@dataclass(slots=True)
class _Moments:
    """Running first and second moments of the features that one reader reads; double precision."""

    reader: Reader
    width: int
    positions: int = 0
    total: Tensor | None = None
    products: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take in what a reader reads: [N, C, ...] of a convolution or [..., C * factor] of a linear layer."""
        axis = self.reader.axis
        if axis is None:
            axis = values.dim() - 1 if isinstance(self.reader.module, _LINEAR) else 1
        channels = values.detach().narrow(axis, self.reader.start, self.reader.entries).double().movedim(axis, 0)
        if self.reader.factor > 1:
            channels = channels.reshape(self.width, self.reader.factor, *channels.shape[1:])
        channels = channels.reshape(self.width, -1)
        products, total = channels @ channels.T, channels.sum(1)
        self.products = products if self.products is None else self.products + products
        self.total = total if self.total is None else self.total + total
        self.positions += channels.shape[1]

    def covariance(self) -> Tensor | None:
        """Covariance of the channels, [C, C]; ``None`` if nothing was seen or something is not finite."""
        if self.total is None or self.products is None:
            return None
        mean = self.total / self.positions
        covariance = self.products / self.positions - torch.outer(mean, mean)
        return covariance if bool(torch.isfinite(covariance).all()) else None


@dataclass(slots=True)
class _Watch:
    probe: Probe
    moments: list[_Moments] = field(default_factory=list)


def spectrum(covariance: Tensor) -> tuple[float | None, float | None, float]:
    """Effective rank, participation ratio and dead ratio of channels with this covariance, [C, C].

    Ranks are ``None`` where no channel varies. Dead channels are left out of the correlation, where they would
    count as full directions.
    """
    variance = covariance.diagonal().clamp(min=0)
    floor = float(variance.mean()) * _DEAD_RATIO
    living = variance > floor
    dead_ratio = 1.0 - float(living.double().mean())
    if not bool(living.any()):
        return None, None, dead_ratio
    deviation = variance[living].sqrt()
    kept = covariance[living][:, living]
    eigenvalues = torch.linalg.eigvalsh(kept / torch.outer(deviation, deviation)).clamp(min=0)
    shares = eigenvalues / eigenvalues.sum()
    shares = shares[shares > 0]
    effective_rank = float(torch.exp(-(shares * shares.log()).sum()))
    participation = float(kept.trace().square() / kept.square().sum())
    return effective_rank, participation, dead_ratio


def measure(
    model: nn.Module,
    batches: Iterable[Tensor],
    probes: Sequence[Probe],
    *,
    flops_per_sample: float,
    gradient_norms: bool = True,
) -> HealthReport:
    """Look at every slot on the same batches.

    Hooks are there only while this runs. Weights, buffers, training flags and random streams are as before
    afterwards.

    Args:
        model: The network.
        batches: Inputs, the first dimension is the batch.
        probes: Slots to look at.
        flops_per_sample: Forward FLOPs of the network per sample, for the bill.
        gradient_norms: Also report the norm of the gradients that the last backward pass left.
    """
    watches = [
        _Watch(probe, [_Moments(reader, probe.width * probe.unit) for reader in probe.readers]) for probe in probes
    ]
    norms = {probe.slot: _gradient_norm(probe.writers) if gradient_norms else None for probe in probes}
    handles = [
        moments.reader.module.register_forward_pre_hook(_collector(moments))
        for watch in watches
        for moments in watch.moments
    ]
    samples = 0
    try:
        for batch in batches:
            with undisturbed(model, batch.device):
                model(batch)
            samples += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    slots = tuple(_judge(watch, samples, norms[watch.probe.slot]) for watch in watches)
    spent = flops_per_sample * samples
    spent += sum(2.0 * m.width**2 * m.positions + 10.0 * m.width**3 for watch in watches for m in watch.moments)
    return HealthReport(slots, spent, samples)


def _collector(moments: _Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def collect(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        moments.add(inputs[0])

    return collect


def _gradient_norm(writers: Sequence[nn.Parameter]) -> float | None:
    gradients = [parameter.grad for parameter in writers if parameter.grad is not None]
    if not gradients:
        return None
    return float(torch.stack([gradient.detach().float().norm() for gradient in gradients]).norm())


def _judge(watch: _Watch, samples: int, gradient_norm: float | None) -> SlotHealth:
    probe = watch.probe
    features = probe.width * probe.unit
    needed = SAMPLES_PER_CHANNEL * features
    # A slot with several readers is in need if one of them finds it full.
    best: tuple[float | None, float | None, float | None] = (None, None, None)
    reason = ""
    if samples < needed:
        reason = f"{samples} images are too few for {features} channels, which need {needed}"
    else:
        for moments in watch.moments:
            covariance = moments.covariance()
            if covariance is None:
                reason = reason or "activations are not finite, or its reader did not run"
                continue
            found = spectrum(covariance)
            if (found[0] is not None and (best[0] is None or found[0] > best[0])) or best[2] is None:
                best = found
        if best[0] is None and not reason:
            reason = "no channel varies on the sample"
    rank, participation, dead = best
    rank, participation = (None if value is None else value / probe.unit for value in (rank, participation))
    utilization = None if rank is None else rank / probe.width
    return SlotHealth(
        slot=probe.slot,
        width=probe.width,
        effective_rank=rank,
        participation_ratio=participation,
        utilization=utilization,
        dead_ratio=dead,
        gradient_norm=gradient_norm,
        samples=samples,
        unmeasured_reason="" if rank is not None else reason,
    )

"""What the runs of a protocol will cost on this machine: steps are timed, the rest is counted (``--estimate``)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from torch.nn import functional as F

from services.tolaria.data import splits
from services.tolaria.data.batches import Batches
from services.tolaria.data.splits import DataSet
from tests.benchmarks.growth import hosts, training
from tests.benchmarks.growth.arms import ARMS, Unit
from tests.benchmarks.growth.protocol import Entry, Protocol

_STEPS: Final = 12
#: What growth costs beside its training, as a share of it (measured on the balanced host: 5.5 %).
_GROWTH: Final = 1.06
_EVALUATION: Final = 1 / 3


def table(protocol: Protocol, data_dir: Path) -> Iterator[tuple[str, int, float]]:
    """Entry, number of runs, CPU seconds of all of them."""
    training.settle()
    for name, entry in protocol.entries.items():
        unit = Unit(name, entry.arms[0], entry.seeds[0])
        config = training.config_of(entry, unit, data_dir, policy="policies/utilization@1", factor={})
        data = splits.load(config.data, unit.seed)
        batches = Batches(data.training, data.normalization, config.data, unit.seed)
        own, wide = _widths(entry, data)
        host, grown = (_step_seconds(entry, widths, data, batches) for widths in (own, wide))
        ratio = hosts.forward_flops(entry, wide, data) / hosts.forward_flops(entry, own, data)
        # Validation after every epoch: a forward pass of its images.
        epoch = 1 + _EVALUATION * len(data.validation) / len(data.training)
        steps = entry.recipe.epochs * batches.per_epoch * epoch
        yield (
            name,
            len(entry.arms) * len(entry.seeds),
            len(entry.seeds) * sum(steps * _cost(arm, host, grown, ratio) for arm in entry.arms),
        )


def _cost(arm: str, host: float, grown: float, ratio: float) -> float:
    """Seconds per step of a run of the recipe's length that costs as much as this arm's."""
    if ARMS[arm].kind == "static" and ARMS[arm].shape == "host":
        return host * (ratio * _GROWTH if ARMS[arm].length == "flops" else 1)
    return host if ARMS[arm].policy is None and ARMS[arm].kind == "grown" else grown * _GROWTH


def _widths(entry: Entry, data: DataSet) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The host's, and such as the budget allows: where it is in parameters, all layers by one factor."""
    own = entry.network.widths
    if entry.growth.target_widths is not None:
        return own, entry.growth.target_widths
    wide, factor = own, 1.0
    while hosts.parameters(entry, wide, data) < (entry.growth.target_parameters or 0):
        factor += 0.1
        wide = tuple(round(width * factor) for width in own)
    return own, wide


def _step_seconds(entry: Entry, widths: tuple[int, ...], data: DataSet, batches: Batches) -> float:
    """Median CPU seconds of a step, its batch included."""
    model, spent = hosts.build(entry, widths, data, 0), []
    for step in range(_STEPS):
        began = time.thread_time()
        batch = batches.at(0, step % batches.per_epoch)
        F.cross_entropy(model(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]  # torch
        spent.append(time.thread_time() - began)
    return statistics.median(spent)

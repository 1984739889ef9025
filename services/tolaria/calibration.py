"""Takes steps of the host and of wider hosts on the run's device, before training, to learn what width costs in time.

The networks are thrown away; the run's generators, its data order and its network are as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from services.blueprints.spec import SlotKind
from services.chassis.config.schema import EsperConfig
from services.kasmina.engine import GrowthEngine
from services.tolaria.data.batches import Batches
from services.tolaria.data.splits import DataSet
from services.tolaria.latency import LatencyModel, Step, compare, fit
from services.tolaria.optimizer import GrowingOptimizer
from services.tolaria.schedule import Schedule
from services.tolaria.task import Objective

_WEIGHT_SPREAD = 0.05


def measure(
    *,
    config: EsperConfig,
    data: DataSet,
    objective: Objective,
    build_host: Callable[[], nn.Module],
    precision: Callable[[], contextlib.AbstractContextManager[object]],
    device: torch.device,
) -> LatencyModel:
    """Fit the latency of a training step: half a second or five pairs of steps for each slot, whichever is more."""
    batch = Batches(data.training, data.normalization, config.data, config.run.seed).at(0, 0)

    def network(extra: Mapping[str, int]) -> tuple[GrowthEngine, Step]:
        model = build_host().to(device).train()
        engine = GrowthEngine(
            model, batch.images[:2], run="calibration", settings=config.growth, outputs=data.classes, seed=0
        )
        if extra:
            engine.reshape(extra)
            _fill(model)
        optimizer = GrowingOptimizer(config.training.optimizer, Schedule.of(config.training.optimizer, 10**6))
        optimizer.sync(engine.parameter_groups())

        def step() -> None:
            with precision():
                loss = objective.step(model, batch.images, batch.labels)
            # Waited for, as training waits for the governor's look at it.
            float(loss.detach())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
            optimizer.step(0)
            if device.type == "cuda":  # pragma: no cover  # tests have no GPU
                torch.cuda.synchronize(device)

        return engine, step

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        engine, host = network({})
        widths = {slot.name: slot.width for slot in engine.slots() if slot.kind is SlotKind.WIDTH}
        alone = {slot: compare(host, network({slot: width})[1]) for slot, width in widths.items()}
        together = compare(host, network(widths)[1])
        return fit(engine.cost_terms(), widths, alone, together)


def _fill(model: nn.Module) -> None:
    """Ordinary numbers everywhere: what happens to be in fresh memory may be slow to count with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.empty(parameter.shape).normal_(0.0, _WEIGHT_SPREAD, generator=generator)
            parameter.copy_(values)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.fill_(1.0)

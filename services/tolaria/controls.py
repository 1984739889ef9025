"""What growth is compared with; each control touches the test set once, at its own end.

``host``     the same host without growth; with ``model.weights``, the trained host trained on
``bigger``   the run's final shape, trained from scratch
``uniform``  grown at the same moments to the same cost, every layer by the same factor: nothing is measured

All go through the same trainer on the same batches (the generators of data order and augmentation depend on the run's
seed alone). ``host`` and ``bigger`` train for as many epochs as the run, or until they have spent as many FLOPs as it,
growth's own included (``compare_at``); their schedules are fitted to that length. ``uniform`` takes as many steps as
the run and, growing like it, spends nearly the same; its kernels may be compiled already, so it waits at
least as long as the run waited for its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from services.chassis.config.schema import BudgetConfig, EsperConfig
from services.tolaria import rebuild
from services.tolaria.accounting import TRAINING_FACTOR
from services.tolaria.seeds import derive

ControlName = Literal["host", "bigger", "uniform"]


def config_for(name: ControlName, config: EsperConfig, *, host_flops: int, final_flops: int) -> EsperConfig:
    """The run's configuration with what control ``name`` changes; FLOPs are forward FLOPs of one sample."""
    if name == "bigger":
        # From scratch, whatever the run began with.
        return config.model_copy(update={"model": config.model.model_copy(update={"weights": None})})
    if name == "uniform":
        growth = {"policy": "uniform", "enabled": config.growth.enabled and final_flops > host_flops}
        if growth["enabled"]:
            growth["budget"] = BudgetConfig(flops=final_flops / host_flops)
        return config.model_copy(update={"growth": config.growth.model_copy(update=growth)})
    return config


def builder(
    name: ControlName, build_host: Callable[[], nn.Module], changes: Sequence[Mapping[str, Any]], seed: int
) -> Callable[[], nn.Module]:
    """How to make a fresh network of control ``name``; ``seed`` is the run's root seed.

    Raises ValueError from the builder for changes that :mod:`services.tolaria.rebuild` cannot follow.
    """
    if name != "bigger":
        return build_host

    def build_bigger() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "initialization", "bigger"))
            return rebuild.grow(build_host(), changes)

    return build_bigger


def steps_for(total_flops: float, forward_flops: int, batch_size: int) -> int:
    """Optimizer steps that cost ``total_flops``, to the nearest step, at least one.

    ``forward_flops`` are those of one sample.
    """
    return max(1, round(total_flops / (TRAINING_FACTOR * forward_flops * batch_size)))

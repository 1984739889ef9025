"""What a run has spent. FLOPs are counted by formula, never by running something; multiply-add is 2."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

#: Forward and backward of one sample cost three forward passes (two of them are the backward).
TRAINING_FACTOR = 3
#: Where the FLOPs of a run went, as its summary tells it. ``culled_seeds`` (what seeds that were not kept added to the
#: steps) and ``discarded`` (steps that were taken back) are parts of ``training``, what rewound seeds added is in both;
#: ``health`` and ``counterfactuals`` are ``growth``; ``total`` is training, growth and validation.
FLOPS: Final = (
    "training",
    "culled_seeds",
    "discarded",
    "growth",
    "health",
    "counterfactuals",
    "validation",
    "total",
)


#: What a summary tells of the growth budget: its kind, its limit, the host's cost and that of the network in the end.
BUDGET: Final = ("kind", "limit", "host", "final")
#: What a summary tells of Kasmina's kernel cache.
CACHE: Final = (
    "hits",
    "misses",
    "hit_ratio",
    "evictions",
    "entries",
    "size_bytes",
    "limit_bytes",
    "load_seconds",
    "verify_seconds",
)


@dataclass
class Account:
    """What one arm has spent so far; a resumed run goes on from its checkpoint.

    ``training_flops`` are those of all optimizer steps, seeds included, and ``discarded_flops`` the part of them that
    rollbacks and rewinds took back; ``growth_flops`` those of measuring slots (``health_flops``) and of
    counterfactuals;
    ``validation_flops`` what a run without growth spends on validation as well.
    CPU times are of the training thread, seconds; ``growth_cpu_seconds`` is part of ``cpu_seconds``;
    ``growth_seconds`` is its wall clock.
    """

    training_flops: float = 0.0
    discarded_flops: float = 0.0
    growth_flops: float = 0.0
    health_flops: float = 0.0
    validation_flops: float = 0.0
    cpu_seconds: float = 0.0
    growth_cpu_seconds: float = 0.0
    growth_seconds: float = 0.0

    def bill_steps(self, forward_flops: int, samples: int) -> None:
        """One optimizer step on ``samples`` at ``forward_flops`` each."""
        self.training_flops += float(TRAINING_FACTOR * forward_flops * samples)

    def bill_health(self, flops: float) -> None:
        """A measurement of the slots."""
        self.health_flops += flops
        self.growth_flops += flops

    def bill_counterfactual(self, flops: float) -> None:
        """An evaluation that only growth needs."""
        self.growth_flops += flops

    def discard_since(self, earlier: Mapping[str, float]) -> None:
        """The steps since the account's state was ``earlier`` are taken back: spent all the same."""
        # Not what was taken back before, or a step lost twice over would be counted twice.
        self.discarded_flops = earlier["discarded_flops"] + self.training_flops - earlier["training_flops"]

    def state(self) -> dict[str, float]:
        """As JSON, for the checkpoint."""
        return asdict(self)


def breakdown(arm: Mapping[str, Any], culled: float) -> dict[str, float]:
    """:data:`FLOPS` of an arm that is finished; ``culled`` are those of seeds that were not kept."""
    training, growth, health, validation = (
        float(arm[f"{name}_flops"]) for name in ("training", "growth", "health", "validation")
    )
    parts = (training, culled, float(arm["discarded_flops"]), growth, health, growth - health, validation)
    return dict(zip(FLOPS, (*parts, training + growth + validation), strict=True))


@dataclass(frozen=True, slots=True)
class Lap:
    """What passed: on the wall, and of it on this thread's processor."""

    seconds: float
    cpu_seconds: float


class LapClock:
    """Time since the last look."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), time.thread_time()

    def lap(self) -> Lap:
        """What passed since the last call."""
        before, self._last = self._last, (time.perf_counter(), time.thread_time())
        return Lap(self._last[0] - before[0], self._last[1] - before[1])

"""What a run has spent. FLOPs are counted by formula, never by running something; multiply-add is 2."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

#: Forward and backward of one sample cost three forward passes (two of them are the backward).
TRAINING_FACTOR = 3


@dataclass
class Account:
    """What one arm has spent so far; a resumed run goes on from its checkpoint.

    ``training_flops`` are those of all optimizer steps, seeds included; ``growth_flops`` those of scoring,
    counterfactuals and extra validation; ``validation_flops`` what a run without growth spends on validation as well.
    CPU times are of the training thread, seconds; ``growth_cpu_seconds`` is part of ``cpu_seconds``;
    ``growth_seconds`` is its wall clock.
    """

    training_flops: float = 0.0
    growth_flops: float = 0.0
    validation_flops: float = 0.0
    cpu_seconds: float = 0.0
    growth_cpu_seconds: float = 0.0
    growth_seconds: float = 0.0

    def bill_steps(self, forward_flops: int, samples: int) -> None:
        """One optimizer step on ``samples`` at ``forward_flops`` each."""
        self.training_flops += float(TRAINING_FACTOR * forward_flops * samples)

    def state(self) -> dict[str, float]:
        """As JSON, for the checkpoint."""
        return asdict(self)


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

"""The learning rate as a function of the step and of a group's birth: no state, so resume and growth cannot bend it.

torch's schedulers break or compound when groups are added; ours is asked anew at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.chassis.config.schema import OptimizerConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up over ``warmup_steps``, linear decay to 0 at ``total_steps``, and a newborn's own warm-up."""

    peak: float
    total_steps: int
    warmup_steps: int
    newborn_warmup_steps: int

    @staticmethod
    def of(config: OptimizerConfig, total_steps: int) -> Schedule:
        """The schedule of a run of ``total_steps`` optimizer steps."""
        return Schedule(
            peak=config.learning_rate,
            total_steps=total_steps,
            warmup_steps=round(config.warmup_ratio * total_steps),
            newborn_warmup_steps=config.newborn_warmup_steps,
        )

    def rate(self, step: int, birth_step: int = 0) -> float:
        """Learning rate of optimizer step ``step`` (from 0) for parameters born at ``birth_step`` (0: the host)."""
        if step < self.warmup_steps:
            share = (step + 1) / self.warmup_steps
        else:
            share = (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps)
        age = step - birth_step
        if birth_step > 0 and age < self.newborn_warmup_steps:
            share *= (age + 1) / self.newborn_warmup_steps
        return self.peak * share

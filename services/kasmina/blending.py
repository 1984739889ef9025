"""How alpha goes from 0 to 1: schedules as pure functions of what was recorded, so that a resumed run repeats them.

* ``fixed``: a straight ramp over ``growth.blend_steps``.
* ``performance``: the same pace, held while the training loss lies above what it was when alpha last advanced by more
  than its noise allows.
* ``drift``: at most the same pace, and in each step the span's output changes by at most a given share of itself.
* ``gradient``: the same pace, held while the loss's gradient at the span's output points along the branch's output,
  that is, while more of the branch would raise the loss.

Both ends are exact: at 0 the branch is not added, 1 is the settled form. All but ``fixed`` end after
``growth.blend.max_steps``: a seed that was not let in by then is culled, because to force it in would break the very
bound that the user chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from services.chassis.config.schema import GrowthConfig

Observed: TypeAlias = Literal["", "change", "agreement"]
"""What a schedule wants to know of the branch in each training step, besides the loss."""

_FAST: Final = 0.2
"""Weight of the newest step in the running means that decide."""
_SLOW: Final = 0.05
"""Weight of the newest step in the mean and variance that the loss is compared with."""
_WARM_STEPS: Final = 10
"""Losses looked at before the first advance: less says nothing of their noise."""
_MIN_RELATIVE_NOISE: Final = 1e-3
"""A loss that hardly moves is not said to rise for less than this share of itself."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen in one training step; ``None`` is unmeasured, and then alpha waits.

    Attributes:
        loss: The task's training loss.
        change: Norm of the branch's output over norm of the span's.
        agreement: Cosine between the branch's output and the direction that lowers the loss, -1..1.
    """

    loss: float | None = None
    change: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class BlendState:
    """Where a blending stands; part of the seed's record, so of every checkpoint.

    Attributes:
        share: Alpha, 0..1.
        advances: Steps in which it advanced at the full pace.
        seen: Steps that were measured.
        recent: Running mean of the last few measurements.
        level: Running mean of the loss while alpha advanced.
        variance: Its running variance.
    """

    share: float = 0.0
    advances: int = 0
    seen: int = 0
    recent: float = 0.0
    level: float = 0.0
    variance: float = 0.0


def observed(settings: GrowthConfig) -> Observed:
    """What the configured schedule wants measured of a branch."""
    wanted: Mapping[str, Observed] = {"drift": "change", "gradient": "agreement"}
    return wanted.get(settings.blend.schedule, "")


def schedule_of(settings: GrowthConfig, *, widening: bool) -> str:
    """The schedule a seed follows; a widening has no output of its own to observe, so it follows a fixed one then."""
    return "fixed" if widening and observed(settings) else settings.blend.schedule


def advance(schedule: str, settings: GrowthConfig, state: BlendState, elapsed: int, seen: Evidence) -> BlendState:
    """The state after one more training step, ``elapsed`` steps after blending began."""
    return _SCHEDULES[schedule](settings, state, elapsed, seen)


def overdue(schedule: str, settings: GrowthConfig, state: BlendState, elapsed: int) -> str | None:
    """Why a seed that is not let in by now never will be; ``None`` as long as it may."""
    if schedule == "fixed" or elapsed < settings.blend.max_steps:
        return None
    why = {
        "performance": "the training loss rose",
        "drift": "its output would have changed the span's too fast",
        "gradient": "more of it would have raised the loss",
    }[schedule]
    return f"alpha was only {state.share:.2f} after {elapsed} steps of blending: {why}"


def _fixed(settings: GrowthConfig, state: BlendState, elapsed: int, seen: Evidence) -> BlendState:
    del seen
    return replace(state, share=1.0 if elapsed >= settings.blend_steps else elapsed / settings.blend_steps)


def _performance(settings: GrowthConfig, state: BlendState, elapsed: int, seen: Evidence) -> BlendState:
    del elapsed
    if seen.loss is None or not math.isfinite(seen.loss):
        return state
    loss = seen.loss
    if state.seen == 0:
        return replace(state, seen=1, recent=loss, level=loss)
    recent = state.recent + _FAST * (loss - state.recent)
    state = replace(state, seen=state.seen + 1, recent=recent)
    # The standard error of a running mean of independent losses.
    noise = math.sqrt(state.variance * _FAST / (2.0 - _FAST))
    allowed = max(settings.blend.noise * noise, _MIN_RELATIVE_NOISE * abs(state.level))
    warm = state.seen >= _WARM_STEPS
    if warm and recent > state.level + allowed:
        # What the loss is compared with stays: a rise must not become the new normal.
        return state
    apart = loss - state.level
    variance = (1.0 - _SLOW) * (state.variance + _SLOW * apart * apart)
    state = replace(state, level=state.level + _SLOW * apart, variance=variance)
    return _one_more(settings, state) if warm else state


def _drift(settings: GrowthConfig, state: BlendState, elapsed: int, seen: Evidence) -> BlendState:
    del elapsed
    if seen.change is None or not math.isfinite(seen.change):
        return state
    pace = 1.0 / settings.blend_steps
    if seen.change * pace <= settings.blend.drift:
        step, advances = pace, state.advances + 1
    else:
        step, advances = settings.blend.drift / seen.change, state.advances
    if advances == settings.blend_steps:
        return replace(state, share=1.0, advances=advances, seen=state.seen + 1)
    share = min(1.0, state.share + step)
    # Sums of the pace may miss 1 by rounding.
    return replace(state, share=1.0 if share > 1.0 - 1e-9 else share, advances=advances, seen=state.seen + 1)


def _gradient(settings: GrowthConfig, state: BlendState, elapsed: int, seen: Evidence) -> BlendState:
    del elapsed
    if seen.agreement is None or not math.isfinite(seen.agreement):
        return state
    recent = seen.agreement if state.seen == 0 else state.recent + _FAST * (seen.agreement - state.recent)
    state = replace(state, seen=state.seen + 1, recent=recent)
    return _one_more(settings, state) if recent >= 0.0 else state


def _one_more(settings: GrowthConfig, state: BlendState) -> BlendState:
    advances = state.advances + 1
    share = 1.0 if advances >= settings.blend_steps else advances / settings.blend_steps
    return replace(state, share=share, advances=advances)


_SCHEDULES: Final[Mapping[str, Callable[[GrowthConfig, BlendState, int, Evidence], BlendState]]] = {
    "fixed": _fixed,
    "performance": _performance,
    "drift": _drift,
    "gradient": _gradient,
}

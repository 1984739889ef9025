"""Watches the loss and says when training has become unstable. It only judges; the trainer restores.

Robust statistics: the median and the median absolute deviation of the last steps do not follow the spike they are to
find, as a mean and a standard deviation would.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from services.chassis.config.schema import GovernorConfig

#: Scales a median absolute deviation to a standard deviation of normal data.
_MAD_TO_SIGMA: Final = 1.4826
#: The deviation is taken for at least this share of the median: a loss that hardly moves must not alarm by a whisker.
_MIN_RELATIVE_SIGMA: Final = 0.02
#: And for at least this share of the loss the run began with: near zero, many times almost nothing is nothing.
_MIN_SIGMA_OF_FIRST: Final = 0.005
#: Explosion: a loss this many times the one the run began with, at once and before there are any statistics. A network
#: that exploded often comes back with dead units and the loss of guessing, which looks calm.
_EXPLOSION: Final = 1000.0
#: Collapse: accuracy back at chance, or above it by no more than this share of it or of what there is to gain, ...
_MARGIN: Final = (1 / 5, 1 / 45)
#: ... after it was above it by more than this share of it or of what there is to gain. The smaller counts: the first
#: where classes are many, the second where they are few (twice as good as a coin is perfect).
_GOOD: Final = (1.0, 1 / 9)
#: And by more than this many deviations of what guesses score: few images are good by luck.
_GOOD_SIGMAS: Final = 4.0


@dataclass(frozen=True, slots=True)
class Instability:
    """Why training is unstable, for people and for the field report."""

    reason: str


@dataclass
class Governor:
    """Judges one arm. ``chance`` is the accuracy of guessing, percent; ``samples`` are those it is measured on."""

    config: GovernorConfig
    chance: float
    samples: int
    #: All rollbacks of the run, callers' too: they are part of its clock. ``asked_for`` are callers' alone.
    rollbacks: int = 0
    asked_for: int = 0
    best_accuracy: float = 0.0
    #: Size of the first loss; None before it.
    _first: float | None = None
    _losses: deque[float] = field(default_factory=deque)
    #: The same in ascending order: this is asked at every step, and sorting the window twice would be felt there.
    _ordered: list[float] = field(default_factory=list)
    _spikes: int = 0

    def observe_loss(self, loss: float) -> Instability | None:
        """Judge the loss of one optimizer step."""
        if not self.config.enabled:
            return None
        if not math.isfinite(loss):
            return Instability(f"the loss is {loss}")
        if self._first is None:
            self._first = abs(loss)
        elif loss > _EXPLOSION * self._first > 0:
            return Instability(f"the loss exploded to {loss:.4g}; it began at {self._first:.4g}")
        if len(self._losses) < self.config.window_steps // 2:
            self._take_in(loss)
            return None
        if (limit := self._limit_below(loss)) is not None:
            # A spike stays out of the window, or the window would get used to it.
            self._spikes += 1
            if self._spikes >= self.config.patience_steps:
                return Instability(f"the loss was above {limit:.4g} for {self._spikes} steps, last {loss:.4g}")
            return None
        self._spikes = 0
        self._take_in(loss)
        return None

    def _limit_below(self, loss: float) -> float | None:
        """The limit of a normal loss if ``loss`` is above it."""
        middle = _median(self._ordered)
        least = max(_MIN_RELATIVE_SIGMA * abs(middle), _MIN_SIGMA_OF_FIRST * (self._first or 0.0))
        if loss <= middle + self.config.spike_sigmas * least:
            # Normal whatever the deviation is: most losses are.
            return None
        sigma = _MAD_TO_SIGMA * _median(sorted(abs(value - middle) for value in self._ordered))
        limit = middle + self.config.spike_sigmas * max(sigma, least)
        return limit if loss > limit else None

    def _take_in(self, loss: float) -> None:
        self._losses.append(loss)
        bisect.insort(self._ordered, loss)
        if len(self._losses) > self.config.window_steps:
            oldest = self._losses.popleft()
            del self._ordered[bisect.bisect_left(self._ordered, oldest)]

    def observe_accuracy(self, accuracy: float) -> Instability | None:
        """Judge a validation accuracy, percent: a fall back to chance is a collapse."""
        best, self.best_accuracy = self.best_accuracy, max(self.best_accuracy, accuracy)
        luck = _GOOD_SIGMAS * math.sqrt(self.chance * (100.0 - self.chance) / self.samples)
        good, gone = self.chance + max(self._above(_GOOD), luck), self.chance + self._above(_MARGIN)
        if self.config.enabled and best > good and accuracy <= gone:
            return Instability(f"validation accuracy fell from {best:.1f} % to {accuracy:.1f} %, which is chance")
        return None

    def _above(self, shares: tuple[float, float]) -> float:
        """The smaller of these shares of chance and of what there is to gain over it, points."""
        of_chance, of_gain = shares
        return min(of_chance * self.chance, of_gain * (100.0 - self.chance))

    @property
    def own_rollbacks(self) -> int:
        """Rollbacks that nobody asked for."""
        return self.rollbacks - self.asked_for

    @property
    def patience_spent(self) -> bool:
        """Whether no further rollback is allowed."""
        return self.own_rollbacks >= self.config.max_rollbacks

    def state(self) -> dict[str, object]:
        """As JSON, for checkpoints and snapshots; counts of rollbacks are not in it: they outlive a rollback."""
        return {
            "losses": list(self._losses),
            "spikes": self._spikes,
            "best_accuracy": self.best_accuracy,
            "first": self._first,
        }

    def restore(self, *, losses: Sequence[float], spikes: int, best_accuracy: float, first: float | None) -> None:
        """The inverse of :meth:`state`."""
        self._first = first
        self._losses = deque(losses)
        self._ordered = sorted(losses)
        self._spikes = spikes
        self.best_accuracy = best_accuracy


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

"""An exponential moving average of the weights, of a network whose parameters come and go.

The average follows the weights as ``average += (1 - decay) * (weight - average)`` after each step (B. Polyak and
A. Juditsky, 1992, in its exponential form). A young average would be mostly the weight it began with, so the decay of
a parameter is at most (1 + age) / (10 + age), its age in steps: newborns are averaged like a host that has just begun.
Running statistics of normalization are averages already and stay the live ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from services.kasmina.model import ParameterGroup, Replacement


class WeightAverage:
    """The averages of one arm. Call :meth:`sync` after every change of the network, before the next step.

    Args:
        decay: Limit of the decay, above 0 and below 1.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._groups: list[ParameterGroup] = []
        self._averages: dict[nn.Parameter, Tensor] = {}

    def sync(self, groups: Sequence[ParameterGroup], replaced: Iterable[Replacement] = ()) -> None:
        """Average ``groups`` from now on: newborns begin with their weights, fused parameters with their parts'."""
        for fusion in replaced:
            average = fusion.new.detach().clone()
            for part, where in fusion.parts:
                if part in self._averages:
                    average[where] = self._averages[part]
            self._averages[fusion.new] = average
        self._groups = list(groups)
        self._averages = {
            parameter: self._averages[parameter] if parameter in self._averages else parameter.detach().clone()
            for group in groups
            for parameter in group.parameters
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights as they are after optimizer step ``step`` (counted from 1)."""
        for group in self._groups:
            age = max(0, step - group.birth_step)
            share = 1.0 - min(self._decay, (1.0 + age) / (10.0 + age))
            for parameter in group.parameters:
                self._averages[parameter].lerp_(parameter, share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the averages inside; afterwards it has its weights again. Nothing is copied."""
        weights = {parameter: parameter.data for parameter in self._averages}
        self.install()
        try:
            yield
        finally:
            for parameter, weight in weights.items():
                parameter.data = weight

    def install(self) -> None:
        """Make the averages the network's weights, for good: training is over."""
        for parameter, average in self._averages.items():
            parameter.data = average

    def state(self) -> dict[str, Tensor]:
        """All averages by ``<group>/<index in the group>``, in the order of the groups."""
        return {name: self._averages[parameter] for name, parameter in self._named()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`, after :meth:`sync` with groups of the same names, order and shapes."""
        for name, parameter in self._named():
            self._averages[parameter] = state[name].clone()

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self._groups:
            for index, parameter in enumerate(group.parameters):
                yield f"{group.name}/{index}", parameter

"""The policies. Adding one is adding its file and its line in ``ALGORITHMS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from services.tamiyo.observation import Observation, Plan
from services.tamiyo.policies import fixed, narrowest, permuted, random, transplant, uniform, utilization
from services.tamiyo.policies.parameters import Estimates, Parameters

__all__ = ["ALGORITHMS", "Algorithm", "Estimates", "Parameters"]


class Algorithm(Protocol):
    """What a policy file offers, as module attributes."""

    DESCRIPTION: str
    DEFAULTS: Mapping[str, object]

    def check(self, parameters: Parameters) -> None:
        """Refuse parameters that make no sense with :class:`EsperError` naming the key."""

    def decide(self, observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
        """A plan: pure, deterministic, with evidence for every slot."""


ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "utilization": utilization,
    "uniform": uniform,
    "random": random,
    "narrowest": narrowest,
    "fixed": fixed,
    "permuted": permuted,
    "transplant": transplant,
}

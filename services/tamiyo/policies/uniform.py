"""Widen every layer by the same factor. The control that any rule for choosing layers has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters
from services.tamiyo.policies.planning import Planner

DESCRIPTION: Final = "Widens all layers by one factor."
DEFAULTS: Final[Mapping[str, object]] = {}


def check(parameters: Parameters) -> None:
    """There is nothing to check: the rule has no parameters."""


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Give the next channel to the slot that has grown least against its host width, within this share."""
    planner = Planner(observation)
    planner.fill(lambda eligible, width: eligible.slot.host_width / (width + 0.5), least=0)

    def explain(slot: SlotView, added: int) -> str:
        return f"all layers by one factor: {slot.width} to {slot.width + added}"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: no channel fits within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen all layers alike: {words}. {planner.spending()}."

    return planner.plan({}, explain, summary, passed_over=lambda slot: "a whole channel does not fit any more")

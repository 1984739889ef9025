"""Widen the narrowest layer: need = 1 / planned width. A control that measures nothing (GROWTH, section 2b)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters
from services.tamiyo.policies.planning import Planner

DESCRIPTION: Final = "Widens the narrowest layers first, without looking at their activations."
DEFAULTS: Final[Mapping[str, object]] = {}


def check(parameters: Parameters) -> None:
    """There is nothing to check: the rule has no parameters."""


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Give channels to the narrowest slot, one at a time, within this decision's share."""
    planner = Planner(observation)
    planner.fill(lambda eligible, width: 1 / width, least=0)

    def explain(slot: SlotView, added: int) -> str:
        return f"narrowest: {slot.width} channels, {added} more"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: no channel fits within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: the narrowest layers. {planner.spending()}."

    needs: dict[str, float | None] = {name: 1 / width for name, width in planner.widths.items()}
    return planner.plan(needs, explain, summary, passed_over=lambda slot: "others are narrower or it costs too much")

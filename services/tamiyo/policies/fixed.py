"""Widen what the parameters say: ``{"plan": {"<slot or its last part>": <new channels per decision>}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.chassis.errors import invalid
from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters
from services.tamiyo.policies.planning import Planner

DESCRIPTION: Final = "Widens the layers its parameters name, as far as the budget goes."
DEFAULTS: Final[Mapping[str, object]] = {"plan": {}}


def check(parameters: Parameters) -> None:
    """Refuse a plan that is no map of slot to a whole number from 1 (EsperError, INVALID_FIELD)."""
    plan = parameters["plan"]
    if not isinstance(plan, Mapping):
        raise invalid("parameters.plan", "it is no map", "give {slot: new channels}")
    for slot, size in plan.items():
        whole = isinstance(size, int) or (isinstance(size, float) and size.is_integer())
        if isinstance(size, bool) or not whole or size < 1:
            raise invalid(f"parameters.plan.{slot}", f"{size!r} is no whole number from 1", "give new channels")


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Add the named channels in the order of the slots' names, each as far as this decision's share goes."""
    planner = Planner(observation)
    plan = parameters["plan"]
    wanted = {str(slot): int(size) for slot, size in plan.items()} if isinstance(plan, Mapping) else {}
    for name in planner.eligible:
        size = wanted.get(name, wanted.get(name.rsplit("/", 1)[-1], 0))
        while planner.widths[name] - planner.eligible[name].slot.width < size and planner.affords(name, 1):
            planner.add(name, 1)

    def explain(slot: SlotView, added: int) -> str:
        return f"the policy's parameters say so: {added} more channels"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: the fixed plan names nothing that fits within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: the fixed plan. {planner.spending()}."

    return planner.plan({}, explain, summary, passed_over=lambda slot: "not in the fixed plan, or it costs too much")

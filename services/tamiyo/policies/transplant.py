"""Widen as another run did: the control for whether a plan fits the network it was measured on or just any.

``{"plans": [{"<slot or its last part>": <new channels>}, ...]}`` holds one map for each decision of the run, the first
decision first. The last map is for the last decision, so that a run with fewer decisions begins later in the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from services.chassis.errors import invalid
from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters
from services.tamiyo.policies.planning import Planner

DESCRIPTION: Final = "Repeats the decisions of another run, as far as the budget goes: a control for utilization."
DEFAULTS: Final[Mapping[str, object]] = {"plans": []}


def check(parameters: Parameters) -> None:
    """Refuse plans that are no list of maps of slot to a whole number from 1 (EsperError, INVALID_FIELD)."""
    plans = parameters["plans"]
    if not isinstance(plans, Sequence) or isinstance(plans, str):
        raise invalid("parameters.plans", "it is no list", "give one map of {slot: new channels} for each decision")
    for index, plan in enumerate(plans):
        key = f"parameters.plans[{index}]"
        if not isinstance(plan, Mapping):
            raise invalid(key, "it is no map", "give {slot: new channels}")
        for slot, size in plan.items():
            whole = isinstance(size, int) or (isinstance(size, float) and size.is_integer())
            if isinstance(size, bool) or not whole or size < 1:
                raise invalid(f"{key}.{slot}", f"{size!r} is no whole number from 1", "give new channels")


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Give each layer one channel after the other until it has what the other run gave it at this decision."""
    planner = Planner(observation)
    plans = parameters["plans"]
    wanted: dict[str, int] = {}
    if isinstance(plans, Sequence) and 0 < observation.decisions_left <= len(plans):
        wanted = {str(slot): int(size) for slot, size in plans[-observation.decisions_left].items()}
    missing = {name: wanted.get(name, wanted.get(name.rsplit("/", 1)[-1], 0)) for name in planner.eligible}
    # By turns, so that a budget that ends early cuts all layers alike.
    while any(missing.values()):
        for name, left in missing.items():
            if left and planner.affords(name, 1):
                planner.add(name, 1)
                missing[name] -= 1
            else:
                missing[name] = 0

    def explain(slot: SlotView, added: int) -> str:
        return f"another run widened it by {added} at this decision"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: the other run did nothing here, or it does not fit within this decision's share."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: what another run did. {planner.spending()}."

    return planner.plan({}, explain, summary, passed_over=lambda slot: "not in the other run's plan, or too dear")

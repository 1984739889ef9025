"""Widen by chance: each layer gets a share of the decision's spending drawn from a Dirichlet distribution.

Shares of the budget rather than factors, because factors compound into late layers and make a weak control
(GROWTH, section 2b). What a share cannot spend, for want of a whole channel or at the width cap, the layers that drew
most may spend, so that chance costs as much as any other rule.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters, number
from services.tamiyo.policies.planning import Planner

DESCRIPTION: Final = "Spends each decision's share on the layers by Dirichlet shares."
DEFAULTS: Final[Mapping[str, object]] = {"concentration": 1.0}


def check(parameters: Parameters) -> None:
    """Refuse a concentration out of range (EsperError, INVALID_FIELD)."""
    number(parameters, "concentration", low=0.01, high=1000)


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Draw shares from the observation's seed and the epoch, then spend each."""
    planner = Planner(observation)
    generator = random.Random(f"{observation.seed}/{observation.epoch}")
    concentration = number(parameters, "concentration", low=0.01, high=1000)
    draws = {name: generator.gammavariate(concentration, 1.0) for name in planner.eligible}
    if not any(draws.values()):  # a very low concentration may draw nothing but zeros
        draws = dict.fromkeys(draws, 1.0)
    total = sum(draws.values())
    share = planner.target - planner.cost
    for name, draw in sorted(draws.items(), key=lambda item: (-item[1], item[0])):
        spent = 0.0
        while planner.affords(name, 1) and spent + (price := planner.price(name, 1)) <= share * draw / total:
            planner.add(name, 1)
            spent += price
    planner.fill(lambda eligible, width: draws[eligible.slot.name], least=0)

    def explain(slot: SlotView, added: int) -> str:
        return f"drew {draws[slot.name] / total:.0%} of this decision's spending"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: no channel fits within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: drawn at random. {planner.spending()}."

    return planner.plan({}, explain, summary, passed_over=lambda slot: "its share buys no whole channel")

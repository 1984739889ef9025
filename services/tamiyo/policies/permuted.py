"""Widen by measured needs that were shuffled over the layers: the control for *where* the measuring says to grow.

It spends like ``utilization`` and knows the same figures, each under another layer's name. Where it does as well, what
was measured said nothing about where width is missing. The shuffle is a new one at each decision, which spreads the
spending and so makes the stronger control.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from services.tamiyo.observation import Change, Observation, Plan, SlotView
from services.tamiyo.policies import utilization
from services.tamiyo.policies.parameters import Estimates, Parameters, number
from services.tamiyo.policies.planning import Eligible, Planner

DESCRIPTION: Final = "Widens by the measured needs, shuffled over the layers: a control for utilization."
DEFAULTS: Final[Mapping[str, object]] = {
    key: utilization.DEFAULTS[key] for key in ("least_need", "measure", "branch_ratio", "least_survival")
}


def check(parameters: Parameters) -> None:
    """Refuse what ``utilization`` refuses (EsperError, INVALID_FIELD)."""
    utilization.check(parameters)


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Deal the shares of width in use out anew, from the observation's seed and the epoch, then spend by them."""
    planner = Planner(observation)
    least = number(parameters, "least_need", low=0, high=1)
    shares = {
        name: rank / eligible.slot.width
        for name, eligible in planner.eligible.items()
        if (rank := utilization.rank_of(eligible.slot, parameters)) is not None
    }
    dealt = list(shares.values())
    random.Random(f"{observation.seed}/{observation.epoch}").shuffle(dealt)
    shuffled = dict(zip(shares, dealt, strict=True))

    def need(eligible: Eligible, width: int) -> float | None:
        share = shuffled.get(eligible.slot.name)
        return None if share is None else share * eligible.slot.width / width - eligible.penalty

    planner.fill(need, least=least)

    def explain(slot: SlotView, added: int) -> str:
        return f"was dealt the need of some layer, {shuffled[slot.name]:.0%} of its width: {added} more channels"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: no need was measured, or nothing fits within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: measured needs, shuffled over the layers. {planner.spending()}."

    needs: dict[str, float | None] = {
        name: share * planner.eligible[name].slot.width / planner.widths[name] for name, share in shuffled.items()
    }
    return planner.plan(needs, explain, summary, passed_over=lambda slot: "unmeasured, or its share gave it nothing")

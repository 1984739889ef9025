"""Widen what is full: need = effective rank of a layer's activations / its planned width.

The rank stays as measured while the planned width grows, so that every channel given to a slot lowers its need
and a plan spreads over the slots by itself (GROWTH, section 2b: the only measured rule near the best on a balanced
and on a starved host). The effective rank is exp(entropy of the eigenvalues of the channels' correlation matrix)
(Roy and Vetterli, 2007); ``measure: participation`` takes the participation ratio of the covariance instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from services.chassis.errors import invalid
from services.tamiyo.observation import Change, Evidence, Observation, Plan, SlotKind, SlotView
from services.tamiyo.policies.parameters import Estimates, Parameters, number
from services.tamiyo.policies.planning import WIDENING, Eligible, Planner, nothing, unavailable

DESCRIPTION: Final = "Widens the layers whose activations use most of their width, by effective rank / planned width."
DEFAULTS: Final[Mapping[str, object]] = {
    # A layer whose activations span less than this share of its width is not short of capacity.
    "least_need": 0.3,
    "measure": "effective_rank",
    # Inner width of a branch, as a share of the slot's width, where widening is impossible.
    "branch_ratio": 0.25,
    # Families of branches, those to be tried first in front; among equals what outcomes say of them comes before this.
    "branch_families": (
        "residual_bottleneck depthwise_separable attention squeeze_excite mlp_adapter low_rank_adapter normalization"
    ),
    # A family whose seeds survived less often than this (in outcomes learned from) is not used.
    "least_survival": 0.1,
}
_MEASURES: Final = ("effective_rank", "participation")


def check(parameters: Parameters) -> None:
    """Refuse parameters out of range (EsperError, INVALID_FIELD)."""
    number(parameters, "least_need", low=0, high=1)
    number(parameters, "branch_ratio", low=0.01, high=4)
    number(parameters, "least_survival", low=0, high=1)
    if not isinstance(_families(parameters), str):
        raise invalid("parameters.branch_families", "is no text", "give names of families with spaces between them")
    if parameters["measure"] not in _MEASURES:
        raise invalid("parameters.measure", f"{parameters['measure']!r} is no measure", f"use one of {_MEASURES}")


def _families(parameters: Parameters) -> object:
    # A version that was stored before this parameter was there has its default.
    return parameters.get("branch_families", DEFAULTS["branch_families"])


def rank_of(slot: SlotView, parameters: Parameters) -> float | None:
    """The slot's rank in the version's measure; ``None`` while unmeasured."""
    if slot.health is None:
        return None
    if parameters["measure"] == "participation":
        return slot.health.participation_ratio
    return slot.health.effective_rank


def decide(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """Widen by need under this decision's share of the budget; a branch only where nothing can be widened."""
    planner = Planner(observation)
    least = number(parameters, "least_need", low=0, high=1)
    survival = number(parameters, "least_survival", low=0, high=1)

    def need(eligible: Eligible, width: int) -> float | None:
        rank = rank_of(eligible.slot, parameters)
        return None if rank is None else rank / width - eligible.penalty

    if _given_up(estimates, WIDENING, survival):
        return nothing(observation, "No adaptation: in the outcomes learned from, widenings hardly ever stayed.")
    if not planner.eligible:
        return _branch(observation, parameters, estimates)
    planner.fill(need, least=least)

    def explain(slot: SlotView, added: int) -> str:
        rank = rank_of(slot, parameters)
        return (
            f"{rank:.1f} of {slot.width} dimensions in use ({(rank or 0) / slot.width:.0%}): "
            f"{added} more channels bring it to {(rank or 0) / (slot.width + added):.0%}"
        )

    def passed_over(slot: SlotView) -> str:
        rank = rank_of(slot, parameters)
        if rank is None:
            why = slot.health.unmeasured_reason if slot.health else "no health was reported"
            return f"not measured: {why or 'no reason given'}"
        share = rank / slot.width
        if share < least:
            return f"only {share:.0%} of its width in use, below {least:.0%}: not short of capacity"
        return f"{share:.0%} of its width in use, but others need it more or a channel costs too much"

    def summary(changes: tuple[Change, ...]) -> str:
        if not changes:
            return "No adaptation: no slot that may grow is in need within this decision's share of the budget."
        words = ", ".join(f"{change.slot.rsplit('/', 1)[-1]} by {change.size}" for change in changes)
        return f"Widen {words}: these layers use most of their width. {planner.spending()}."

    needs = {
        slot.name: None if (rank := rank_of(slot, parameters)) is None else rank / planner.widths[slot.name]
        for slot in observation.slots
        if slot.kind is SlotKind.WIDTH
    }
    return planner.plan(needs, explain, summary, passed_over=passed_over)


def _given_up(estimates: Estimates, family: str, least: float) -> bool:
    estimate = estimates.get(family)
    return estimate is not None and estimate.survival < least


def _branch(observation: Observation, parameters: Parameters, estimates: Estimates) -> Plan:
    """One branch at the fullest span that has a branch blueprint within this decision's share."""
    ratio = number(parameters, "branch_ratio", low=0.01, high=4)
    survival = number(parameters, "least_survival", low=0, high=1)
    planner = Planner(observation)
    order = str(_families(parameters)).split()
    options: list[tuple[float, str, float, int, str, int, float]] = []
    reasons = dict(planner.refused)
    needs: dict[str, float | None] = {}
    for slot in observation.slots:
        if slot.kind is not SlotKind.SPAN:
            continue
        rank = rank_of(slot, parameters)
        needs[slot.name] = None if rank is None else rank / slot.width
        if (why := unavailable(slot)) is not None:
            reasons[slot.name] = why
            continue
        if rank is None:
            reasons[slot.name] = "not measured"
            continue
        reasons[slot.name] = "no branch blueprint fits it within this decision's share of the budget"
        size = max(1, round(slot.width * ratio))
        for candidate in observation.candidates:
            cost = candidate.branch_costs.get(slot.name)
            if slot.name not in candidate.slots or cost is None or candidate.family == WIDENING:
                continue
            if candidate.family not in order or _given_up(estimates, candidate.family, survival):
                continue
            price = cost.fixed + size * cost.per_size
            if planner.cost + price <= planner.target:
                score = rank / slot.width - slot.penalties.get(candidate.blueprint, 0.0)
                estimate = estimates.get(candidate.family)
                known = 0.5 if estimate is None else estimate.survival
                rank_of_family = order.index(candidate.family)
                options.append((-score, slot.name, -known, rank_of_family, candidate.blueprint, size, price))
                reasons[slot.name] = "another span is fuller"
    if not options:
        return nothing(observation, "No adaptation: no layer can be widened and no branch fits within the budget.")
    _, chosen, _, family, blueprint, size, price = min(options)
    reasons[chosen] = (
        f"no layer can be widened; what enters this span uses {needs[chosen] or 0:.0%} of its width, "
        f"and {order[family]} is the first of the families that fit"
    )
    evidence = tuple(
        Evidence(slot.name, slot.width, slot.width, needs.get(slot.name), slot.name == chosen, reasons[slot.name])
        for slot in observation.slots
    )
    change = Change(chosen, blueprint, size, reasons[chosen])
    words = f"Graft a {order[family]} of size {size} at {chosen.rsplit('/', 1)[-1]}: no layer can be widened."
    return Plan((change,), evidence, words, planner.cost + price)

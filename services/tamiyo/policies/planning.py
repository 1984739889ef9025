"""What all policies share: who may change, what a decision may spend, pricing, and the words for it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from services.tamiyo.observation import (
    Candidate,
    Change,
    CostTerm,
    Evidence,
    Observation,
    Occupancy,
    Plan,
    SlotKind,
    SlotView,
    cost_of,
)

WIDENING = "widen"


@dataclass(frozen=True)
class Eligible:
    """A slot that may be widened now, and the blueprint to do it with."""

    slot: SlotView
    blueprint: str
    penalty: float
    most: int
    """Width it may have at most after this decision."""


class Planner:
    """The ledger of one decision: planned widths, their exact price, and what may still be spent.

    Of the budget that is left, each of the decisions that are left may spend an equal share, so that early
    decisions cannot starve late ones (GROWTH, section 2b).
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self.widths = {slot.name: slot.width for slot in observation.slots if slot.kind is SlotKind.WIDTH}
        self._terms_of: dict[str, list[CostTerm]] = {name: [] for name in self.widths}
        for term in observation.cost_terms:
            for name in set(term.slots):
                self._terms_of[name].append(term)
        left = max(observation.budget_limit - observation.budget_current, 0.0)
        self.target = observation.budget_current + left / observation.decisions_left
        self.cost = observation.budget_current
        self.refused: dict[str, str] = {}
        self.eligible = self._find_eligible()

    def _find_eligible(self) -> dict[str, Eligible]:
        found = {}
        for slot in sorted(self.observation.slots, key=lambda slot: slot.name):
            if slot.kind is not SlotKind.WIDTH:
                continue
            reason = unavailable(slot)
            blueprint = self._blueprint_for(slot)
            if reason is None and blueprint is None:
                reason = "no widening blueprint fits it"
            if reason is not None or blueprint is None:
                self.refused[slot.name] = str(reason)
                continue
            most = math.floor(slot.width * self.observation.max_factor)
            found[slot.name] = Eligible(slot, blueprint.blueprint, slot.penalties.get(blueprint.blueprint, 0.0), most)
        return found

    def _blueprint_for(self, slot: SlotView) -> Candidate | None:
        fitting = [c for c in self.observation.candidates if c.family == WIDENING and slot.name in c.slots]
        return min(fitting, key=lambda c: (slot.penalties.get(c.blueprint, 0.0), c.blueprint), default=None)

    def price(self, slot: str, channels: int) -> float:
        """What ``channels`` more at ``slot`` add to the cost of the network as planned so far."""
        wider = {**self.widths, slot: self.widths[slot] + channels}
        terms = self._terms_of[slot]
        return cost_of(terms, wider) - cost_of(terms, self.widths)

    def affords(self, slot: str, channels: int) -> bool:
        """Whether the width cap and this decision's share allow ``channels`` more at ``slot``."""
        within = self.widths[slot] + channels <= self.eligible[slot].most
        return within and self.cost + self.price(slot, channels) <= self.target * (1 + 1e-12)

    def add(self, slot: str, channels: int) -> None:
        """Plan ``channels`` more at ``slot``."""
        self.cost += self.price(slot, channels)
        self.widths[slot] += channels

    def fill(self, need: Callable[[Eligible, int], float | None], *, least: float) -> None:
        """Give one channel at a time to the slot in the greatest need until nothing affordable needs one.

        ``need(eligible, planned_width)`` falls as the planned width rises; slots below ``least`` or with
        ``None`` get nothing. Ties go to the first name, so that the order of slots cannot matter.
        """
        queue: list[tuple[float, str]] = []

        def enqueue(name: str) -> None:
            value = need(self.eligible[name], self.widths[name])
            if value is not None and value >= least:
                heapq.heappush(queue, (-value, name))

        for name in self.eligible:
            enqueue(name)
        while queue:
            _, name = heapq.heappop(queue)
            # Costs only rise, so a slot that cannot be afforded now never can.
            if self.affords(name, 1):
                self.add(name, 1)
                enqueue(name)

    def plan(
        self,
        needs: Mapping[str, float | None],
        explain: Callable[[SlotView, int], str],
        summary: Callable[[tuple[Change, ...]], str],
        *,
        passed_over: Callable[[SlotView], str],
    ) -> Plan:
        """The planned widths as a plan with evidence for every slot of the observation.

        ``explain(slot, new channels)`` says why a slot was chosen, ``passed_over(slot)`` why an eligible one was not.
        """
        changes, evidence = [], []
        for slot in self.observation.slots:
            planned = self.widths.get(slot.name, slot.width)
            added = planned - slot.width
            if added:
                reason = explain(slot, added)
                changes.append(Change(slot.name, self.eligible[slot.name].blueprint, added, reason))
            elif slot.kind is SlotKind.SPAN:
                reason = unavailable(slot) or "widening comes before branches"
            else:
                reason = self.refused.get(slot.name) or passed_over(slot)
            evidence.append(Evidence(slot.name, slot.width, planned, needs.get(slot.name), bool(added), reason))
        done = tuple(changes)
        return Plan(done, tuple(evidence), summary(done), self.cost)

    def spending(self) -> str:
        """What the plan costs, in words."""
        observation = self.observation
        kind = observation.budget_kind
        return (
            f"{kind.words(self.cost)} of {kind.words(observation.budget_limit)} {kind.unit} in use after it, "
            f"{kind.words(self.target)} allowed by this decision ({observation.decisions_left} left)"
        )


def unavailable(slot: SlotView) -> str | None:
    """Why a slot cannot change now, or ``None``."""
    until = "" if slot.free_epoch is None else f" until epoch {slot.free_epoch}"
    match slot.occupancy:
        case Occupancy.FREE:
            return None
        case Occupancy.OCCUPIED:
            return "a seed is under way in it"
        case Occupancy.EMBARGO:
            return f"under embargo after a cull{until}"
        case Occupancy.LOCKED:
            return f"locked after a rollback{until}"


def nothing(observation: Observation, explanation: str) -> Plan:
    """The plan without a change, with the same reason for every slot."""
    evidence = tuple(
        Evidence(slot.name, slot.width, slot.width, None, False, unavailable(slot) or explanation)
        for slot in observation.slots
    )
    return Plan((), evidence, explanation, observation.budget_current)


def closed(observation: Observation) -> str | None:
    """Why no change is possible at all now, whatever the policy; ``None`` if one is."""
    start, end = observation.window
    if not start <= observation.progress <= end:
        where = "has not opened" if observation.progress < start else "has closed"
        return (
            f"No adaptation: the growth window ({start:.0%} to {end:.0%} of the schedule) {where} "
            f"at {observation.progress:.0%}."
        )
    if observation.budget_current >= observation.budget_limit:
        kind = observation.budget_kind
        return (
            f"No adaptation: the budget is spent ({kind.words(observation.budget_current)} of "
            f"{kind.words(observation.budget_limit)} {kind.unit})."
        )
    return None

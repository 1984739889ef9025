"""What a policy sees, as plain typed Python, and what it answers.

An :class:`Observation` is complete: a decision is a pure function of it and of a policy version, so that
a decision can be repeated, audited and replayed. Unmeasured figures are ``None``.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class SlotKind(enum.StrEnum):
    """Kinds of places where a network grows."""

    WIDTH = "width"
    SPAN = "span"


class Occupancy(enum.StrEnum):
    """What holds a slot."""

    FREE = "free"
    OCCUPIED = "occupied"
    EMBARGO = "embargo"
    LOCKED = "locked"


class BudgetKind(enum.StrEnum):
    """What a budget counts."""

    FLOPS = "flops"
    PARAMETERS = "parameters"
    LATENCY = "latency"

    def words(self, amount: float) -> str:
        """An amount for people, without its unit."""
        return f"{amount:,.4g}" if self is BudgetKind.LATENCY else f"{amount:,.0f}"

    @property
    def unit(self) -> str:
        """What is counted, for people."""
        return _UNITS[self]


_UNITS = {
    BudgetKind.FLOPS: "FLOPs per image",
    BudgetKind.PARAMETERS: "parameters",
    BudgetKind.LATENCY: "ms per training step",
}


@dataclass(frozen=True)
class Health:
    """Health of one slot; ``need`` figures are ``None`` where there was no measurement."""

    effective_rank: float | None = None
    participation_ratio: float | None = None
    dead_unit_ratio: float | None = None
    samples: int = 0
    unmeasured_reason: str = ""


@dataclass(frozen=True)
class SlotView:
    """One slot of the observed network."""

    name: str
    kind: SlotKind
    width: int
    host_width: int
    occupancy: Occupancy = Occupancy.FREE
    free_epoch: int | None = None
    penalties: Mapping[str, float] = field(default_factory=dict)
    health: Health | None = None


@dataclass(frozen=True)
class CostTerm:
    """One summand of the network's cost: ``coefficient * product of the widths of slots``."""

    coefficient: float
    slots: tuple[str, ...]


@dataclass(frozen=True)
class BranchCost:
    """Cost of a branch of size ``s``: ``fixed + s * per_size``, in units of the budget."""

    fixed: float
    per_size: float


@dataclass(frozen=True)
class Candidate:
    """A blueprint that may be used and the slots it fits."""

    blueprint: str
    family: str
    slots: frozenset[str]
    branch_costs: Mapping[str, BranchCost] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """The state of a run at a decision; costs are in units of ``budget_kind``."""

    run: str
    epoch: int
    progress: float
    window: tuple[float, float]
    decisions_left: int
    budget_kind: BudgetKind
    budget_limit: float
    budget_current: float
    slots: Sequence[SlotView]
    cost_terms: Sequence[CostTerm]
    candidates: Sequence[Candidate]
    max_factor: float
    seed: int = 0


@dataclass(frozen=True)
class Change:
    """One change of a plan: ``size`` is new channels of a widening or the inner width of a branch."""

    slot: str
    blueprint: str
    size: int
    reason: str


@dataclass(frozen=True)
class Evidence:
    """What was weighed for one slot; ``need`` is ``None`` where the policy measures nothing there."""

    slot: str
    width: int
    planned_width: int
    need: float | None
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """A policy's answer; no changes is an answer too. ``cost`` is the network's after the plan."""

    changes: tuple[Change, ...]
    evidence: tuple[Evidence, ...]
    explanation: str
    cost: float


def cost_of(terms: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
    """Cost of the network at the given widths, in units of the terms' coefficients."""
    return math.fsum(term.coefficient * math.prod(widths[slot] for slot in term.slots) for term in terms)

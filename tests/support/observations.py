"""Observations for tests of Tamiyo: a network of three convolutions in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.tamiyo.observation import (
    BranchCost,
    BudgetKind,
    Candidate,
    CostTerm,
    Health,
    Observation,
    SlotKind,
    SlotView,
    cost_of,
)

WIDEN, BRANCH = "blueprints/widen", "blueprints/branch"


def slot(name: str, width: int, rank: float | None = None, **changes: Any) -> SlotView:
    """A width slot whose health is its effective rank; ``None`` is unmeasured."""
    health = None if rank is None else Health(effective_rank=rank, participation_ratio=rank / 2, samples=500)
    fields: dict[str, Any] = {"kind": SlotKind.WIDTH, "width": width, "host_width": width, "health": health}
    return SlotView(name=name, **{**fields, **changes})


def chain(slots: Sequence[SlotView]) -> list[CostTerm]:
    """Layers in a row: each costs the product of its two widths, the first and the last one width."""
    names = [one.name for one in slots if one.kind is SlotKind.WIDTH]
    pairs = [(names[i], names[i + 1]) for i in range(len(names) - 1)]
    ends = [(names[0],), (names[-1],)] if names else []
    return [CostTerm(9.0, pair) for pair in pairs] + [CostTerm(3.0, end) for end in ends] + [CostTerm(5.0, ())]


def observation(slots: Sequence[SlotView], *, factor: float = 2.0, **changes: Any) -> Observation:
    """An observation in the middle of its window, with a budget of ``factor`` times what the network costs."""
    terms = chain(slots)
    current = cost_of(terms, {one.name: one.width for one in slots})
    widths = frozenset(one.name for one in slots if one.kind is SlotKind.WIDTH)
    spans = frozenset(one.name for one in slots if one.kind is SlotKind.SPAN)
    branch = Candidate(BRANCH, "residual_bottleneck", spans, {name: BranchCost(1.0, 2.0) for name in spans})
    fields: dict[str, Any] = {
        "run": "runs/r",
        "epoch": 3,
        "progress": 0.1,
        "window": (0.05, 0.3),
        "decisions_left": 2,
        "budget_kind": BudgetKind.FLOPS,
        "budget_limit": current * factor,
        "budget_current": current,
        "slots": slots,
        "cost_terms": terms,
        "candidates": [Candidate(WIDEN, "widen", widths), branch],
        "max_factor": 2.0,
        "seed": 7,
    }
    return Observation(**{**fields, **changes})

"""Which widths the same FLOPs could buy: channels go from layers that use little of their width to those that use most.

The rule is that of Tamiyo's utilization policy: need = effective rank / planned width, the rank stays as measured, one
step goes to the layer in the greatest need, ties to the first name. Tamiyo begins at the present widths and spends a
budget; here every measured layer begins at the narrowest it may become and today's FLOPs are the budget. Torch-free.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from services.kasmina.model import CostTerm


@dataclass(frozen=True, slots=True)
class Usage:
    """A layer with its ``width`` and the dimensions its channels span; ``rank`` None was not measured."""

    slot: str
    width: int
    rank: float | None


def step_of(width: int) -> int:
    """Channels that a layer of ``width`` gains or gives at a time: 1 below 16, then 2, 4, and 8 from 64 on.

    Widths that are multiples of 8, which processors like, stay multiples of 8.
    """
    return next((step for least, step in ((64, 8), (32, 4), (16, 2)) if width >= least), 1)


def flops_of(terms: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
    """Forward FLOPs per sample of the network at these widths."""
    return math.fsum(term.flops * math.prod(widths[slot] for slot in term.slots) for term in terms)


def parameters_of(terms: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
    """Parameters of the network at these widths."""
    return math.fsum(term.parameters * math.prod(widths[slot] for slot in term.slots) for term in terms)


def suggest(
    layers: Sequence[Usage],
    terms: Sequence[CostTerm],
    *,
    max_factor: float,
    step: Callable[[int], int] = step_of,
) -> dict[str, int]:
    """Widths at no more than the present FLOPs; no layer that wants more could have one step more for what is left.

    Args:
        layers: All slots that ``terms`` name. Those without a rank keep their width.
        terms: What the network costs as a function of the widths.
        max_factor: A layer becomes at most so many times as wide or as narrow, but never narrower than 1: a rank says
            little about a network of quite another shape.
        step: Channels given at a time to a layer of a width.
    """
    present = {layer.slot: layer.width for layer in layers}
    steps = {layer.slot: step(layer.width) for layer in layers}
    ranks = {layer.slot: layer.rank for layer in layers if layer.rank is not None}
    # From the present width downwards in whole steps, so that it can be met again exactly.
    least = {slot: max(1, math.ceil(present[slot] / max_factor)) for slot in ranks}
    widths = present | {
        slot: present[slot] - (present[slot] - least[slot]) // steps[slot] * steps[slot] for slot in ranks
    }
    target = flops_of(terms, present) * (1 + 1e-12)
    queue = [(-rank / widths[slot], slot) for slot, rank in ranks.items()]
    heapq.heapify(queue)
    while queue:
        _, slot = heapq.heappop(queue)
        wider = widths | {slot: widths[slot] + steps[slot]}
        # Costs only rise: what cannot be had now never can.
        if wider[slot] <= present[slot] * max_factor and flops_of(terms, wider) <= target:
            widths = wider
            heapq.heappush(queue, (-ranks[slot] / widths[slot], slot))
    return widths

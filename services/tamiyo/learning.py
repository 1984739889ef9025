"""What reported outcomes teach: per blueprint family, how often its seeds stay and what they are worth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from services.tamiyo.policies.parameters import Estimates, FamilyEstimate

# CANCELLED says nothing of a blueprint: such a seed never touched the network.
_JUDGED: Final = frozenset({"FOSSILIZED", "CULLED", "ROLLED_BACK"})


def learn(outcomes: Iterable[Mapping[str, Any]], *, min_outcomes: int) -> Estimates:
    """Estimates of every family with at least ``min_outcomes`` judged seeds.

    Args:
        outcomes: documents with ``family``, ``state``, ``contribution`` (points, or ``None`` if never measured) and
            ``seed``, oldest first. Of a seed the newest counts: a run that was resumed judges some of its seeds again.
        min_outcomes: fewest judged seeds of a family; below it the family gets no estimate.
    """
    judged: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for outcome in {outcome["seed"]: outcome for outcome in outcomes}.values():
        if outcome["family"] and outcome["state"] in _JUDGED:
            judged[outcome["family"]].append(outcome)
    return {
        family: _estimate(members) for family, members in sorted(judged.items()) if len(members) >= max(min_outcomes, 1)
    }


def _estimate(outcomes: list[Mapping[str, Any]]) -> FamilyEstimate:
    stayed = sum(outcome["state"] == "FOSSILIZED" for outcome in outcomes)
    measured = [outcome["contribution"] for outcome in outcomes if outcome["contribution"] is not None]
    mean = math.fsum(measured) / len(measured) if measured else None
    return FamilyEstimate(outcomes=len(outcomes), survival=stayed / len(outcomes), contribution=mean)

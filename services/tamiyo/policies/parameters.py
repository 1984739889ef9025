"""Parameters and estimates of a policy version, and the checks its file makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from services.chassis.errors import invalid

Parameters: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class FamilyEstimate:
    """What reported outcomes say of one blueprint family.

    ``contribution`` is the mean in points of validation accuracy over the outcomes that measured one,
    ``None`` where none did; ``survival`` is the share of its seeds that were fossilized.
    """

    outcomes: int
    survival: float
    contribution: float | None


Estimates: TypeAlias = Mapping[str, FamilyEstimate]


def number(parameters: Parameters, key: str, *, low: float, high: float) -> float:
    """The number at ``key``, within ``[low, high]``.

    Raises:
        EsperError: INVALID_FIELD when it is no number or outside.
    """
    value = parameters[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise invalid(f"parameters.{key}", f"{value!r} is not a number from {low:g} to {high:g}", "give one in range")
    return float(value)

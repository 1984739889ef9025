"""The limit of growth, in the unit it is counted in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from services.chassis.config.schema import BudgetConfig
from services.tolaria.errors import BudgetError

Kind = Literal["flops", "parameters", "latency"]
_UNITS: Final[dict[Kind, str]] = {
    "flops": "forward FLOPs per sample",
    "parameters": "parameters",
    "latency": "ms per training step",
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What the network may cost in the end: FLOPs of one sample forward, parameters, or milliseconds of a step."""

    kind: Kind
    value: float


def resolve(config: BudgetConfig, *, flops: int, parameters: int, latency: float | None = None) -> Limit:
    """The limit that ``config`` sets for a host of this cost.

    ``latency`` is in milliseconds, None where it is not counted.
    Raises BudgetError for a limit below what the host costs already.
    """
    costs: dict[Kind, float | None] = {"flops": flops, "parameters": parameters, "latency": latency}
    kind = config.kind
    host = costs[kind]
    assert host is not None, "a budget of latency is resolved once the latency is known"
    multiple, absolute = config.multiple, config.absolute
    value = host * multiple if multiple is not None else absolute
    assert value is not None, "the configuration allows exactly one limit"
    if value < host:
        raise BudgetError(
            f"growth.budget.{config.key}: {value:,.6g} {_UNITS[kind]} is below what the host costs already, "
            f"{host:,.6g}; set it higher, take a smaller host, or set growth.enabled to false"
        )
    return Limit(kind, value)

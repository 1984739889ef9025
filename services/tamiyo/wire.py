"""Between Tamiyo's contract and its core: reading observations with every field checked, writing decisions."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Literal

from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.struct_pb2 import Struct

from esper.common.v1.common_pb2 import (
    DIGEST_ALGORITHM_SHA256,
    SLOT_KIND_SPAN,
    SLOT_KIND_WIDTH,
    Digest,
)
from esper.kasmina.v1 import topology_pb2
from esper.tamiyo.v1 import decision_pb2, observation_pb2, policy_pb2
from services.chassis.errors import invalid
from services.chassis.ids import parse_name
from services.tamiyo.decisions import Decision
from services.tamiyo.observation import (
    BranchCost,
    BudgetKind,
    Candidate,
    CostTerm,
    Health,
    Observation,
    Occupancy,
    SlotKind,
    SlotView,
)
from services.tamiyo.policies import ALGORITHMS
from services.tamiyo.registry import PolicyVersion

# No layer is as wide; a bound on the work that a request can ask for.
_WIDEST = 2**20
_Measured = Literal["effective_rank", "participation_ratio", "dead_unit_ratio"]

_KINDS = {SLOT_KIND_WIDTH: SlotKind.WIDTH, SLOT_KIND_SPAN: SlotKind.SPAN}
_BUDGETS = {
    observation_pb2.BUDGET_KIND_FLOPS: BudgetKind.FLOPS,
    observation_pb2.BUDGET_KIND_PARAMETERS: BudgetKind.PARAMETERS,
    observation_pb2.BUDGET_KIND_LATENCY: BudgetKind.LATENCY,
}
_OCCUPANCIES = {
    topology_pb2.SLOT_OCCUPANCY_FREE: Occupancy.FREE,
    topology_pb2.SLOT_OCCUPANCY_OCCUPIED: Occupancy.OCCUPIED,
    topology_pb2.SLOT_OCCUPANCY_EMBARGO: Occupancy.EMBARGO,
    topology_pb2.SLOT_OCCUPANCY_LOCKED: Occupancy.LOCKED,
}


def read_observation(message: observation_pb2.Observation) -> Observation:
    """The observation as plain Python.

    Raises:
        EsperError: REQUIRED_FIELD, INVALID_NAME or INVALID_FIELD with the path of the first field that makes no sense.
    """
    parse_name("runs/{r}", message.run, field="observation.run")
    _require(message.decisions_left >= 1, "observation.decisions_left", "it is below 1", "count this decision too")
    factor = _finite(message.max_factor, "observation.max_factor", low=0)
    _require(factor > 1, "observation.max_factor", "it is not above 1", "2 allows doubling a layer")
    progress = _finite(message.progress_ratio, "observation.progress_ratio", low=0)
    start = _finite(message.window_start_ratio, "observation.window_start_ratio", low=0)
    end = _finite(message.window_end_ratio, "observation.window_end_ratio", low=start)
    if message.budget.kind not in _BUDGETS:
        raise invalid("observation.budget.kind", "it is no kind of budget", "use FLOPS, PARAMETERS or LATENCY")
    kind = _BUDGETS[message.budget.kind]
    slots = _read_slots(message)
    names = {slot.name for slot in slots}
    widths = {slot.name for slot in slots if slot.kind is SlotKind.WIDTH}
    return Observation(
        run=message.run,
        epoch=message.epoch,
        progress=progress,
        window=(start, end),
        decisions_left=message.decisions_left,
        budget_kind=kind,
        budget_limit=_finite(message.budget.limit, "observation.budget.limit", low=0),
        budget_current=_finite(message.budget.current, "observation.budget.current", low=0),
        slots=slots,
        cost_terms=_read_cost_terms(message, kind, widths),
        candidates=_read_candidates(message, kind, names),
        max_factor=factor,
        seed=message.seed,
    )


def _read_slots(message: observation_pb2.Observation) -> list[SlotView]:
    health = _read_health(message)
    slots: list[SlotView] = []
    seen: set[str] = set()
    for index, slot in enumerate(message.slots):
        path = f"observation.slots[{index}]"
        _require(slot.name != "", f"{path}.name", "it is empty", "give runs/{r}/slots/{slot}")
        _require(slot.name not in seen, f"{path}.name", f"{slot.name!r} occurs twice", "name every slot once")
        _require(1 <= slot.width <= _WIDEST, f"{path}.width", f"{slot.width} is no width", f"give 1 to {_WIDEST}")
        host = message.host_widths.get(slot.name, slot.width)
        _require(1 <= host <= _WIDEST, f"observation.host_widths[{slot.name!r}]", f"{host} is no width", "see width")
        if slot.kind not in _KINDS:
            raise invalid(f"{path}.kind", "it is no kind of slot", "use WIDTH or SPAN")
        if slot.occupancy not in _OCCUPANCIES:
            raise invalid(f"{path}.occupancy", "it is unspecified", "use FREE, OCCUPIED, EMBARGO or LOCKED")
        seen.add(slot.name)
        view = SlotView(
            name=slot.name,
            kind=_KINDS[slot.kind],
            width=slot.width,
            host_width=host,
            occupancy=_OCCUPANCIES[slot.occupancy],
            free_epoch=slot.free_epoch if slot.HasField("free_epoch") else None,
            penalties={key: _finite(value, f"{path}.penalties", low=0) for key, value in slot.penalties.items()},
            health=health.pop(slot.name, None),
        )
        slots.append(view)
    for stranger in health:
        raise invalid("observation.health", f"{stranger!r} is none of the observed slots", "name observed slots only")
    return slots


def _read_health(message: observation_pb2.Observation) -> dict[str, Health]:
    found: dict[str, Health] = {}
    for index, item in enumerate(message.health):
        path = f"observation.health[{index}]"
        _require(item.slot not in found, f"{path}.slot", f"{item.slot!r} occurs twice", "one entry per slot")
        found[item.slot] = Health(
            effective_rank=_optional(item, "effective_rank", path),
            participation_ratio=_optional(item, "participation_ratio", path),
            dead_unit_ratio=_optional(item, "dead_unit_ratio", path),
            samples=item.samples,
            unmeasured_reason=item.unmeasured_reason,
        )
    return found


def _read_cost_terms(message: observation_pb2.Observation, kind: BudgetKind, widths: set[str]) -> list[CostTerm]:
    terms = []
    for index, term in enumerate(message.cost_terms):
        path = f"observation.cost_terms[{index}]"
        for slot in term.slots:
            _require(slot in widths, f"{path}.slots", f"{slot!r} is no observed width slot", "price observed slots")
        value = _in_kind(kind, term.flops, term.parameters, _optional_of(term, "step_milliseconds"), path)
        terms.append(CostTerm(_finite(value, f"{path}.{kind}", low=0), tuple(term.slots)))
    return terms


def _read_candidates(message: observation_pb2.Observation, kind: BudgetKind, names: set[str]) -> list[Candidate]:
    candidates = []
    for index, item in enumerate(message.candidates):
        path = f"observation.candidates[{index}]"
        parse_name("blueprints/{b}", item.blueprint, field=f"{path}.blueprint")
        for slot in item.slots:
            _require(slot in names, f"{path}.slots", f"{slot!r} is none of the observed slots", "name observed slots")
        costs = {}
        for cost in item.branch_costs:
            where = f"{path}.branch_costs[{cost.slot!r}]"
            milliseconds = [_optional_of(cost, f"step_milliseconds_{part}") for part in ("fixed", "per_size")]
            fixed = _in_kind(kind, cost.flops_fixed, cost.parameters_fixed, milliseconds[0], where)
            each = _in_kind(kind, cost.flops_per_size, cost.parameters_per_size, milliseconds[1], where)
            costs[cost.slot] = BranchCost(_finite(fixed, where, low=0), _finite(each, where, low=0))
        candidates.append(Candidate(item.blueprint, item.family, frozenset(item.slots), costs))
    return candidates


def _optional_of(message: topology_pb2.CostTerm | observation_pb2.BranchCost, field: str) -> float | None:
    # The stubs know the fields of each message by name; here they come with the message.
    return getattr(message, field) if message.HasField(field) else None  # type: ignore[arg-type]  # as above


def _in_kind(kind: BudgetKind, flops: float, parameters: float, milliseconds: float | None, path: str) -> float:
    """The price in the unit of the budget. Raises EsperError where time is counted and was not measured."""
    if kind is BudgetKind.LATENCY:
        if milliseconds is None:
            raise invalid(f"{path}.step_milliseconds", "it is absent and the budget counts time", "measure it")
        return milliseconds
    return flops if kind is BudgetKind.FLOPS else parameters


def _require(holds: bool, path: str, why: str, way_out: str) -> None:
    if not holds:
        raise invalid(path, why, way_out)


def _finite(value: float, path: str, *, low: float) -> float:
    _require(math.isfinite(value) and value >= low, path, f"{value} is not a number from {low:g} up", "measure it")
    return value


def _optional(item: topology_pb2.SlotHealth, name: _Measured, path: str) -> float | None:
    return _finite(getattr(item, name), f"{path}.{name}", low=0) if item.HasField(name) else None


def write_decision(decision: Decision) -> decision_pb2.Decision:
    """The decision as its contract has it."""
    plan = decision.plan
    message = decision_pb2.Decision(
        name=decision.name,
        run=decision.run,
        epoch=decision.epoch,
        policy=decision.policy,
        plan=[
            decision_pb2.SlotChange(slot=c.slot, blueprint=c.blueprint, size=c.size, reason=c.reason)
            for c in plan.changes
        ],
        evidence=[
            decision_pb2.SlotEvidence(
                slot=item.slot,
                width=item.width,
                planned_width=item.planned_width,
                need=item.need,
                chosen=item.chosen,
                reason=item.reason,
            )
            for item in plan.evidence
        ],
        explanation=plan.explanation,
        planned_cost=plan.cost,
        observation_digest=decision.observation_digest,
    )
    message.decide_time.FromDatetime(decision.decide_time)
    message.compute_duration.FromTimedelta(timedelta(seconds=decision.compute_seconds))
    return message


def write_policy(version: PolicyVersion) -> policy_pb2.Policy:
    """The version as its contract has it."""
    document = version.to_document()
    message = policy_pb2.Policy(
        name=version.name,
        algorithm=version.algorithm,
        version=version.version,
        active=version.active,
        parent=version.parent,
        description=ALGORITHMS[version.algorithm].DESCRIPTION,
        digest=Digest(algorithm=DIGEST_ALGORITHM_SHA256, value=version.digest),
        etag=version.etag,
    )
    message.parameters.update(document["parameters"])
    message.estimates.update(document["estimates"])
    message.create_time.FromDatetime(version.create_time)
    return message


def read_struct(message: Struct, field: str) -> dict[str, object]:
    """A Struct as plain Python.

    Raises:
        EsperError: INVALID_FIELD for a number that is none.
    """
    try:
        return dict(MessageToDict(message))
    except (SerializeToJsonError, ValueError) as error:
        raise invalid(field, "a number in it is infinite or none", "give finite numbers") from error

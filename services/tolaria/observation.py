"""From the engine's records to the messages of the contracts: what Tamiyo, the gateways and the bus are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1 import common_pb2
from esper.kasmina.v1 import kasmina_service_pb2, seed_pb2, topology_pb2
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from services.blueprints import families
from services.blueprints.spec import Blueprint, Interface
from services.blueprints.wire import interface_to_proto
from services.kasmina.engine import GrowthEngine
from services.kasmina.kernel_cache import CacheStats
from services.kasmina.lifecycle import SeedState
from services.kasmina.model import (
    Contribution,
    CostTerm,
    HealthReport,
    SeedRecord,
    SeedTransition,
    SlotInfo,
    SlotOccupancy,
    SlotStatus,
)
from services.tolaria.budget import Limit
from services.tolaria.latency import LatencyModel
from services.tolaria.names import run_name, seed_name, slot_name

_OCCUPANCY = {
    SlotOccupancy.FREE: topology_pb2.SLOT_OCCUPANCY_FREE,
    SlotOccupancy.OCCUPIED: topology_pb2.SLOT_OCCUPANCY_OCCUPIED,
    SlotOccupancy.EMBARGO: topology_pb2.SLOT_OCCUPANCY_EMBARGO,
    SlotOccupancy.LOCKED: topology_pb2.SLOT_OCCUPANCY_LOCKED,
}


_BUDGET_KINDS = {
    "flops": observation_pb2.BUDGET_KIND_FLOPS,
    "parameters": observation_pb2.BUDGET_KIND_PARAMETERS,
    "latency": observation_pb2.BUDGET_KIND_LATENCY,
}


def state_to_proto(state: SeedState) -> seed_pb2.SeedState.ValueType:
    """The contract's number of a lifecycle state; they are spelled alike."""
    return seed_pb2.SeedState.Value(f"SEED_STATE_{state.value}")


def interval_to_proto(contribution: Contribution | None) -> common_pb2.Interval | None:
    """A counterfactual as the contract has it; None stays absent."""
    if contribution is None:
        return None
    return common_pb2.Interval(
        value=contribution.points,
        low=contribution.low,
        high=contribution.high,
        confidence_ratio=contribution.confidence,
        samples=contribution.samples,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the trainer knows at a decision, apart from the network: ``epoch`` and ``step`` are completed ones."""

    run: str
    epoch: int
    step: int
    progress: float
    window: tuple[float, float]
    decisions_left: int
    limit: Limit
    latency: LatencyModel | None
    max_factor: float
    validation_accuracies: Sequence[float]
    seed: int


def observe(
    situation: Situation, engine: GrowthEngine, health: HealthReport | None, candidates: Iterable[Blueprint]
) -> observation_pb2.Observation:
    """Everything that the policy may base its decision on."""
    run, slots = situation.run, engine.slots()
    terms = engine.cost_terms()
    fitting = [_candidate(run, blueprint, slots, engine, situation.latency) for blueprint in candidates]
    return observation_pb2.Observation(
        run=run_name(run),
        epoch=situation.epoch,
        step=situation.step,
        progress_ratio=situation.progress,
        window_start_ratio=situation.window[0],
        window_end_ratio=situation.window[1],
        decisions_left=situation.decisions_left,
        budget=_budget(situation, terms, slots),
        slots=[_slot(run, slot, engine, situation.epoch) for slot in slots],
        health=health_to_proto(run, health) if health is not None else (),
        cost_terms=_cost_terms(run, terms, situation.latency),
        candidates=fitting,
        max_factor=situation.max_factor,
        validation_accuracy_percent=situation.validation_accuracies,
        seed=situation.seed,
        host_widths={slot_name(run, slot.name): slot.host_width for slot in slots},
    )


def cost(terms: Iterable[CostTerm], widths: Mapping[str, int], measure: str) -> float:
    """Cost of a network of these ``widths``: ``measure`` is ``flops`` (forward, per sample) or ``parameters``."""
    total = 0.0
    for term in terms:
        product = term.flops if measure == "flops" else term.parameters
        for slot in term.slots:
            product *= widths[slot]
        total += product
    return total


def spent(limit: Limit, latency: LatencyModel | None, terms: Sequence[CostTerm], slots: Sequence[SlotInfo]) -> float:
    """What the network costs in the unit of ``limit``, seeds under way included.

    So a budget is not spent twice while a kernel is compiled.
    """
    widths = {slot.name: slot.width for slot in slots}
    if limit.kind == "latency":
        assert latency is not None, "a limit of latency comes with what was measured"
        return latency.cost(terms, widths)
    return cost(terms, widths, limit.kind)


def topology(run: str, engine: GrowthEngine, *, epoch: int, step: int) -> topology_pb2.Topology:
    """The network as of now, for Kasmina's gateway."""
    return topology_pb2.Topology(
        run=run_name(run),
        slots=[_slot(run, slot, engine, epoch) for slot in engine.slots()],
        refused=dict(engine.refused()),
        cost_terms=_cost_terms(run, engine.cost_terms(), None),
        parameters=sum(parameter.numel() for parameter in engine.model.parameters()),
        flops=engine.flops(),
        step=step,
    )


def seed_to_proto(run: str, record: SeedRecord, transitions: Iterable[seed_pb2.SeedTransition]) -> seed_pb2.Seed:
    """A seed with its story so far."""
    return seed_pb2.Seed(
        name=seed_name(run, record.seed),
        slot=slot_name(run, record.slot),
        blueprint=f"blueprints/{record.blueprint}",
        family=record.family,
        kernel=f"blueprints/{record.blueprint}/kernels/{record.kernel[:32]}" if record.kernel else "",
        state=state_to_proto(record.state),
        size=record.size,
        alpha=record.alpha,
        birth_step=record.birth_step,
        parameters=record.parameters,
        flops=record.flops,
        contribution=interval_to_proto(record.contribution),
        plan_contribution=interval_to_proto(record.plan_contribution),
        command_id=record.command_id,
        reason=record.reason,
        transitions=transitions,
    )


def transition_to_proto(run: str, transition: SeedTransition, epoch: int) -> seed_pb2.SeedTransition:
    """One change of state, as of now."""
    return seed_pb2.SeedTransition(
        seed=seed_name(run, transition.seed),
        slot=slot_name(run, transition.slot),
        from_state=state_to_proto(transition.from_state),
        to_state=state_to_proto(transition.to_state),
        step=transition.step,
        epoch=epoch,
        command_id=transition.command_id,
        reason=transition.reason,
        transition_time=now(),
    )


def health_to_proto(run: str, health: HealthReport) -> list[topology_pb2.SlotHealth]:
    """Health of the slots; what was not measured stays absent."""
    return [
        topology_pb2.SlotHealth(
            slot=slot_name(run, slot.slot),
            width=slot.width,
            effective_rank=slot.effective_rank,
            participation_ratio=slot.participation_ratio,
            utilization_ratio=slot.utilization,
            dead_unit_ratio=slot.dead_ratio,
            gradient_norm=slot.gradient_norm,
            samples=slot.samples,
            unmeasured_reason=slot.unmeasured_reason,
        )
        for slot in health.slots
    ]


def health_report(run: str, health: HealthReport, epoch: int) -> kasmina_service_pb2.HealthReport:
    """Health as Kasmina's gateway shows it; ``epoch`` counts from 0."""
    return kasmina_service_pb2.HealthReport(
        run=run_name(run), epoch=epoch, slots=health_to_proto(run, health), measure_time=now()
    )


def cache_to_proto(stats: CacheStats) -> kasmina_service_pb2.CacheStats:
    """Figures of the kernel cache as Kasmina's gateway shows them."""
    latency = None
    if stats.load_seconds is not None:
        latency = Duration()
        latency.FromTimedelta(timedelta(seconds=stats.load_seconds))
    return kasmina_service_pb2.CacheStats(
        hits=stats.hits,
        misses=stats.misses,
        evictions=stats.evictions,
        kernels=stats.entries,
        held_bytes=stats.size_bytes,
        limit_bytes=stats.limit_bytes,
        load_latency=latency,
    )


def outcome_to_proto(run: str, record: SeedRecord, decision: str) -> outcome_pb2.Outcome:
    """What became of a seed, for Tamiyo; ``decision`` is a bare id, empty when a caller commanded the seed."""
    assert record.outcome is not None, "only a seed whose life is over has an outcome"
    return outcome_pb2.Outcome(
        seed=seed_name(run, record.seed),
        decision=f"decisions/{decision}" if decision else "",
        slot=slot_name(run, record.slot),
        blueprint=f"blueprints/{record.blueprint}",
        family=record.family,
        state=state_to_proto(record.outcome),
        contribution=interval_to_proto(record.contribution),
        parameters=record.parameters,
        flops=record.flops,
        reason=record.reason,
    )


def now() -> Timestamp:
    """The time of day."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def _budget(situation: Situation, terms: Sequence[CostTerm], slots: Sequence[SlotInfo]) -> observation_pb2.Budget:
    limit = situation.limit
    current = spent(limit, situation.latency, terms, slots)
    return observation_pb2.Budget(kind=_BUDGET_KINDS[limit.kind], limit=limit.value, current=current)


def _slot(run: str, slot: SlotInfo, engine: GrowthEngine, epoch: int) -> topology_pb2.Slot:
    status: SlotStatus = engine.slot_status(slot.name, epoch)
    return topology_pb2.Slot(
        name=slot_name(run, slot.name),
        kind=common_pb2.SlotKind.Value(f"SLOT_KIND_{slot.kind.name}"),
        width=slot.width,
        interface=interface_to_proto(engine.interface(slot.name)),
        occupancy=_OCCUPANCY[status.occupancy],
        free_epoch=status.free_epoch,
        penalties={f"blueprints/{blueprint}": penalty for blueprint, penalty in status.penalties.items()},
        seeds=[seed_name(run, seed) for seed in status.seeds],
    )


def _cost_terms(run: str, terms: Sequence[CostTerm], latency: LatencyModel | None) -> list[topology_pb2.CostTerm]:
    times: Sequence[float | None] = [None] * len(terms) if latency is None else latency.of_terms(terms)
    found = [
        topology_pb2.CostTerm(
            flops=term.flops,
            parameters=term.parameters,
            slots=[slot_name(run, slot) for slot in term.slots],
            step_milliseconds=time,
        )
        for term, time in zip(terms, times, strict=True)
    ]
    if latency is not None:
        found.append(topology_pb2.CostTerm(step_milliseconds=latency.overhead))
    return found


def _candidate(
    run: str, blueprint: Blueprint, slots: Iterable[SlotInfo], engine: GrowthEngine, latency: LatencyModel | None
) -> observation_pb2.Candidate:
    family = families.check(blueprint)
    places = [(slot.name, engine.interface(slot.name)) for slot in slots if slot.kind is family.slot_kind]
    fitting = [(name, interface) for name, interface in places if family.applies_to(interface) is None]
    return observation_pb2.Candidate(
        blueprint=f"blueprints/{blueprint.id}",
        family=family.name,
        slots=[slot_name(run, name) for name, _ in fitting],
        branch_costs=[
            _branch_cost(run, blueprint, name, interface, latency)
            for name, interface in fitting
            if family.path == "branch"
        ],
    )


def _branch_cost(
    run: str, blueprint: Blueprint, slot: str, interface: Interface, latency: LatencyModel | None
) -> observation_pb2.BranchCost:
    """A branch's cost is linear in its size: two sizes tell both parts."""
    family = families.check(blueprint)
    parameters = [family.parameters(blueprint.parameters, interface, size) for size in (1, 2)]
    flops = [family.flops(blueprint.parameters, interface, size) or 0 for size in (1, 2)]
    return observation_pb2.BranchCost(
        slot=slot_name(run, slot),
        flops_fixed=2 * flops[0] - flops[1],
        flops_per_size=flops[1] - flops[0],
        parameters_fixed=2 * parameters[0] - parameters[1],
        parameters_per_size=parameters[1] - parameters[0],
        step_milliseconds_fixed=None if latency is None else latency.other_rate * (2 * flops[0] - flops[1]),
        step_milliseconds_per_size=None if latency is None else latency.other_rate * (flops[1] - flops[0]),
    )

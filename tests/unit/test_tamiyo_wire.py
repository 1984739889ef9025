"""Tamiyo's wire: an observation is read whole or refused by the path of the field, a policy is told whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from google.protobuf.struct_pb2 import Struct

from esper.common.v1.common_pb2 import DIGEST_ALGORITHM_SHA256, SLOT_KIND_SPAN, SLOT_KIND_WIDTH
from esper.kasmina.v1 import topology_pb2
from esper.tamiyo.v1 import observation_pb2
from services.chassis.errors import EsperError
from services.tamiyo import wire
from services.tamiyo.observation import BranchCost, BudgetKind, Candidate, CostTerm, Occupancy, SlotKind
from services.tamiyo.policies.parameters import FamilyEstimate
from services.tamiyo.registry import PolicyVersion

_WIDTH, _SPAN = "runs/r/slots/conv1", "runs/r/slots/span:block"
_NAN, _INFINITE = float("nan"), float("inf")


def whole(
    kind: observation_pb2.BudgetKind.ValueType = observation_pb2.BUDGET_KIND_FLOPS,
) -> observation_pb2.Observation:
    """An observation in which every field that Tamiyo reads is set."""
    return observation_pb2.Observation(
        run="runs/r",
        epoch=3,
        progress_ratio=0.25,
        window_start_ratio=0.05,
        window_end_ratio=0.5,
        decisions_left=2,
        budget=observation_pb2.Budget(kind=kind, limit=500, current=100),
        slots=[
            topology_pb2.Slot(
                name=_WIDTH,
                kind=SLOT_KIND_WIDTH,
                width=6,
                occupancy=topology_pb2.SLOT_OCCUPANCY_EMBARGO,
                free_epoch=9,
                penalties={"blueprints/w": 0.5},
            ),
            topology_pb2.Slot(name=_SPAN, kind=SLOT_KIND_SPAN, width=8, occupancy=topology_pb2.SLOT_OCCUPANCY_FREE),
        ],
        health=[topology_pb2.SlotHealth(slot=_WIDTH, width=6, effective_rank=5.5, samples=200)],
        cost_terms=[topology_pb2.CostTerm(flops=10, parameters=2, slots=[_WIDTH, _WIDTH], step_milliseconds=0.5)],
        candidates=[
            observation_pb2.Candidate(
                blueprint="blueprints/b",
                family="residual_bottleneck",
                slots=[_SPAN],
                branch_costs=[
                    observation_pb2.BranchCost(
                        slot=_SPAN,
                        flops_fixed=1,
                        flops_per_size=2,
                        parameters_fixed=3,
                        parameters_per_size=4,
                        step_milliseconds_fixed=0.25,
                        step_milliseconds_per_size=0.125,
                    )
                ],
            )
        ],
        max_factor=2,
        seed=11,
        host_widths={_WIDTH: 4},
    )


def test_every_field_is_read() -> None:
    seen = wire.read_observation(whole())
    assert (seen.run, seen.epoch, seen.progress, seen.window) == ("runs/r", 3, 0.25, (0.05, 0.5))
    assert (seen.decisions_left, seen.max_factor, seen.seed) == (2, 2.0, 11)
    assert (seen.budget_kind, seen.budget_limit, seen.budget_current) == (BudgetKind.FLOPS, 500, 100)
    width, span = seen.slots
    assert (width.name, width.kind, width.width, width.host_width) == (_WIDTH, SlotKind.WIDTH, 6, 4)
    assert (width.occupancy, width.free_epoch, width.penalties) == (Occupancy.EMBARGO, 9, {"blueprints/w": 0.5})
    assert (span.kind, span.host_width, span.occupancy, span.free_epoch) == (SlotKind.SPAN, 8, Occupancy.FREE, None)
    assert width.health is not None
    assert (width.health.effective_rank, width.health.samples) == (5.5, 200)
    # What was not measured is None, never 0.
    assert (width.health.participation_ratio, width.health.dead_unit_ratio, span.health) == (None, None, None)
    assert seen.cost_terms == [CostTerm(10.0, (_WIDTH, _WIDTH))]
    costs = {_SPAN: BranchCost(1.0, 2.0)}
    assert seen.candidates == [Candidate("blueprints/b", "residual_bottleneck", frozenset({_SPAN}), costs)]


def test_costs_are_in_units_of_the_budget() -> None:
    seen = wire.read_observation(whole(observation_pb2.BUDGET_KIND_PARAMETERS))
    assert seen.budget_kind is BudgetKind.PARAMETERS
    assert seen.cost_terms[0].coefficient == 2
    assert seen.candidates[0].branch_costs[_SPAN] == BranchCost(3.0, 4.0)


def test_time_is_counted_where_it_was_measured() -> None:
    message = whole(observation_pb2.BUDGET_KIND_LATENCY)
    seen = wire.read_observation(message)
    assert seen.budget_kind is BudgetKind.LATENCY
    assert seen.cost_terms[0].coefficient == 0.5
    assert seen.candidates[0].branch_costs[_SPAN] == BranchCost(0.25, 0.125)
    message.candidates[0].branch_costs[0].ClearField("step_milliseconds_per_size")
    with pytest.raises(EsperError, match="absent and the budget counts time"):
        wire.read_observation(message)
    message.cost_terms[0].ClearField("step_milliseconds")
    with pytest.raises(EsperError) as caught:
        wire.read_observation(message)
    assert caught.value.violations[0].field == "observation.cost_terms[0].step_milliseconds"


_Spoil = Callable[[observation_pb2.Observation], object]


def _set(name: str, value: float) -> _Spoil:
    return lambda message: setattr(message, name, value)


def _penalty(value: float) -> _Spoil:
    return lambda message: message.slots[0].penalties.update({"blueprints/w": value})


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda m: setattr(m, "run", "r"), "observation.run"),
        (_set("max_factor", _NAN), "observation.max_factor"),
        (_set("max_factor", _INFINITE), "observation.max_factor"),
        (_set("window_start_ratio", _NAN), "observation.window_start_ratio"),
        (_set("window_end_ratio", 0.01), "observation.window_end_ratio"),
        (lambda m: setattr(m.budget, "current", _INFINITE), "observation.budget.current"),
        (lambda m: setattr(m.slots[0], "width", 2**20 + 1), "observation.slots[0].width"),
        (lambda m: m.host_widths.update({_WIDTH: 0}), f"observation.host_widths['{_WIDTH}']"),
        (_penalty(_NAN), "observation.slots[0].penalties"),
        (_penalty(-1), "observation.slots[0].penalties"),
        (lambda m: m.health.append(m.health[0]), "observation.health[1].slot"),
        (lambda m: setattr(m.health[0], "dead_unit_ratio", -0.5), "observation.health[0].dead_unit_ratio"),
        (lambda m: setattr(m.cost_terms[0], "flops", _NAN), "observation.cost_terms[0].flops"),
        (lambda m: m.cost_terms[0].slots.append(_SPAN), "observation.cost_terms[0].slots"),
        (lambda m: setattr(m.candidates[0], "blueprint", "b"), "observation.candidates[0].blueprint"),
        (
            lambda m: setattr(m.candidates[0].branch_costs[0], "flops_fixed", -1),
            f"observation.candidates[0].branch_costs['{_SPAN}']",
        ),
        (
            lambda m: setattr(m.candidates[0].branch_costs[0], "flops_per_size", _NAN),
            f"observation.candidates[0].branch_costs['{_SPAN}']",
        ),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused_by_their_path(spoil: _Spoil, field: str) -> None:
    message = whole()
    spoil(message)
    with pytest.raises(EsperError) as caught:
        wire.read_observation(message)
    assert caught.value.violations[0].field == field


def test_a_policy_is_told_whole() -> None:
    learned = {"widen": FamilyEstimate(outcomes=7, survival=0.5, contribution=None)}
    version = PolicyVersion("fixed", 3, {"plan": {"conv1": 2.0}}, learned, parent="policies/fixed@2", active=True)
    told = wire.write_policy(version)
    assert (told.name, told.algorithm, told.version, told.active) == ("policies/fixed@3", "fixed", 3, True)
    assert (told.parent, told.etag) == ("policies/fixed@2", version.etag)
    assert told.description
    assert (told.digest.algorithm, told.digest.value) == (DIGEST_ALGORITHM_SHA256, version.digest)
    assert wire.read_struct(told.parameters, "parameters") == {"plan": {"conv1": 2.0}}
    assert wire.read_struct(told.estimates, "e") == {"widen": {"outcomes": 7, "survival": 0.5, "contribution": None}}
    assert told.create_time.ToDatetime() == version.create_time.replace(tzinfo=None)


@pytest.mark.parametrize("value", [_NAN, _INFINITE, -_INFINITE])
def test_parameters_that_are_no_numbers_are_refused(value: float) -> None:
    message = Struct()
    message.fields["least_need"].number_value = value
    with pytest.raises(EsperError, match="give finite numbers") as caught:
        wire.read_struct(message, "parameters")
    assert caught.value.violations[0].field == "parameters"

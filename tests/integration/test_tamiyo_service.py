"""Tamiyo as a process: every rpc, typed errors with the field's path, nothing forgotten after kill -9."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from esper.common.v1.common_pb2 import SLOT_KIND_WIDTH, ChangeType, Interval
from esper.kasmina.v1 import seed_pb2, topology_pb2
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from esper.tamiyo.v1 import policy_service_pb2 as pb
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.chassis.channel import wait_until_serving
from services.chassis.errors import Reason, from_rpc_error
from tests.infrastructure.mesh import LiveMesh, live_mesh

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(180)]
_SLOT = "runs/r/slots/a"


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[LiveMesh]:
    async with live_mesh(tmp_path / "run", services=("tamiyo",)) as live:
        yield live


@pytest.fixture
def tamiyo(mesh: LiveMesh) -> Any:  # its stubs are typed for the synchronous API
    return PolicyServiceStub(mesh.channel("tamiyo"))


def seen() -> observation_pb2.Observation:
    """A network of one layer that is full."""
    free = topology_pb2.SLOT_OCCUPANCY_FREE
    return observation_pb2.Observation(
        run="runs/r",
        epoch=3,
        step=90,
        progress_ratio=0.1,
        window_start_ratio=0.05,
        window_end_ratio=0.3,
        decisions_left=1,
        budget=observation_pb2.Budget(kind=observation_pb2.BUDGET_KIND_FLOPS, limit=100, current=40),
        slots=[topology_pb2.Slot(name=_SLOT, kind=SLOT_KIND_WIDTH, width=4, occupancy=free)],
        health=[topology_pb2.SlotHealth(slot=_SLOT, width=4, effective_rank=3.9, samples=500)],
        cost_terms=[topology_pb2.CostTerm(flops=10, parameters=2, slots=[_SLOT])],
        candidates=[observation_pb2.Candidate(blueprint="blueprints/b", family="widen", slots=[_SLOT])],
        max_factor=2,
    )


def request(request_id: str, observation: observation_pb2.Observation | None = None) -> pb.DecideRequest:
    return pb.DecideRequest(
        observation=seen() if observation is None else observation, policy="policies/utilization", request_id=request_id
    )


async def test_decisions_versions_outcomes_and_pauses(mesh: LiveMesh, tamiyo: Any) -> None:
    watch = tamiyo.WatchDecisions(pb.WatchDecisionsRequest(run="runs/r"))
    assert (await watch.read()).change == ChangeType.CHANGE_TYPE_BOOKMARK
    decision = (await tamiyo.Decide(request("d1"), timeout=2)).decision
    assert [(change.slot, change.blueprint, change.size) for change in decision.plan] == [(_SLOT, "blueprints/b", 4)]
    assert decision.evidence[0].chosen
    assert decision.planned_cost == 80
    assert decision.policy == "policies/utilization@1"
    told = await watch.read()
    assert (told.change, told.decision) == (ChangeType.CHANGE_TYPE_ADDED, decision)
    watch.cancel()
    assert (await tamiyo.Decide(request("d1"))).decision == decision
    assert (await tamiyo.GetDecision(pb.GetDecisionRequest(name=decision.name))).decision == decision
    await tamiyo.Decide(request("d2"))
    page = await tamiyo.ListDecisions(pb.ListDecisionsRequest(run="runs/r", page_size=1))
    rest = await tamiyo.ListDecisions(
        pb.ListDecisionsRequest(run="runs/r", page_size=1, page_token=page.next_page_token)
    )
    assert rest.decisions == [decision]
    assert not rest.next_page_token

    outcome = outcome_pb2.Outcome(
        seed="runs/r/seeds/s", family="widen", state=seed_pb2.SEED_STATE_FOSSILIZED, contribution=Interval(value=2)
    )
    outcome.parameters, outcome.flops = 5, 50
    for _ in range(2):
        kept = await tamiyo.ReportOutcome(pb.ReportOutcomeRequest(outcome=outcome, request_id="o1"))
    assert kept.outcomes == 1
    learn = pb.CreatePolicyRequest(
        algorithm="utilization", learn_from_outcomes=pb.LearnFromOutcomes(min_outcomes=1), request_id="l1"
    )
    learned = (await tamiyo.CreatePolicy(learn)).policy
    assert learned.estimates["widen"]["contribution"] == 2
    strict = pb.CreatePolicyRequest(algorithm="utilization", request_id="p1")
    strict.parameters.update({"least_need": 0.999})
    made = (await tamiyo.CreatePolicy(strict)).policy
    assert (await tamiyo.CreatePolicy(strict)).policy == made
    active = await tamiyo.ActivatePolicy(pb.ActivatePolicyRequest(name=made.name, etag=made.etag, request_id="a1"))
    assert active.policy.active
    assert not (await tamiyo.Decide(request("d3"))).decision.plan
    listed = await tamiyo.ListPolicies(pb.ListPoliciesRequest(algorithm="utilization", page_size=2))
    assert [policy.version for policy in listed.policies] == [1, 2]
    more = await tamiyo.ListPolicies(
        pb.ListPoliciesRequest(algorithm="utilization", page_size=2, page_token=listed.next_page_token)
    )
    assert [policy.name for policy in more.policies] == [made.name]

    assert (await tamiyo.Pause(pb.PauseRequest(reason="look", request_id="x1"))).paused
    assert "paused (look)" in (await tamiyo.Decide(request("d4"))).decision.explanation
    mesh.kill("tamiyo")
    address = mesh.supervisor.services["tamiyo"].address or ""
    while mesh.supervisor.services["tamiyo"].restarts == 0:
        await asyncio.sleep(0.02)
    await wait_until_serving("tamiyo", address, tls_config=mesh.config.services.tls, timeout=30)
    assert (await tamiyo.Decide(request("d1"))).decision == decision
    assert "paused" in (await tamiyo.Decide(request("d5"))).decision.explanation
    assert not (await tamiyo.Resume(pb.ResumeRequest(request_id="x2"))).paused
    assert (await tamiyo.GetPolicy(pb.GetPolicyRequest(name="policies/utilization"))).policy.name == made.name


def _change(field: str, value: object) -> Callable[[observation_pb2.Observation], None]:
    def change(message: observation_pb2.Observation) -> None:
        setattr(message, field, value)

    return change


def _slot_change(**values: int | str) -> Callable[[observation_pb2.Observation], None]:
    def change(message: observation_pb2.Observation) -> None:
        for name, value in values.items():
            setattr(message.slots[0], name, value)

    return change


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (_change("run", ""), "observation.run"),
        (_change("decisions_left", 0), "observation.decisions_left"),
        (_change("max_factor", 1.0), "observation.max_factor"),
        (_change("progress_ratio", float("nan")), "observation.progress_ratio"),
        (lambda m: setattr(m.budget, "kind", 0), "observation.budget.kind"),
        (lambda m: setattr(m.budget, "limit", -1), "observation.budget.limit"),
        (_slot_change(width=0), "observation.slots[0].width"),
        (_slot_change(name=""), "observation.slots[0].name"),
        (_slot_change(kind=0), "observation.slots[0].kind"),
        (_slot_change(occupancy=0), "observation.slots[0].occupancy"),
        (lambda m: m.slots.append(m.slots[0]), "observation.slots[1].name"),
        (lambda m: setattr(m.health[0], "slot", "stranger"), "observation.health"),
        (lambda m: setattr(m.health[0], "effective_rank", float("inf")), "observation.health[0].effective_rank"),
        (lambda m: m.cost_terms[0].slots.append("stranger"), "observation.cost_terms[0].slots"),
        (lambda m: setattr(m.cost_terms[0], "flops", -1), "observation.cost_terms[0].flops"),
        (lambda m: m.candidates[0].slots.append("stranger"), "observation.candidates[0].slots"),
    ],
)
def test_every_field_of_an_observation_is_checked(
    spoil: Callable[[observation_pb2.Observation], object], field: str
) -> None:
    from services.chassis.errors import EsperError
    from services.tamiyo.wire import read_observation

    message = seen()
    read_observation(message)
    spoil(message)
    with pytest.raises(EsperError) as caught:
        read_observation(message)
    assert caught.value.violations[0].field == field


async def test_bad_requests_name_the_field_over_the_wire(tamiyo: Any) -> None:
    spoiled = seen()
    spoiled.slots[0].width = 0
    no_source = pb.CreatePolicyRequest(algorithm="utilization", request_id="r")
    other = request("same")
    other.policy = "policies/uniform"
    await tamiyo.Decide(request("same"))
    calls = [
        (tamiyo.Decide(request("")), Reason.REQUIRED_FIELD, "request_id"),
        (tamiyo.Decide(pb.DecideRequest(request_id="r", policy="p")), Reason.REQUIRED_FIELD, "observation"),
        (tamiyo.Decide(pb.DecideRequest(request_id="r", observation=seen())), Reason.REQUIRED_FIELD, "policy"),
        (tamiyo.Decide(request("r", spoiled)), Reason.INVALID_FIELD, "observation.slots[0].width"),
        (tamiyo.Decide(other), Reason.REQUEST_ID_REUSED, ""),
        (tamiyo.GetDecision(pb.GetDecisionRequest()), Reason.REQUIRED_FIELD, "name"),
        (tamiyo.GetDecision(pb.GetDecisionRequest(name="decisions/x")), Reason.DECISION_NOT_FOUND, ""),
        (tamiyo.GetPolicy(pb.GetPolicyRequest()), Reason.REQUIRED_FIELD, "name"),
        (tamiyo.ActivatePolicy(pb.ActivatePolicyRequest(request_id="r")), Reason.REQUIRED_FIELD, "name"),
        (
            tamiyo.ActivatePolicy(pb.ActivatePolicyRequest(name="policies/x", request_id="r")),
            Reason.POLICY_NOT_FOUND,
            "",
        ),
        (tamiyo.CreatePolicy(pb.CreatePolicyRequest(request_id="r")), Reason.REQUIRED_FIELD, "algorithm"),
        (tamiyo.CreatePolicy(no_source), Reason.REQUIRED_FIELD, "source"),
        (tamiyo.ReportOutcome(pb.ReportOutcomeRequest(request_id="r")), Reason.REQUIRED_FIELD, "outcome.seed"),
        (
            tamiyo.ReportOutcome(pb.ReportOutcomeRequest(request_id="r", outcome=outcome_pb2.Outcome(seed="s"))),
            Reason.INVALID_FIELD,
            "outcome.state",
        ),
    ]
    for call, reason, field in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = from_rpc_error(caught.value)
        assert error.reason is reason
        assert error.metadata.get("field", "") == field

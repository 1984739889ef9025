"""Tamiyo alone in its process: every rpc, watches that end with the drain, memory that outlives kill -9."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from esper.common.v1.common_pb2 import ChangeType, Interval
from esper.kasmina.v1 import seed_pb2
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from esper.tamiyo.v1 import policy_service_pb2 as pb
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.chassis.errors import Reason, RemoteError, from_rpc_error
from services.chassis.ids import new_id
from tests.infrastructure.single_service import SingleService, single_service
from tests.unit.test_tamiyo_wire import whole

pytestmark = [pytest.mark.fast, pytest.mark.timeout(120)]
_SECONDS = 20.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SingleService]:
    with single_service("tamiyo", tmp_path_factory.mktemp("tamiyo")) as running:
        yield running


@pytest.fixture
async def tamiyo(service: SingleService) -> AsyncIterator[Any]:  # its stubs are typed for the synchronous API
    async with grpc.aio.insecure_channel(service.address) as channel:
        yield PolicyServiceStub(channel)


def deciding(run: str, request_id: str = "", **changes: Any) -> pb.DecideRequest:
    seen = whole()
    seen.run = run
    seen.slots[0].occupancy = seen.slots[1].occupancy  # free
    seen.candidates.append(
        observation_pb2.Candidate(blueprint="blueprints/w", family="widen", slots=[seen.slots[0].name])
    )
    fields: dict[str, Any] = {"observation": seen, "policy": "policies/uniform", "request_id": request_id}
    return pb.DecideRequest(**{**fields, **changes})


def outcome(**changes: Any) -> outcome_pb2.Outcome:
    fields: dict[str, Any] = {"seed": "runs/r/seeds/s", "family": "widen", "state": seed_pb2.SEED_STATE_FOSSILIZED}
    return outcome_pb2.Outcome(**{**fields, **changes})


async def refusal(call: Any) -> RemoteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_watch_begins_with_what_was_decided_goes_on_and_resumes(tamiyo: Any) -> None:
    run = f"runs/{new_id()}"
    first = (await tamiyo.Decide(deciding(run, new_id()))).decision
    assert first.plan
    watch = tamiyo.WatchDecisions(pb.WatchDecisionsRequest(run=run), timeout=_SECONDS)
    told, bookmark = await watch.read(), await watch.read()
    assert (told.change, told.decision) == (ChangeType.CHANGE_TYPE_SNAPSHOT, first)
    assert bookmark.change == ChangeType.CHANGE_TYPE_BOOKMARK
    # A watch that is cut within the snapshot has to begin anew.
    assert not told.resume_token
    watch.cancel()
    await tamiyo.Decide(deciding(f"runs/{new_id()}", new_id()))
    second = (await tamiyo.Decide(deciding(run, new_id()))).decision
    resumed = tamiyo.WatchDecisions(
        pb.WatchDecisionsRequest(run=run, resume_token=bookmark.resume_token), timeout=_SECONDS
    )
    told = await resumed.read()
    assert (told.change, told.decision) == (ChangeType.CHANGE_TYPE_ADDED, second)
    assert told.revision > bookmark.revision
    resumed.cancel()
    stale = tamiyo.WatchDecisions(pb.WatchDecisionsRequest(resume_token="nonsense"), timeout=_SECONDS)
    assert (await refusal(stale.read())).reason is Reason.RESUME_TOKEN_EXPIRED


async def test_lists_are_paged_and_bound_to_their_filter(tamiyo: Any) -> None:
    run = f"runs/{new_id()}"
    made = [(await tamiyo.Decide(deciding(run, new_id()))).decision for _ in range(3)]
    page = await tamiyo.ListDecisions(pb.ListDecisionsRequest(run=run, page_size=2))
    assert list(page.decisions) == [made[2], made[1]]
    more = pb.ListDecisionsRequest(run=run, page_size=2, page_token=page.next_page_token)
    assert list((await tamiyo.ListDecisions(more)).decisions) == [made[0]]
    assert (await tamiyo.GetDecision(pb.GetDecisionRequest(name=made[0].name))).decision == made[0]
    other = pb.ListDecisionsRequest(run="runs/other", page_token=page.next_page_token)
    assert (await refusal(tamiyo.ListDecisions(other))).reason is Reason.INVALID_PAGE_TOKEN
    strange = pb.ListPoliciesRequest(page_token=page.next_page_token)
    assert (await refusal(tamiyo.ListPolicies(strange))).reason is Reason.INVALID_PAGE_TOKEN
    listed = await tamiyo.ListPolicies(pb.ListPoliciesRequest(page_size=2))
    rest = await tamiyo.ListPolicies(pb.ListPoliciesRequest(page_token=listed.next_page_token))
    names = [policy.name for policy in (*listed.policies, *rest.policies)]
    assert names == sorted(names)
    assert {"policies/fixed@1", "policies/utilization@1"} <= set(names)


async def test_versions_are_made_learned_activated_and_rolled_back(tamiyo: Any) -> None:
    create = pb.CreatePolicyRequest(algorithm="random", request_id=new_id())
    create.parameters.update({"concentration": 5})
    made = (await tamiyo.CreatePolicy(create)).policy
    assert (await tamiyo.CreatePolicy(create)).policy == made
    assert made.parameters["concentration"] == 5
    activate = pb.ActivatePolicyRequest(name=made.name, etag=made.etag, request_id=new_id())
    active = (await tamiyo.ActivatePolicy(activate)).policy
    assert active.active
    assert (await tamiyo.ActivatePolicy(activate)).policy == active
    assert (await tamiyo.GetPolicy(pb.GetPolicyRequest(name="policies/random"))).policy == active
    back = pb.ActivatePolicyRequest(name=made.parent, request_id=new_id())
    assert (await tamiyo.ActivatePolicy(back)).policy.active
    assert not (await tamiyo.GetPolicy(pb.GetPolicyRequest(name=made.name))).policy.active
    learn = pb.CreatePolicyRequest(
        algorithm="utilization", learn_from_outcomes=pb.LearnFromOutcomes(), request_id=new_id()
    )
    assert (await refusal(tamiyo.CreatePolicy(learn))).reason is Reason.NO_OUTCOMES
    for number in range(5):
        told = outcome(seed=f"runs/r/seeds/{number}", contribution=Interval(value=number, low=0, high=9))
        kept = await tamiyo.ReportOutcome(pb.ReportOutcomeRequest(outcome=told, request_id=new_id()))
    assert kept.outcomes == 5
    # The failure was not kept: the same request succeeds now.
    learned = (await tamiyo.CreatePolicy(learn)).policy
    assert dict(learned.estimates["widen"]) == {"outcomes": 5, "survival": 1, "contribution": 2}


async def test_a_pause_answers_with_its_reason(tamiyo: Any) -> None:
    assert (await tamiyo.Pause(pb.PauseRequest(reason="maintenance", request_id=new_id()))).paused
    decision = (await tamiyo.Decide(deciding("runs/p", new_id()))).decision
    assert not decision.plan
    assert "maintenance" in decision.explanation
    assert [item.slot for item in decision.evidence] == [slot.name for slot in whole().slots]
    assert not (await tamiyo.Resume(pb.ResumeRequest(request_id=new_id()))).paused
    assert (await tamiyo.Decide(deciding("runs/p", new_id()))).decision.plan


async def test_bad_requests_name_field_and_reason(tamiyo: Any) -> None:
    nan = pb.CreatePolicyRequest(algorithm="random", request_id="n")
    nan.parameters.fields["concentration"].number_value = float("inf")
    unknown = pb.CreatePolicyRequest(algorithm="magic", request_id="u")
    unknown.parameters.SetInParent()
    no_run = deciding("r", "x")
    endless = outcome(contribution=Interval(value=float("nan")))
    report = pb.ReportOutcomeRequest
    calls = [
        (tamiyo.Decide(deciding("runs/r")), Reason.REQUIRED_FIELD, "request_id"),
        (tamiyo.Decide(pb.DecideRequest(request_id="r", policy="p")), Reason.REQUIRED_FIELD, "observation"),
        (tamiyo.Decide(deciding("runs/r", "r", policy="")), Reason.REQUIRED_FIELD, "policy"),
        (tamiyo.Decide(deciding("runs/r", "r", policy="policies/")), Reason.POLICY_NOT_FOUND, None),
        (tamiyo.Decide(no_run), Reason.INVALID_NAME, "observation.run"),
        (tamiyo.GetDecision(pb.GetDecisionRequest()), Reason.REQUIRED_FIELD, "name"),
        (tamiyo.GetDecision(pb.GetDecisionRequest(name="x" * 50_000)), Reason.DECISION_NOT_FOUND, None),
        (tamiyo.GetPolicy(pb.GetPolicyRequest()), Reason.REQUIRED_FIELD, "name"),
        (tamiyo.GetPolicy(pb.GetPolicyRequest(name="é" * 50_000)), Reason.POLICY_NOT_FOUND, None),
        (tamiyo.ActivatePolicy(pb.ActivatePolicyRequest(request_id="r")), Reason.REQUIRED_FIELD, "name"),
        (tamiyo.CreatePolicy(pb.CreatePolicyRequest(request_id="r")), Reason.REQUIRED_FIELD, "algorithm"),
        (
            tamiyo.CreatePolicy(pb.CreatePolicyRequest(algorithm="random", request_id="r")),
            Reason.REQUIRED_FIELD,
            "source",
        ),
        (tamiyo.CreatePolicy(nan), Reason.INVALID_FIELD, "parameters"),
        (tamiyo.CreatePolicy(unknown), Reason.UNKNOWN_ALGORITHM, None),
        (tamiyo.Pause(pb.PauseRequest()), Reason.REQUIRED_FIELD, "request_id"),
        (tamiyo.ListDecisions(pb.ListDecisionsRequest(page_size=-1)), Reason.INVALID_FIELD, "page_size"),
        (tamiyo.ReportOutcome(report(outcome=outcome())), Reason.REQUIRED_FIELD, "request_id"),
        (tamiyo.ReportOutcome(report(request_id="r")), Reason.REQUIRED_FIELD, "outcome.seed"),
        (
            tamiyo.ReportOutcome(report(request_id="r", outcome=outcome(state=seed_pb2.SEED_STATE_TRAINING))),
            Reason.INVALID_FIELD,
            "outcome.state",
        ),
        (
            tamiyo.ReportOutcome(report(request_id="r", outcome=outcome(state=99))),
            Reason.INVALID_FIELD,
            "outcome.state",
        ),
        (
            tamiyo.ReportOutcome(report(request_id="r", outcome=endless)),
            Reason.INVALID_FIELD,
            "outcome.contribution.value",
        ),
    ]
    for call, reason, field in calls:
        error = await refusal(call)
        assert error.reason is reason
        assert [violation.field for violation in error.violations] == ([] if field is None else [field])


async def test_what_was_answered_survives_a_kill_and_a_drain_ends_watches(tmp_path: Path) -> None:
    with single_service("tamiyo", tmp_path) as first:
        async with grpc.aio.insecure_channel(first.address) as channel:
            stub: Any = PolicyServiceStub(channel)
            decision = (await stub.Decide(deciding("runs/r", "d1"))).decision
            create = pb.CreatePolicyRequest(algorithm="random", request_id="c")
            create.parameters.update({"concentration": 3})
            made = (await stub.CreatePolicy(create)).policy
            choose = pb.ActivatePolicyRequest(name=made.name, etag=made.etag, request_id="a")
            made = (await stub.ActivatePolicy(choose)).policy
            await stub.ReportOutcome(pb.ReportOutcomeRequest(outcome=outcome(), request_id="o1"))
            await stub.Pause(pb.PauseRequest(reason="night", request_id="p"))
            watch = stub.WatchDecisions(pb.WatchDecisionsRequest())
            token = [(await watch.read()).resume_token for _ in range(2)][1]
            first.kill()
            assert (await refusal(watch.read())).reason is Reason.UNAVAILABLE
    with single_service("tamiyo", tmp_path, port=int(first.address.rsplit(":", 1)[1])) as second:
        assert second.address == first.address
        async with grpc.aio.insecure_channel(second.address) as channel:
            stub = PolicyServiceStub(channel)
            assert (await stub.Decide(deciding("runs/r", "d1"))).decision == decision
            again = deciding("runs/r", "d1", policy="policies/random")
            assert (await refusal(stub.Decide(again))).reason is Reason.REQUEST_ID_REUSED
            assert "night" in (await stub.Decide(deciding("runs/r", "d2"))).decision.explanation
            assert (await stub.GetPolicy(pb.GetPolicyRequest(name="policies/random"))).policy == made
            # Asked again by somebody who did not hear the answers: no second version, and no complaint of the etag.
            assert (await stub.CreatePolicy(create)).policy == made
            assert (await stub.ActivatePolicy(choose)).policy == made
            create.parameters.update({"concentration": 4})
            assert (await refusal(stub.CreatePolicy(create))).reason is Reason.REQUEST_ID_REUSED
            listed = (await stub.ListPolicies(pb.ListPoliciesRequest(algorithm="random"))).policies
            assert [policy.name for policy in listed] == ["policies/random@1", made.name]
            for request_id, kept in (("o1", 1), ("o2", 2)):
                told = pb.ReportOutcomeRequest(outcome=outcome(), request_id=request_id)
                assert (await stub.ReportOutcome(told)).outcomes == kept
            # A token of the process that is gone means nothing here.
            stale = stub.WatchDecisions(pb.WatchDecisionsRequest(resume_token=token))
            assert (await refusal(stale.read())).reason is Reason.RESUME_TOKEN_EXPIRED
            watch = stub.WatchDecisions(pb.WatchDecisionsRequest())
            while (await watch.read()).change != ChangeType.CHANGE_TYPE_BOOKMARK:
                pass
            second.drain()
            async with asyncio.timeout(_SECONDS):
                assert await watch.read() is grpc.aio.EOF
                assert await watch.code() is grpc.StatusCode.OK

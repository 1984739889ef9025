"""gRPC face of Tamiyo: translates, checks, and hands over to the core."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from grpc.aio import ServicerContext

from esper.common.v1.common_pb2 import ChangeType
from esper.kasmina.v1.seed_pb2 import SeedState
from esper.tamiyo.v1 import policy_service_pb2 as pb
from esper.tamiyo.v1.outcome_pb2 import Outcome
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceServicer
from services.chassis.errors import invalid, required
from services.chassis.idempotency import RequestCache, digest_of
from services.chassis.pagination import decode_offset, encode_token, page_size_of
from services.chassis.watch import WatchHub
from services.tamiyo import wire
from services.tamiyo.decisions import Decision, DecisionMaker
from services.tamiyo.registry import PolicyRegistry
from services.tamiyo.store import Request, Store

_T = TypeVar("_T")

_FINAL_STATES = frozenset({"FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"})
_SNAPSHOT_DECISIONS = 50


class PolicyServicer(PolicyServiceServicer):
    """``esper.tamiyo.v1.PolicyService``.

    The core is one-threaded and touches a database, so its calls run in a pool of one thread, off the loop.
    """

    def __init__(
        self, store: Store, registry: PolicyRegistry, maker: DecisionMaker, *, draining: asyncio.Event
    ) -> None:
        self._store = store
        self._registry = registry
        self._maker = maker
        self._draining = draining
        self._hub: WatchHub[Decision] = WatchHub()
        self._requests = RequestCache()
        self._core = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tamiyo-core")

    def close(self) -> None:
        """Wait for the core's last call and end its thread."""
        self._core.shutdown()

    async def _run(self, work: Callable[..., _T], *arguments: Any, **keywords: Any) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._core, lambda: work(*arguments, **keywords))

    async def _once(self, method: str, request: Any, work: Callable[..., _T], *arguments: Any, **keywords: Any) -> _T:
        return await self._requests.once(method, request, lambda: self._run(work, *arguments, **keywords))

    async def Decide(
        self, request: pb.DecideRequest, context: ServicerContext[pb.DecideRequest, pb.DecideResponse]
    ) -> pb.DecideResponse:
        """See the contract."""
        _require_request_id(request)
        if not request.HasField("observation"):
            raise required("observation")
        if not request.policy:
            raise required("policy")
        observation = wire.read_observation(request.observation)
        decision, new = await self._run(
            self._maker.decide,
            observation,
            request.policy,
            request_id=request.request_id,
            digest=digest_of(request.observation),
            request_digest=digest_of(request),
        )
        if new:
            self._hub.publish(decision, ChangeType.CHANGE_TYPE_ADDED)
        return pb.DecideResponse(decision=wire.write_decision(decision))

    async def ReportOutcome(
        self,
        request: pb.ReportOutcomeRequest,
        context: ServicerContext[pb.ReportOutcomeRequest, pb.ReportOutcomeResponse],
    ) -> pb.ReportOutcomeResponse:
        """See the contract."""
        _require_request_id(request)
        document = _outcome_document(request.outcome)
        await self._run(self._store.add_outcome, request.request_id, document)
        return pb.ReportOutcomeResponse(outcomes=await self._run(self._store.outcome_count))

    async def GetDecision(
        self, request: pb.GetDecisionRequest, context: ServicerContext[pb.GetDecisionRequest, pb.GetDecisionResponse]
    ) -> pb.GetDecisionResponse:
        """See the contract."""
        if not request.name:
            raise required("name")
        return pb.GetDecisionResponse(decision=wire.write_decision(await self._run(self._maker.get, request.name)))

    async def ListDecisions(
        self,
        request: pb.ListDecisionsRequest,
        context: ServicerContext[pb.ListDecisionsRequest, pb.ListDecisionsResponse],
    ) -> pb.ListDecisionsResponse:
        """See the contract."""
        scope = {"decisions of": request.run}
        size = page_size_of(request.page_size)
        before = decode_offset(scope, request.page_token) if request.page_token else None
        page = await self._run(self._maker.page, request.run, before, size + 1)
        token = encode_token(scope, str(page[size - 1][0])) if len(page) > size else ""
        decisions = [wire.write_decision(decision) for _, decision in page[:size]]
        return pb.ListDecisionsResponse(decisions=decisions, next_page_token=token)

    async def WatchDecisions(
        self,
        request: pb.WatchDecisionsRequest,
        context: ServicerContext[pb.WatchDecisionsRequest, pb.WatchDecisionsResponse],
    ) -> AsyncIterator[pb.WatchDecisionsResponse]:
        """See the contract. The snapshot holds the newest 50 decisions, oldest first."""
        resuming = bool(request.resume_token)
        recent = [] if resuming else await self._run(self._maker.page, request.run, None, _SNAPSHOT_DECISIONS)

        def snapshot() -> Iterable[Decision]:
            return [decision for _, decision in reversed(recent)]

        def match(decision: Decision) -> bool:
            return request.run in ("", decision.run)

        stream = self._hub.watch(
            snapshot=snapshot, match=match, resume_token=request.resume_token or None, draining=self._draining
        )
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield pb.WatchDecisionsResponse(
                    change=item.change,
                    decision=None if item.item is None else wire.write_decision(item.item),
                    revision=item.revision,
                    resume_token=item.token,
                )

    async def GetPolicy(
        self, request: pb.GetPolicyRequest, context: ServicerContext[pb.GetPolicyRequest, pb.GetPolicyResponse]
    ) -> pb.GetPolicyResponse:
        """See the contract."""
        if not request.name:
            raise required("name")
        return pb.GetPolicyResponse(policy=wire.write_policy(await self._run(self._registry.get, request.name)))

    async def ListPolicies(
        self, request: pb.ListPoliciesRequest, context: ServicerContext[pb.ListPoliciesRequest, pb.ListPoliciesResponse]
    ) -> pb.ListPoliciesResponse:
        """See the contract."""
        scope = {"versions of": request.algorithm}
        size = page_size_of(request.page_size)
        start = decode_offset(scope, request.page_token)
        versions = await self._run(self._registry.versions, request.algorithm)
        token = encode_token(scope, str(start + size)) if len(versions) > start + size else ""
        policies = [wire.write_policy(version) for version in versions[start : start + size]]
        return pb.ListPoliciesResponse(policies=policies, next_page_token=token)

    async def ActivatePolicy(
        self,
        request: pb.ActivatePolicyRequest,
        context: ServicerContext[pb.ActivatePolicyRequest, pb.ActivatePolicyResponse],
    ) -> pb.ActivatePolicyResponse:
        """See the contract."""
        if not request.name:
            raise required("name")
        asked = _asked("ActivatePolicy", request)
        version = await self._run(self._registry.activate, request.name, etag=request.etag, request=asked)
        return pb.ActivatePolicyResponse(policy=wire.write_policy(version))

    async def CreatePolicy(
        self, request: pb.CreatePolicyRequest, context: ServicerContext[pb.CreatePolicyRequest, pb.CreatePolicyResponse]
    ) -> pb.CreatePolicyResponse:
        """See the contract."""
        if not request.algorithm:
            raise required("algorithm")
        match request.WhichOneof("source"):
            case "parameters":
                parameters = wire.read_struct(request.parameters, "parameters")
                asked = _asked("CreatePolicy", request)
                version = await self._run(self._registry.create, request.algorithm, parameters, request=asked)
            case "learn_from_outcomes":
                least = request.learn_from_outcomes.min_outcomes or 5
                asked = _asked("CreatePolicy", request)
                version = await self._run(self._registry.learn, request.algorithm, min_outcomes=least, request=asked)
            case _:
                raise required("source")
        return pb.CreatePolicyResponse(policy=wire.write_policy(version))

    async def Pause(
        self, request: pb.PauseRequest, context: ServicerContext[pb.PauseRequest, pb.PauseResponse]
    ) -> pb.PauseResponse:
        """See the contract."""
        await self._once("Pause", request, self._maker.pause, request.reason)
        return pb.PauseResponse(paused=True)

    async def Resume(
        self, request: pb.ResumeRequest, context: ServicerContext[pb.ResumeRequest, pb.ResumeResponse]
    ) -> pb.ResumeResponse:
        """See the contract."""
        await self._once("Resume", request, self._maker.resume)
        return pb.ResumeResponse(paused=False)


def _require_request_id(request: Any) -> None:
    if not request.request_id:
        raise required("request_id")


def _asked(method: str, request: Any) -> Request:
    _require_request_id(request)
    return Request(method, request.request_id, digest_of(request))


def _outcome_document(outcome: Outcome) -> dict[str, Any]:
    if not outcome.seed:
        raise required("outcome.seed")
    state = SeedState.Name(outcome.state).removeprefix("SEED_STATE_") if outcome.state in SeedState.values() else ""
    if state not in _FINAL_STATES:
        raise invalid("outcome.state", "it is no final state", f"use one of {', '.join(sorted(_FINAL_STATES))}")
    value = outcome.contribution.value if outcome.HasField("contribution") else None
    if value is not None and not math.isfinite(value):
        raise invalid("outcome.contribution.value", f"{value} is no number", "leave it out where it was not measured")
    return {
        "seed": outcome.seed,
        "decision": outcome.decision,
        "slot": outcome.slot,
        "blueprint": outcome.blueprint,
        "family": outcome.family,
        "state": state,
        "contribution": value,
        "parameters": outcome.parameters if outcome.HasField("parameters") else None,
        "flops": outcome.flops if outcome.HasField("flops") else None,
        "reason": outcome.reason,
    }

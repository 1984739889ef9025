"""Deciding, with a memory: the same request gives the same decision, also after a restart."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from services.chassis.errors import EsperError, Reason
from services.chassis.idempotency import reused
from services.chassis.ids import new_id
from services.tamiyo.observation import Change, Evidence, Observation, Plan
from services.tamiyo.policies import ALGORITHMS
from services.tamiyo.policies.planning import closed, nothing
from services.tamiyo.registry import PolicyRegistry, PolicyVersion
from services.tamiyo.store import Store

_PAUSE_KEY = "pause_reason"


@dataclass(frozen=True)
class Decision:
    """A plan as it was given: who made it, for what, when, and how long it took (seconds)."""

    name: str
    run: str
    epoch: int
    policy: str
    plan: Plan
    observation_digest: str
    decide_time: datetime
    compute_seconds: float

    def to_document(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "decide_time": self.decide_time.isoformat()}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Decision:
        """The decision that :meth:`to_document` described."""
        plan = document["plan"]
        changes = tuple(Change(**change) for change in plan["changes"])
        evidence = tuple(Evidence(**item) for item in plan["evidence"])
        restored = Plan(changes, evidence, plan["explanation"], plan["cost"])
        moment = datetime.fromisoformat(document["decide_time"])
        return cls(**{**document, "plan": restored, "decide_time": moment})


class DecisionMaker:
    """Answers observations with decisions and keeps them. Not for use by two threads at once."""

    def __init__(self, store: Store, registry: PolicyRegistry) -> None:
        self._store = store
        self._registry = registry

    @property
    def pause_reason(self) -> str | None:
        """Why decisions are paused, or ``None`` while they are not."""
        return self._store.setting(_PAUSE_KEY)

    def pause(self, reason: str) -> None:
        """Answer every observation with an empty plan until :meth:`resume`."""
        self._store.set_setting(_PAUSE_KEY, reason)

    def resume(self) -> None:
        """Decide again."""
        self._store.set_setting(_PAUSE_KEY, None)

    def decide(
        self, observation: Observation, policy: str, *, request_id: str, digest: str, request_digest: str
    ) -> tuple[Decision, bool]:
        """The decision for a request, and whether it is new.

        Args:
            observation: what the policy sees.
            policy: a version, or an algorithm for its active version.
            request_id: the same id gives the decision made the first time.
            digest: SHA-256 of the observation, hex; kept with the decision.
            request_digest: SHA-256 of the whole request, to tell a retry from a reused id.

        Raises:
            EsperError: POLICY_NOT_FOUND, REQUEST_ID_REUSED.
        """
        if (known := self._decided(request_id, request_digest)) is not None:
            return known, False
        version = self._registry.get(policy)
        started = time.perf_counter()
        plan = self._plan(observation, version)
        decision = Decision(
            name=f"decisions/{new_id()}",
            run=observation.run,
            epoch=observation.epoch,
            policy=version.name,
            plan=plan,
            observation_digest=digest,
            decide_time=datetime.now(UTC),
            compute_seconds=time.perf_counter() - started,
        )
        if self._store.add_decision(decision.name, decision.run, request_id, request_digest, decision.to_document()):
            return decision, True
        # Another Tamiyo on the same database answered the same request meanwhile: the first answer stands.
        return self._decided(request_id, request_digest) or decision, False

    def _decided(self, request_id: str, request_digest: str) -> Decision | None:
        known = self._store.decision_of_request(request_id)
        if known is None:
            return None
        if known[0] != request_digest:
            raise reused(request_id)
        return Decision.from_document(known[1])

    def _plan(self, observation: Observation, version: PolicyVersion) -> Plan:
        if (paused := self.pause_reason) is not None:
            return nothing(observation, f"No adaptation: decisions are paused ({paused or 'no reason given'}).")
        if (why := closed(observation)) is not None:
            return nothing(observation, why)
        return ALGORITHMS[version.algorithm].decide(observation, version.parameters, version.estimates)

    def get(self, name: str) -> Decision:
        """A decision by name.

        Raises:
            EsperError: DECISION_NOT_FOUND.
        """
        document = self._store.decision(name)
        if document is None:
            raise EsperError(
                f"there is no decision {name!r}, or it is older than those kept", reason=Reason.DECISION_NOT_FOUND
            )
        return Decision.from_document(document)

    def page(self, run: str, before: int | None, limit: int) -> list[tuple[int, Decision]]:
        """(position, decision), newest first, older than position ``before``."""
        return [(n, Decision.from_document(document)) for n, document in self._store.decisions(run, before, limit)]

"""The policy registry: immutable versions, one of them active per algorithm, learned ones among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Self

from services.chassis.errors import EsperError, Reason, invalid, not_found
from services.chassis.idempotency import reused
from services.tamiyo.learning import learn
from services.tamiyo.policies import ALGORITHMS, Estimates, Parameters
from services.tamiyo.policies.parameters import FamilyEstimate
from services.tamiyo.store import Request, Store


@dataclass(frozen=True)
class PolicyVersion:
    """One immutable version of a policy; only ``active`` ever changes."""

    algorithm: str
    version: int
    parameters: Parameters
    estimates: Estimates = field(default_factory=dict)
    parent: str = ""
    create_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    active: bool = False

    @property
    def name(self) -> str:
        """Resource name, ``policies/{algorithm}@{version}``."""
        return f"policies/{self.algorithm}@{self.version}"

    @property
    def digest(self) -> bytes:
        """SHA-256 of parameters and estimates in canonical form."""
        content = {"parameters": dict(self.parameters), "estimates": _estimates_json(self.estimates)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()

    @property
    def etag(self) -> str:
        """Changes with every change of ``active``."""
        return hashlib.sha256(f"{self.name}/{self.active}".encode()).hexdigest()[:16]

    def to_document(self) -> dict[str, Any]:
        """JSON form, without ``active``."""
        return {
            "algorithm": self.algorithm,
            "version": self.version,
            "parameters": dict(self.parameters),
            "estimates": _estimates_json(self.estimates),
            "parent": self.parent,
            "create_time": self.create_time.isoformat(),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any], *, active: bool) -> Self:
        """The version that :meth:`to_document` described."""
        return cls(
            algorithm=document["algorithm"],
            version=document["version"],
            parameters=document["parameters"],
            estimates={family: FamilyEstimate(**value) for family, value in document["estimates"].items()},
            parent=document["parent"],
            create_time=datetime.fromisoformat(document["create_time"]),
            active=active,
        )


def _estimates_json(estimates: Estimates) -> dict[str, Any]:
    return {family: asdict(estimate) for family, estimate in sorted(estimates.items())}


class PolicyRegistry:
    """Versions of all policies, kept in a :class:`Store`; version 1 of each algorithm is made at first start.

    They are read when they are asked for, as another Tamiyo on the same database may add or activate one. A change that
    comes with a :class:`Request` is made once, whatever dies meanwhile: asked again, it gives the version that it made
    or activated, as that is now. Another change under the same id is refused, REQUEST_ID_REUSED.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        known = {version.name for version in self.versions()}
        for algorithm, policy in ALGORITHMS.items():
            first = PolicyVersion(algorithm, 1, dict(policy.DEFAULTS), active=True)
            if first.name not in known:
                self._keep(first)

    def versions(self, algorithm: str = "") -> list[PolicyVersion]:
        """Versions of one algorithm, or (empty) of all, by algorithm and version."""
        stored = [PolicyVersion.from_document(document, active=active) for active, document in self._store.policies()]
        return [version for version in stored if algorithm in ("", version.algorithm)]

    def get(self, name: str) -> PolicyVersion:
        """A version by its name, or the active one of an algorithm (``policies/utilization``).

        Raises:
            EsperError: POLICY_NOT_FOUND.
        """
        versions = self.versions()
        for version in versions:
            if name == version.name or (version.active and name == f"policies/{version.algorithm}"):
                return version
        known = ", ".join(sorted({f"policies/{version.algorithm}" for version in versions}))
        raise not_found("policy", name, reason=Reason.POLICY_NOT_FOUND, hint=f"known are {known} and their versions")

    def activate(self, name: str, *, etag: str = "", request: Request | None = None) -> PolicyVersion:
        """Make a version the active one of its algorithm.

        Raises:
            EsperError: POLICY_NOT_FOUND, ETAG_MISMATCH, REQUEST_ID_REUSED.
        """
        if (known := self._answered(request)) is not None:
            return known
        chosen = self.get(name)
        if etag and etag != chosen.etag:
            raise EsperError(f"{name} changed since it was read: read it again", reason=Reason.ETAG_MISMATCH)
        self._store.activate(chosen.name, chosen.algorithm, request)
        return replace(chosen, active=True)

    def create(
        self, algorithm: str, parameters: Mapping[str, object], *, request: Request | None = None
    ) -> PolicyVersion:
        """A new version with these parameters; keys that are missing keep the active version's values.

        Raises:
            EsperError: UNKNOWN_ALGORITHM, INVALID_FIELD, REQUEST_ID_REUSED.
        """
        if (known := self._answered(request)) is not None:
            return known
        parent = self._active(algorithm)
        policy = ALGORITHMS[algorithm]
        for key in parameters:
            if key not in policy.DEFAULTS:
                valid = ", ".join(policy.DEFAULTS) or "none"
                raise invalid(f"parameters.{key}", f"{algorithm} has no such parameter", f"its parameters: {valid}")
        merged = {**parent.parameters, **parameters}
        policy.check(merged)
        return self._add(parent, request, parameters=merged)

    def learn(self, algorithm: str, *, min_outcomes: int, request: Request | None = None) -> PolicyVersion:
        """A new version with estimates learned from all outcomes kept.

        Raises:
            EsperError: UNKNOWN_ALGORITHM, INVALID_FIELD, REQUEST_ID_REUSED; NO_OUTCOMES when no family has enough.
        """
        if (known := self._answered(request)) is not None:
            return known
        parent = self._active(algorithm)
        if min_outcomes < 1:
            raise invalid(
                "learn_from_outcomes.min_outcomes", f"{min_outcomes} is below 1", "give 0 for 5, or 1 or more"
            )
        estimates = learn(self._store.outcomes(), min_outcomes=min_outcomes)
        if not estimates:
            raise EsperError(
                f"no family has {min_outcomes} outcomes yet: nothing to learn from", reason=Reason.NO_OUTCOMES
            )
        return self._add(parent, request, estimates={**parent.estimates, **estimates})

    def _active(self, algorithm: str) -> PolicyVersion:
        if algorithm not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise EsperError(f"unknown algorithm {algorithm!r}; known are {known}", reason=Reason.UNKNOWN_ALGORITHM)
        return self.get(f"policies/{algorithm}")

    def _answered(self, request: Request | None) -> PolicyVersion | None:
        known = None if request is None else self._store.policy_of_request(request)
        if request is None or known is None:
            return None
        digest, name = known
        if digest != request.digest:
            raise reused(request.id)
        return self.get(name)

    def _add(self, parent: PolicyVersion, request: Request | None, **changes: Any) -> PolicyVersion:
        number = self.versions(parent.algorithm)[-1].version
        made = replace(parent, parent=parent.name, create_time=datetime.now(UTC), active=False, **changes)
        while True:
            number += 1
            version = replace(made, version=number)
            if self._keep(version, request):
                return version
            # Another Tamiyo answered the request meanwhile, or only took the number.
            if (known := self._answered(request)) is not None:
                return known

    def _keep(self, version: PolicyVersion, request: Request | None = None) -> bool:
        name, algorithm, number = version.name, version.algorithm, version.version
        return self._store.add_policy(name, algorithm, number, version.active, version.to_document(), request=request)

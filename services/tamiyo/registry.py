"""The policy registry: immutable versions, one of them active per algorithm, learned ones among them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Self

from services.chassis.errors import EsperError, Reason, invalid
from services.tamiyo.learning import learn
from services.tamiyo.policies import ALGORITHMS, Estimates, Parameters
from services.tamiyo.policies.parameters import FamilyEstimate
from services.tamiyo.store import Store


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
    """Versions of all policies, kept in a :class:`Store`; version 1 of each algorithm is made at first start."""

    def __init__(self, store: Store) -> None:
        self._store = store
        stored = [PolicyVersion.from_document(document, active=active) for active, document in store.policies()]
        self._versions = {version.name: version for version in stored}
        for algorithm, policy in ALGORITHMS.items():
            if f"policies/{algorithm}@1" not in self._versions:
                self._keep(PolicyVersion(algorithm, 1, dict(policy.DEFAULTS), active=True))

    def versions(self, algorithm: str = "") -> list[PolicyVersion]:
        """Versions of one algorithm, or (empty) of all, by algorithm and version."""
        chosen = (v for v in self._versions.values() if not algorithm or v.algorithm == algorithm)
        return sorted(chosen, key=lambda version: (version.algorithm, version.version))

    def get(self, name: str) -> PolicyVersion:
        """A version by its name, or the active one of an algorithm (``policies/utilization``).

        Raises:
            EsperError: POLICY_NOT_FOUND.
        """
        if name in self._versions:
            return self._versions[name]
        for version in self.versions(name.removeprefix("policies/")):
            if name.startswith("policies/") and version.active:
                return version
        known = ", ".join(sorted({f"policies/{version.algorithm}" for version in self._versions.values()}))
        raise EsperError(
            f"there is no policy {name!r}; known are {known} and their versions", reason=Reason.POLICY_NOT_FOUND
        )

    def activate(self, name: str, *, etag: str = "") -> PolicyVersion:
        """Make a version the active one of its algorithm.

        Raises:
            EsperError: POLICY_NOT_FOUND, ETAG_MISMATCH.
        """
        chosen = self.get(name)
        if etag and etag != chosen.etag:
            raise EsperError(f"{name} changed since it was read: read it again", reason=Reason.ETAG_MISMATCH)
        self._store.activate(chosen.name, chosen.algorithm)
        for version in self.versions(chosen.algorithm):
            self._versions[version.name] = replace(version, active=version.name == chosen.name)
        return self._versions[chosen.name]

    def create(self, algorithm: str, parameters: Mapping[str, object]) -> PolicyVersion:
        """A new version with these parameters; keys that are missing keep the active version's values.

        Raises:
            EsperError: UNKNOWN_ALGORITHM, INVALID_FIELD.
        """
        parent = self._active(algorithm)
        policy = ALGORITHMS[algorithm]
        for key in parameters:
            if key not in policy.DEFAULTS:
                known = ", ".join(policy.DEFAULTS) or "none"
                raise invalid(f"parameters.{key}", f"{algorithm} has no such parameter", f"its parameters: {known}")
        merged = {**parent.parameters, **parameters}
        policy.check(merged)
        return self._keep(self._next(parent, parameters=merged))

    def learn(self, algorithm: str, *, min_outcomes: int) -> PolicyVersion:
        """A new version with estimates learned from all outcomes kept.

        Raises:
            EsperError: UNKNOWN_ALGORITHM; NO_OUTCOMES when no family has enough.
        """
        parent = self._active(algorithm)
        estimates = learn(self._store.outcomes(), min_outcomes=min_outcomes)
        if not estimates:
            raise EsperError(
                f"no family has {min_outcomes} outcomes yet: nothing to learn from", reason=Reason.NO_OUTCOMES
            )
        return self._keep(self._next(parent, estimates={**parent.estimates, **estimates}))

    def _active(self, algorithm: str) -> PolicyVersion:
        if algorithm not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise EsperError(f"unknown algorithm {algorithm!r}; known are {known}", reason=Reason.UNKNOWN_ALGORITHM)
        return self.get(f"policies/{algorithm}")

    def _next(self, parent: PolicyVersion, **changes: Any) -> PolicyVersion:
        newest = self.versions(parent.algorithm)[-1].version
        made = datetime.now(UTC)
        return replace(parent, version=newest + 1, parent=parent.name, create_time=made, active=False, **changes)

    def _keep(self, version: PolicyVersion) -> PolicyVersion:
        document = version.to_document()
        self._store.add_policy(version.name, version.algorithm, version.version, version.active, document)
        self._versions[version.name] = version
        return version

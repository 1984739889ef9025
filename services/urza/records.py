"""What Urza keeps: plain, frozen records, and the status machine of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from services.blueprints.artifact import Characterization
from services.blueprints.spec import Blueprint, Interface


class BlueprintState(StrEnum):
    """Whether a blueprint may be used; spelled as in the contract without its prefix."""

    ACTIVE = "ACTIVE"
    ARCHIVED = "ARCHIVED"


class KernelStatus(StrEnum):
    """Where a kernel stands; spelled as in the contract without its prefix."""

    UPLOADED = "UPLOADED"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    RETIRED = "RETIRED"


STATUS_TRANSITIONS: Mapping[KernelStatus, frozenset[KernelStatus]] = {
    KernelStatus.UPLOADED: frozenset({KernelStatus.VALIDATED, KernelStatus.REJECTED}),
    KernelStatus.VALIDATED: frozenset({KernelStatus.RETIRED}),
    KernelStatus.REJECTED: frozenset(),
    KernelStatus.RETIRED: frozenset(),
}
"""What may follow each status. A change that is not here is refused."""


class OutcomeResult(StrEnum):
    """How a seed ended; spelled as in the contract without its prefix."""

    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    ROLLED_BACK = "ROLLED_BACK"


@dataclass(frozen=True, slots=True)
class BlueprintRecord:
    """A blueprint in the library.

    Attributes:
        blueprint: The design.
        display_name: Name for people; may be empty.
        description: What it is good for; may be empty.
        tags: Words it is found by, sorted.
        parent: Id of the blueprint it was derived from; empty: none.
        state: Whether it may be used.
        create_time: When it entered the library.
        archive_time: When it was archived; ``None`` while it is active.
        revision: Rises with every change.
    """

    blueprint: Blueprint
    display_name: str
    description: str
    tags: tuple[str, ...]
    parent: str
    state: BlueprintState
    create_time: datetime
    archive_time: datetime | None = None
    revision: int = 1

    @property
    def id(self) -> str:
        """Resource id."""
        return self.blueprint.id


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: The estimate, points of validation accuracy.
        low: Lower bound.
        high: Upper bound.
        confidence: Of the interval, 0..1.
        samples: Behind the estimate.
    """

    value: float
    low: float
    high: float
    confidence: float
    samples: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one seed made from a kernel turned out to be.

    Attributes:
        seed: ``runs/{r}/seeds/{s}``.
        result: How it ended.
        contribution: What it was worth; ``None`` if not measured.
    """

    seed: str
    result: OutcomeResult
    contribution: Interval | None = None


@dataclass(frozen=True, slots=True)
class OutcomeCounts:
    """What became of the seeds made from a kernel.

    Attributes:
        results: How many ended how.
        mean_contribution: Of those with a measured one, points of validation accuracy; ``None`` if there is none.
    """

    results: Mapping[OutcomeResult, int] = field(default_factory=dict)
    mean_contribution: float | None = None


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """A kernel in the library.

    Attributes:
        id: Resource id: first 32 hex characters of the digest.
        blueprint: Id of its blueprint.
        family: Family of the blueprint.
        digest: SHA-256 of the artifact.
        signature: Of the compiler over the digest.
        size_bytes: Size of the artifact.
        interface: Place it was compiled for.
        interface_signature: What of it the kernel depends on.
        size: New channels of a widening, inner width of a branch.
        init_seed: Seed of the draw of newborn weights.
        characterization: What it costs, and its target.
        status: Where it stands.
        status_reason: Why, in words; may be empty.
        tags: Words it is found by, sorted.
        create_time: When it was committed.
        status_time: When it got its status.
        revision: Rises with every change, outcomes aside.
        outcomes: What became of its seeds.
    """

    id: str
    blueprint: str
    family: str
    digest: bytes
    signature: bytes
    size_bytes: int
    interface: Interface
    interface_signature: str
    size: int
    init_seed: int
    characterization: Characterization
    status: KernelStatus
    status_reason: str
    tags: tuple[str, ...]
    create_time: datetime
    status_time: datetime
    revision: int = 1
    outcomes: OutcomeCounts = OutcomeCounts()

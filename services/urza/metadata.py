"""The port to the database: what the library asks of it, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.urza.records import BlueprintRecord, BlueprintState, KernelRecord, KernelStatus, Outcome


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in a list, oldest first.

    Attributes:
        time: Creation time of the last entry before it.
        id: Its id, which decides between equal times.
    """

    time: datetime
    id: str


@dataclass(frozen=True, slots=True)
class BlueprintQuery:
    """Which blueprints. Every attribute narrows.

    Attributes:
        family: Of this family; empty: all.
        tags: With all of these.
        include_archived: Archived ones too.
        parents: Derived from one of these; ``None``: whatever they come from.
    """

    family: str = ""
    tags: tuple[str, ...] = ()
    include_archived: bool = False
    parents: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class KernelQuery:
    """Which kernels. Every attribute narrows; a limit is passed only by a measured value.

    Attributes:
        blueprint: Of this blueprint; empty: all.
        family: Of this family; empty: all.
        interface_signature: For places with it; empty: all.
        target: For it; empty: all.
        size: Of exactly this size.
        init_seed: With exactly this seed.
        tags: With all of these.
        statuses: With one of these; empty: all.
        max_latency_seconds: Measured at or below.
        max_memory_bytes: Measured at or below.
        max_parameters: At or below.
        max_flops: Known to be at or below.
    """

    blueprint: str = ""
    family: str = ""
    interface_signature: str = ""
    target: str = ""
    size: int | None = None
    init_seed: int | None = None
    tags: tuple[str, ...] = ()
    statuses: tuple[KernelStatus, ...] = ()
    max_latency_seconds: float | None = None
    max_memory_bytes: int | None = None
    max_parameters: int | None = None
    max_flops: int | None = None


class MetadataStore(Protocol):
    """Records in a database. Blocking; safe to call from several threads; every method is one transaction.

    All methods raise EsperError: UNAVAILABLE while the database cannot be reached, STORAGE_FULL.
    """

    def add_blueprint(self, record: BlueprintRecord) -> tuple[BlueprintRecord, bool]:
        """Add it, unless one of its id is there: that one, and whether it was added."""

    def blueprint(self, blueprint_id: str) -> BlueprintRecord | None:
        """The blueprint of an id."""

    def blueprints(self, query: BlueprintQuery, *, after: Cursor | None, limit: int) -> list[BlueprintRecord]:
        """Blueprints, oldest first, behind ``after``."""

    def set_blueprint_state(
        self, blueprint_id: str, *, revision: int, state: BlueprintState, archive_time: datetime | None
    ) -> bool:
        """Change the state if the revision is still this one; whether it was."""

    def add_kernel(self, record: KernelRecord) -> tuple[KernelRecord, bool]:
        """Add it, unless one of its id is there: that one, and whether it was added. Its blueprint must be there."""

    def kernel(self, kernel_id: str) -> KernelRecord | None:
        """The kernel of an id."""

    def kernels(self, query: KernelQuery, *, after: Cursor | None, limit: int) -> list[KernelRecord]:
        """Kernels, oldest first, behind ``after``."""

    def best_kernel(self, query: KernelQuery) -> KernelRecord | None:
        """Of those that match: validated before others, the lowest measured latency per sample, the newest."""

    def set_kernel_status(
        self, kernel_id: str, *, revision: int, status: KernelStatus, reason: str, time: datetime
    ) -> bool:
        """Change the status if the revision is still this one; whether it was."""

    def record_outcome(self, kernel_id: str, outcome: Outcome, time: datetime) -> None:
        """Keep the outcome of a seed, in place of one told before."""

    def close(self) -> None:
        """Let go of the database."""

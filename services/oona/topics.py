"""What may be said where: the one table of the platform's topics and their payload types.

The same table is in the comment of ``proto/esper/events/v1/events.proto``; a test keeps the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

DEAD_LETTER_SUFFIX: Final = ".dlq"
TOPIC_ID_PATTERN: Final = re.compile(r"^[a-z0-9_][a-z0-9_.]{0,127}$")

_EVENTS: Final = "esper.events.v1."

PLATFORM_TOPICS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "telemetry.seed.health": (_EVENTS + "SeedHealthReported",),
        "telemetry.seed.transitions": (_EVENTS + "SeedTransitioned",),
        "control.kasmina.commands": (_EVENTS + "AdaptationCommanded",),
        "compilation.blueprint.submitted": (_EVENTS + "BlueprintSubmitted",),
        "compilation.kernel.ready": (_EVENTS + "KernelReady", _EVENTS + "CompileFailed"),
        "validation.kernel.characterized": (_EVENTS + "KernelCharacterized",),
        "innovation.field_reports": (_EVENTS + "FieldReported",),
        "system.events.epoch": (_EVENTS + "EpochCompleted", _EVENTS + "RunStateChanged"),
        "system.events.rollback": (_EVENTS + "RolledBack",),
    }
)


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as the bus stores it.

    ``name`` is the bare id (without ``topics/``); ``retention_bytes`` is for the whole topic;
    ``created_ns`` is the Unix time in nanoseconds, None for the topics of the platform.
    """

    name: str
    payload_types: tuple[str, ...]
    partitions: int
    retention_bytes: int
    created_ns: int | None = None

    @property
    def is_dead_letter(self) -> bool:
        """Whether this is the twin of another topic."""
        return self.name.endswith(DEAD_LETTER_SUFFIX)

    @property
    def dead_letter_name(self) -> str:
        """Name of the twin that takes what a group gave up; meaningless for a dead-letter topic."""
        return self.name + DEAD_LETTER_SUFFIX

    def dead_letter_twin(self) -> TopicSpec:
        """The twin of this topic: same types, partitions and retention."""
        return TopicSpec(
            self.dead_letter_name, self.payload_types, self.partitions, self.retention_bytes, self.created_ns
        )

    def same_as(self, other: TopicSpec) -> bool:
        """Whether both accept and keep the same; the time of creation does not count."""
        return (self.name, self.payload_types, self.partitions, self.retention_bytes) == (
            other.name,
            other.payload_types,
            other.partitions,
            other.retention_bytes,
        )


def platform_specs(*, partitions: int, retention_bytes: int) -> list[TopicSpec]:
    """The topics of the platform, each followed by its dead-letter twin."""
    specs: list[TopicSpec] = []
    for name, types in PLATFORM_TOPICS.items():
        spec = TopicSpec(name, tuple(sorted(types)), partitions, retention_bytes)
        specs += [spec, spec.dead_letter_twin()]
    return specs

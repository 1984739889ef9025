"""The port behind Oona: what a log of partitioned topics must do.

Two implementations stand behind it, :mod:`services.oona.embedded` (a durable log of files) and
:mod:`services.oona.kafka`; one contract test suite (``tests/contract/test_oona_bus.py``) runs over both.
The port is about bytes, partitions and offsets. Acknowledgement, redelivery and dead letters are built
above it, once, in :mod:`services.oona.subscription`.

Every method raises :class:`services.chassis.errors.EsperError` with reason BUS_UNAVAILABLE where the
log or the broker cannot be reached, BUS_OVERLOADED where a bound is hit and TOPIC_NOT_FOUND where there
is no such topic. All methods belong to one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.oona.topics import TopicSpec

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class TopicPartition:
    """One ordered log."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """Something to store. Records with equal non-empty keys go to one partition of the topic."""

    topic: str
    key: bytes
    value: bytes
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Position:
    """Where a record is stored."""

    topic: str
    partition: int
    offset: int


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record with its place; ``append_ns`` is the Unix time in nanoseconds at which the bus took it."""

    source: TopicPartition
    offset: int
    append_ns: int
    key: bytes
    value: bytes
    headers: Headers


@dataclass(frozen=True, slots=True)
class OffsetRange:
    """The readable part of a partition: ``start <= offset < end``."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What a poll brought: first the partitions that went to another member, then records in order."""

    records: Sequence[StoredRecord] = ()
    revoked: Sequence[TopicPartition] = ()


class Reader(Protocol):
    """Reads partitions in order, without a group."""

    async def poll(self, limit: int) -> Batch:
        """Waits for at least one record, or a revocation, and returns at most ``limit`` records."""

    async def close(self) -> None:
        """Frees what the reader holds; safe to repeat."""


class GroupMember(Reader, Protocol):
    """A member of a consumer group; begins each partition at what the group has committed."""

    def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Stores that everything before these offsets is handled, soon and in the background.

        Partitions that are no longer the member's are ignored. ``close`` stores what is still waiting.
        """


class Bus(Protocol):
    """A durable log of partitioned topics."""

    async def start(self) -> None:
        """Opens the log or reaches the broker."""

    async def stop(self) -> None:
        """Stores what is waiting and frees everything; safe to repeat."""

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Makes topics; one whose name exists already stays as it is."""

    async def topics(self) -> list[TopicSpec]:
        """All topics, by name."""

    async def publish(self, records: Sequence[Record]) -> list[Position]:
        """Stores records; returns when all of them are durable, one position per record, in order.

        After an error some of the records may be stored.
        """

    async def ranges(self, topic: str) -> list[OffsetRange]:
        """The readable part of each partition."""

    async def read(self, source: TopicPartition, offset: int, limit: int) -> list[StoredRecord]:
        """At most ``limit`` stored records from ``offset`` on, without waiting; fewer at the end.

        An offset below the readable part is taken for its start.
        """

    async def open_reader(self, starts: Mapping[TopicPartition, int]) -> Reader:
        """A reader of these partitions from these offsets on."""

    async def join_group(self, group: str, topics: Sequence[str], *, latest: bool = False) -> GroupMember:
        """A new member of a group.

        Where the group has committed nothing the member begins at the start, or with ``latest`` at the end, which
        is then committed.
        """

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        """What the group has committed."""

    async def commit(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """Commits for a group that has no members; returns when it is durable."""

"""Oona's core: what may be published, once; who gets it; what happens to what nobody can handle.

Knows events, topics and the bus port; nothing of gRPC.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError

from esper.oona.v1.event_pb2 import Event
from services.chassis.errors import EsperError, FieldViolation, Reason
from services.chassis.ids import parse_name
from services.oona.bus import Bus, Position, Record, StoredRecord, TopicPartition
from services.oona.counters import Counters
from services.oona.errors import bus_overloaded, invalid_fields, topic_exists, topic_not_found
from services.oona.subscription import MAX_CREDIT, REDRIVE_GROUP_HEADER, FailureLedger, Subscription
from services.oona.topics import DEAD_LETTER_SUFFIX, TOPIC_ID_PATTERN, TopicSpec, platform_specs

MAX_BATCH_EVENTS: Final = 1000
MAX_PAYLOAD_BYTES: Final = 1 << 20
MAX_SUBSCRIPTIONS: Final = 64
MAX_TAILS: Final = 64
MAX_TAIL_LAST: Final = 100_000
MAX_PARTITIONS: Final = 64
MAX_TOPICS: Final = 1000
MIN_RETENTION_BYTES: Final = 2**20
_TAIL_RECORDS: Final = 256
_WARM_RECORDS: Final = 4096
_REASON_LIMIT: Final = 1024
_GROUP_PATTERN: Final = re.compile(r"^[A-Za-z0-9_.-]{1,128}$")
_TYPE_PATTERN: Final = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")

# Headers of a dead letter.
_REASON: Final = "oona-reason"
_GROUP: Final = "oona-group"
_ATTEMPTS: Final = "oona-attempts"
_ORIGIN: Final = "oona-origin"

#: The group whose committed offsets say how far a topic's dead letters have been redriven.
REDRIVE_GROUP: Final = "oona.redrive"


@dataclass(frozen=True, slots=True)
class Published:
    """Acknowledgement of an event."""

    event_id: str
    position: Position
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Rejected:
    """Refusal of an event."""

    event_id: str
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Lag:
    """How far a group is behind; ``committed`` is None where it has committed nothing."""

    source: TopicPartition
    committed: int | None
    end: int
    lag: int


@dataclass(frozen=True, slots=True)
class DeadLetterRecord:
    """A dead letter with what its headers say."""

    record: StoredRecord
    group: str
    reason: str
    attempts: int
    origin: Position


class EventExchange:
    """See the module. All methods belong to one event loop.

    Args:
        bus: where events are stored.
        partitions: of topics that name no number.
        retention_bytes: of topics that name none.
        max_attempts: failed deliveries before an event is a dead letter.
        dedup_window: event ids remembered.
    """

    def __init__(
        self, bus: Bus, *, partitions: int, retention_bytes: int, max_attempts: int, dedup_window: int = 65_536
    ) -> None:
        self.counters = Counters()
        self._bus = bus
        self._partitions = partitions
        self._retention_bytes = retention_bytes
        self._max_attempts = max_attempts
        self._dedup_window = dedup_window
        self._seen: OrderedDict[str, asyncio.Future[Position]] = OrderedDict()
        self._specs: dict[str, TopicSpec] = {}
        self._types: dict[str, frozenset[str]] = {}
        self._ledger = FailureLedger()
        self._subscriptions = 0
        self._tails = 0
        self._publishing: set[asyncio.Task[None]] = set()
        self._redriving = asyncio.Lock()

    async def start(self) -> None:
        """Opens the bus, makes the platform's topics and remembers the newest event ids."""
        await self._bus.start()
        await self._bus.create_topics(
            platform_specs(partitions=self._partitions, retention_bytes=self._retention_bytes)
        )
        for spec in await self._bus.topics():
            self._learn(spec)
        for spec in self._specs.values():
            if not spec.is_dead_letter:
                await self._remember_newest(spec)

    async def stop(self) -> None:
        """Lets publishes that are under way end, then closes the bus; safe to repeat."""
        if self._publishing:
            await asyncio.wait(self._publishing)
        await self._bus.stop()

    # ---- publish ----

    async def publish(self, events: Sequence[Event]) -> list[Published]:
        """Stores a batch; returns when all of it is durable.

        Raises:
            EsperError: INVALID_FIELD or PAYLOAD_TYPE_NOT_ALLOWED for a bad event: nothing is stored.
        """
        self._check_batch(events)
        problems = [
            problem for number, event in enumerate(events) for problem in self._check(event, f"events[{number}]")
        ]
        if problems:
            self.counters.rejected += len(events)
            raise _refusal(problems)
        return await self._publish(events)

    async def publish_valid(self, events: Sequence[Event]) -> tuple[list[Published], list[Rejected]]:
        """Stores the good events of a batch and says what is wrong with the others."""
        self._check_batch(events)
        good: list[Event] = []
        rejected: list[Rejected] = []
        for number, event in enumerate(events):
            problems = self._check(event, f"events[{number}]")
            if problems:
                error = _refusal(problems)
                rejected.append(Rejected(event.event_id, error.reason, str(error)))
            else:
                good.append(event)
        self.counters.rejected += len(rejected)
        return (await self._publish(good) if good else []), rejected

    async def _publish(self, events: Sequence[Event]) -> list[Published]:
        loop = asyncio.get_running_loop()
        outcomes: list[tuple[str, asyncio.Future[Position], bool]] = []
        fresh: list[tuple[str, asyncio.Future[Position]]] = []
        records: list[Record] = []
        for event in events:
            known = self._seen.get(event.event_id)
            if known is None:
                known = loop.create_future()
                self._seen[event.event_id] = known
                fresh.append((event.event_id, known))
                records.append(_to_record(event))
                outcomes.append((event.event_id, known, False))
            else:
                outcomes.append((event.event_id, known, True))
        if records:
            # Shielded from the caller's going away: its retry finds the first try in the window and waits for it.
            task = asyncio.create_task(self._store(records, fresh))
            self._publishing.add(task)
            task.add_done_callback(self._publishing.discard)
        published = [Published(name, await asyncio.shield(future), again) for name, future, again in outcomes]
        self.counters.duplicates += len(outcomes) - len(fresh)
        return published

    async def _store(self, records: Sequence[Record], fresh: Sequence[tuple[str, asyncio.Future[Position]]]) -> None:
        try:
            positions = await self._bus.publish(records)
        except EsperError as error:
            if error.reason is Reason.BUS_OVERLOADED:
                self.counters.overloaded += len(records)
            for event_id, future in fresh:
                # Not remembered: the next try stores it. Its waiter, if any is left, gets the error.
                self._seen.pop(event_id, None)
                future.set_exception(error)
                future.exception()
            return
        self.counters.published += len(records)
        for (_, future), position in zip(fresh, positions, strict=True):
            future.set_result(position)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._seen) > self._dedup_window:
            event_id, future = self._seen.popitem(last=False)
            if not future.done():  # still on its way: the window grows until it is stored
                self._seen[event_id] = future
                return

    async def _remember_newest(self, spec: TopicSpec) -> None:
        share = min(_WARM_RECORDS, self._dedup_window) // spec.partitions
        for partition, bounds in enumerate(await self._bus.ranges(spec.name)):
            source = TopicPartition(spec.name, partition)
            for record in await self._bus.read(source, max(bounds.start, bounds.end - share), share):
                event = to_event(record)
                if event is not None:
                    future: asyncio.Future[Position] = asyncio.get_running_loop().create_future()
                    future.set_result(Position(spec.name, partition, record.offset))
                    self._seen[event.event_id] = future
        self._forget_oldest()

    def _check_batch(self, events: Sequence[Event]) -> None:
        if not 1 <= len(events) <= MAX_BATCH_EVENTS:
            raise invalid_fields([FieldViolation("events", f"must be 1 to {MAX_BATCH_EVENTS} events")])

    def _check(self, event: Event, path: str) -> list[tuple[Reason, FieldViolation]]:
        problems: list[tuple[Reason, FieldViolation]] = []

        def invalid(name: str, why: str, reason: Reason = Reason.INVALID_FIELD) -> None:
            problems.append((reason, FieldViolation(f"{path}.{name}", why)))

        if not 1 <= len(event.event_id) <= 128:
            invalid("event_id", "is required, at most 128 characters")
        if not 1 <= len(event.source) <= 256:
            invalid("source", "is required, at most 256 characters")
        if len(event.key) > 256 or len(event.key.encode()) > 256:
            invalid("key", "must be at most 256 bytes")
        if not event.HasField("event_time"):
            invalid("event_time", "is required")
        if event.schema_version < 0:
            invalid("schema_version", "must be 1 or more")
        if len(event.traceparent) > 64:
            invalid("traceparent", "must be a W3C traceparent")
        if len(event.payload.value) > MAX_PAYLOAD_BYTES:
            invalid("payload", f"must be at most {MAX_PAYLOAD_BYTES} bytes")
        name = event.topic.removeprefix("topics/")
        allowed = self._types.get(name)
        if allowed is None or name == event.topic or name.endswith(DEAD_LETTER_SUFFIX):
            invalid("topic", f"{event.topic!r} names no topic to publish on: topics/{{t}}", Reason.TOPIC_NOT_FOUND)
        elif event.payload.type_url.rpartition("/")[2] != event.type:
            invalid("type", f"{event.type!r} is not the type of the payload, {event.payload.type_url!r}")
        elif event.type not in allowed:
            why = f"topics/{name} takes {', '.join(sorted(allowed))}, not {event.type!r}"
            invalid("type", why, Reason.PAYLOAD_TYPE_NOT_ALLOWED)
        return problems

    # ---- subscribe ----

    async def subscribe(self, group: str, topics: Sequence[str], *, credit: int, latest: bool = False) -> Subscription:
        """Joins a group; the caller ends the subscription with :meth:`unsubscribe`.

        Args:
            group: name of the consumer group.
            topics: resource names.
            credit: deliveries that may be on their way at first, up to 10,000.
            latest: a group that has committed nothing begins at the end.

        Raises:
            EsperError: INVALID_FIELD, TOPIC_NOT_FOUND, BUS_OVERLOADED (64 subscriptions are open) or
                BUS_UNAVAILABLE.
        """
        violations = []
        if not _GROUP_PATTERN.match(group) or group == REDRIVE_GROUP:
            violations.append(
                FieldViolation("start.consumer_group", 'must be 1 to 128 of letters, digits, "_", "-" and "."')
            )
        if not topics:
            violations.append(FieldViolation("start.topics", "at least one is required"))
        if not 0 <= credit <= MAX_CREDIT:
            violations.append(FieldViolation("start.credit", f"must be 0 to {MAX_CREDIT}"))
        if violations:
            raise invalid_fields(violations)
        names = [self._existing(name, "start.topics") for name in dict.fromkeys(topics)]
        if self._subscriptions >= MAX_SUBSCRIPTIONS:
            raise bus_overloaded(f"{MAX_SUBSCRIPTIONS} subscriptions are open")
        self._subscriptions += 1
        try:
            member = await self._bus.join_group(group, names, latest=latest)
        except BaseException:
            self._subscriptions -= 1
            raise
        return Subscription(
            group=group,
            member=member,
            dead_letter=self._dead_letter,
            ledger=self._ledger,
            max_attempts=self._max_attempts,
            credit=credit,
            counters=self.counters,
        )

    async def unsubscribe(self, subscription: Subscription, *, vanished: bool = False) -> None:
        """Closes a subscription; see :meth:`services.oona.subscription.Subscription.close`."""
        self._subscriptions -= 1
        await subscription.close(vanished=vanished)

    async def _dead_letter(self, record: StoredRecord, group: str, reason: str, attempts: int) -> None:
        source = record.source
        if source.topic.endswith(DEAD_LETTER_SUFFIX):
            return  # a group that reads dead letters gives one up: it is where it belongs already
        headers = (
            (_REASON, reason[:_REASON_LIMIT].encode()),
            (_GROUP, group.encode()),
            (_ATTEMPTS, str(attempts).encode()),
            (_ORIGIN, f"{source.partition}:{record.offset}".encode()),
        )
        await self._bus.publish([Record(source.topic + DEAD_LETTER_SUFFIX, record.key, record.value, headers)])
        self.counters.dead_lettered += 1

    # ---- tail ----

    async def tail(
        self, topics: Sequence[str], *, last: int, follow: bool, stopping: asyncio.Event
    ) -> AsyncGenerator[Sequence[StoredRecord], None]:
        """Yields stored records, then new ones until ``stopping`` is set; in order within each partition.

        Args:
            topics: resource names; none: all but the dead-letter topics.
            last: stored records of each partition to begin with.
            follow: go on with new records.
            stopping: ends a tail that follows.
        """
        if not 0 <= last <= MAX_TAIL_LAST:
            raise invalid_fields([FieldViolation("last", f"must be 0 to {MAX_TAIL_LAST}")])
        names = [self._existing(name, "topics") for name in dict.fromkeys(topics)] or [
            spec.name for spec in self._specs.values() if not spec.is_dead_letter
        ]
        if self._tails >= MAX_TAILS:
            raise bus_overloaded(f"{MAX_TAILS} tails are open")
        self._tails += 1
        try:
            starts: dict[TopicPartition, int] = {}
            for name in names:
                for partition, bounds in enumerate(await self._bus.ranges(name)):
                    source, offset = TopicPartition(name, partition), max(bounds.start, bounds.end - last)
                    while offset < bounds.end:
                        found = await self._bus.read(source, offset, min(_TAIL_RECORDS, bounds.end - offset))
                        if not found:  # retention has overtaken us, or only transaction markers are left
                            break
                        yield found
                        offset = found[-1].offset + 1
                    starts[source] = bounds.end
            if follow:
                async for records in self._follow(starts, stopping):
                    yield records
        finally:
            self._tails -= 1

    async def _follow(
        self, starts: dict[TopicPartition, int], stopping: asyncio.Event
    ) -> AsyncIterator[Sequence[StoredRecord]]:
        reader = await self._bus.open_reader(starts)
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            while not stopping.is_set():
                poll = asyncio.ensure_future(reader.poll(_TAIL_RECORDS))
                try:
                    await asyncio.wait({poll, stopped}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not poll.done():
                        poll.cancel()
                if poll.done() and not poll.cancelled():
                    yield poll.result().records
        finally:
            stopped.cancel()
            await reader.close()

    # ---- topics ----

    def topic(self, name: str) -> TopicSpec:
        """The topic of a resource name ``topics/{t}``."""
        return self._specs[self._existing(name, "name")]

    def topics(self, *, dead_letters: bool) -> list[TopicSpec]:
        """Topics by name."""
        return [
            self._specs[name] for name in sorted(self._specs) if dead_letters or not self._specs[name].is_dead_letter
        ]

    async def ranges(self, spec: TopicSpec) -> list[tuple[int, int]]:
        """(start, end) offsets of each partition of a topic."""
        return [(bounds.start, bounds.end) for bounds in await self._bus.ranges(spec.name)]

    async def create_topic(
        self, topic_id: str, payload_types: Sequence[str], *, partitions: int = 0, retention_bytes: int = 0
    ) -> TopicSpec:
        """Makes a topic and its dead-letter twin; an equal one is returned. 0 stands for the default.

        Raises:
            EsperError: INVALID_FIELD, TOPIC_EXISTS, BUS_OVERLOADED (there are 1000 topics) or BUS_UNAVAILABLE.
        """
        violations = []
        if (
            not TOPIC_ID_PATTERN.match(topic_id)
            or topic_id.endswith(DEAD_LETTER_SUFFIX)
            or topic_id.startswith("oona.")
        ):
            violations.append(
                FieldViolation(
                    "topic_id",
                    'must be 1 to 128 of a-z, 0-9, "_" and ".", not begin with "oona.", not end in ".dlq"',
                )
            )
        if not payload_types:
            violations.append(FieldViolation("topic.payload_types", "at least one is required"))
        for number, name in enumerate(payload_types):
            if not _TYPE_PATTERN.match(name):
                violations.append(
                    FieldViolation(f"topic.payload_types[{number}]", "must be the full name of a message")
                )
        if not 0 <= partitions <= MAX_PARTITIONS:
            violations.append(FieldViolation("topic.partitions", f"must be 0 to {MAX_PARTITIONS}"))
        if retention_bytes != 0 and retention_bytes < MIN_RETENTION_BYTES:
            violations.append(FieldViolation("topic.retention_bytes", f"must be 0 or at least {MIN_RETENTION_BYTES}"))
        if violations:
            raise invalid_fields(violations)
        wanted = TopicSpec(
            topic_id,
            tuple(sorted(set(payload_types))),
            partitions or self._partitions,
            retention_bytes or self._retention_bytes,
            time.time_ns(),
        )
        existing = self._specs.get(topic_id)
        if existing is None:
            if len(self._specs) >= MAX_TOPICS:
                raise bus_overloaded(f"there are {MAX_TOPICS} topics")
            await self._bus.create_topics([wanted, wanted.dead_letter_twin()])
            for spec in await self._bus.topics():
                self._learn(spec)
            existing = self._specs[topic_id]
        if not replace(existing, created_ns=None).same_as(wanted):
            raise topic_exists(topic_id)
        return existing

    def _learn(self, spec: TopicSpec) -> None:
        self._specs[spec.name] = spec
        self._types[spec.name] = frozenset(spec.payload_types)

    def _existing(self, name: str, field: str) -> str:
        (bare,) = parse_name("topics/{topic}", name, field=field)
        if bare not in self._specs:
            raise topic_not_found(bare)
        return bare

    # ---- lag and dead letters ----

    async def lag(self, group: str, topic: str = "") -> list[Lag]:
        """How far a group is behind, by topic and partition; without ``topic`` where it has committed something."""
        if not _GROUP_PATTERN.match(group):
            raise invalid_fields([FieldViolation("consumer_group", "is required")])
        committed = await self._bus.committed(group)
        names = [self._existing(topic, "topic")] if topic else sorted({source.topic for source in committed})
        found: list[Lag] = []
        for name in names:
            for partition, bounds in enumerate(await self._bus.ranges(name)):
                source = TopicPartition(name, partition)
                offset = committed.get(source)
                begin = bounds.start if offset is None else max(offset, bounds.start)
                found.append(Lag(source, offset, bounds.end, max(0, bounds.end - begin)))
        return found

    async def dead_letters(
        self, topic: str, *, cursor: tuple[int, int] | None, limit: int
    ) -> tuple[list[DeadLetterRecord], tuple[int, int] | None]:
        """Dead letters not yet redriven, from ``cursor`` (partition, offset) on, and the cursor of the next page."""
        name = self._dead_letter_topic(topic)
        redriven = await self._bus.committed(REDRIVE_GROUP)
        found: list[DeadLetterRecord] = []
        for partition, bounds in enumerate(await self._bus.ranges(name)):
            source = TopicPartition(name, partition)
            offset = max(bounds.start, redriven.get(source, 0))
            if cursor is not None:
                if partition < cursor[0]:
                    continue
                if partition == cursor[0]:
                    offset = max(offset, cursor[1])
            if len(found) == limit and offset < bounds.end:
                return found, (partition, offset)
            records = await self._bus.read(source, offset, limit - len(found)) if len(found) < limit else []
            found += [_to_dead_letter(record) for record in records]
            if records and records[-1].offset + 1 < bounds.end:
                return found, (partition, records[-1].offset + 1)
        return found, None

    async def redrive(self, topic: str, *, limit: int) -> int:
        """Publishes dead letters again for the groups that gave them up, oldest first; ``limit`` 0 means all.

        Returns the number of letters.
        """
        if limit < 0:
            raise invalid_fields([FieldViolation("max_letters", "must be 0 or more")])
        name = self._dead_letter_topic(topic)
        async with self._redriving:
            redriven = await self._bus.committed(REDRIVE_GROUP)
            done = 0
            for partition, bounds in enumerate(await self._bus.ranges(name)):
                source = TopicPartition(name, partition)
                offset = max(bounds.start, redriven.get(source, 0))
                while offset < bounds.end and (limit == 0 or done < limit):
                    room = _TAIL_RECORDS if limit == 0 else min(_TAIL_RECORDS, limit - done)
                    records = await self._bus.read(source, offset, min(room, bounds.end - offset))
                    if not records:
                        break
                    letters = [_to_dead_letter(record) for record in records]
                    # Stored first, committed second: a crash in between means twice, never lost.
                    await self._bus.publish(
                        [
                            Record(
                                letter.origin.topic,
                                letter.record.key,
                                letter.record.value,
                                ((REDRIVE_GROUP_HEADER, letter.group.encode()),),
                            )
                            for letter in letters
                        ]
                    )
                    offset = records[-1].offset + 1
                    await self._bus.commit(REDRIVE_GROUP, {source: offset})
                    done += len(records)
            self.counters.redriven += done
            return done

    def _dead_letter_topic(self, topic: str) -> str:
        name = self._existing(topic, "topic")
        if name.endswith(DEAD_LETTER_SUFFIX):
            raise invalid_fields([FieldViolation("topic", "is itself a dead-letter topic: name the topic it serves")])
        return name + DEAD_LETTER_SUFFIX


def to_event(record: StoredRecord) -> Event | None:
    """The event of a stored record; None where something else than Oona has written to the broker's topic."""
    try:
        return Event.FromString(record.value)
    except DecodeError:
        return None


def _to_record(event: Event) -> Record:
    headers = (("traceparent", event.traceparent.encode()),) if event.traceparent else ()
    return Record(event.topic.removeprefix("topics/"), event.key.encode(), event.SerializeToString(), headers)


def _to_dead_letter(record: StoredRecord) -> DeadLetterRecord:
    headers = dict(record.headers)
    partition, _, offset = headers[_ORIGIN].decode().partition(":")
    return DeadLetterRecord(
        record,
        headers[_GROUP].decode(),
        headers[_REASON].decode(errors="replace"),
        int(headers[_ATTEMPTS]),
        Position(record.source.topic.removesuffix(DEAD_LETTER_SUFFIX), int(partition), int(offset)),
    )


def _refusal(problems: Sequence[tuple[Reason, FieldViolation]]) -> EsperError:
    error = invalid_fields([violation for _, violation in problems])
    return EsperError(str(error), reason=problems[0][0], violations=[violation for _, violation in problems])

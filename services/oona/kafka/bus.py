"""The bus on Kafka: ``acks=all``, an idempotent producer, one consumer thread per reader.

Durable on Kafka means: written by all in-sync replicas. kafka-python is synchronous; what blocks runs in
two threads of this class (one to send, in order, and one for everything administrative).
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, OffsetAndMetadata, OffsetSpec
from kafka import TopicPartition as KafkaTopicPartition
from kafka.errors import KafkaError

from services.oona.bus import OffsetRange, Position, Record, StoredRecord, TopicPartition
from services.oona.errors import bus_overloaded, bus_unavailable, topic_not_found
from services.oona.kafka.consumer import KafkaReader, stored
from services.oona.kafka.names import TopicNames
from services.oona.topics import TopicSpec

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

REGISTRY_TOPIC: Final = "oona.topics"
MAX_WAITING_BYTES: Final = 64 * 2**20
MAX_WAITING_RECORDS: Final = 100_000
_CONNECT_MILLISECONDS: Final = 10_000
_READ_MILLISECONDS: Final = 5_000
_SWITCH_SECONDS: Final = 0.0005
_RETRY_SECONDS: Final = 5.0
_DELIVERY_MILLISECONDS: Final = 60_000
_MAX_RECORD_BYTES: Final = 2 * 2**20
_ALREADY_EXISTS: Final = 36  # Kafka protocol, error code TOPIC_ALREADY_EXISTS


class KafkaBus:
    """See :class:`services.oona.bus.Bus`.

    Our topics' payload types have no place in Kafka: they are in a compacted topic ``oona.topics``.

    Args:
        servers: ``host:port`` of brokers.
        prefix: put before every topic's and group's name.
        replication_factor: of the topics it makes.
        client_id: the client id that the broker's log shows.
    """

    def __init__(
        self, servers: Sequence[str], *, prefix: str = "", replication_factor: int = 1, client_id: str = "esper-oona"
    ) -> None:
        self._names = TopicNames(prefix)
        self._replication_factor = replication_factor
        self._options: dict[str, Any] = {
            "bootstrap_servers": list(servers),
            "client_id": client_id,
            "bootstrap_timeout_ms": _CONNECT_MILLISECONDS,
            "reconnect_backoff_max_ms": 1_000,
        }
        self._consumer_options: dict[str, Any] = {
            **self._options,
            "enable_auto_commit": False,
            "fetch_max_wait_ms": 100,
            "metadata_max_age_ms": 30_000,
        }
        self._specs: dict[str, TopicSpec] = {}
        self._waiting_bytes = 0
        self._waiting_records = 0
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="oona-kafka-send")
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="oona-kafka-admin")
        self._clients: list[Any] = []
        self._round_robin = 0

    async def start(self) -> None:
        """See :class:`services.oona.bus.Bus`."""
        # The client's threads are busy Python: with the default of 5 ms the event loop would wait that long for each.
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            await asyncio.get_running_loop().run_in_executor(self._desk, self._connect)
        except KafkaError as error:
            raise bus_unavailable(f"Kafka: {error}") from error
        await self._at_desk(self._open_registry)

    async def stop(self) -> None:
        """See :class:`services.oona.bus.Bus`."""
        clients, self._clients = self._clients, []
        for client in clients:
            await asyncio.get_running_loop().run_in_executor(None, client.close)
        self._sender.shutdown(wait=False)
        self._desk.shutdown(wait=False)

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """See :class:`services.oona.bus.Bus`."""
        missing = [spec for spec in specs if spec.name not in self._specs]
        if not missing:
            return
        await self._at_desk(lambda: self._make_topics(missing))
        registry = [Record(REGISTRY_TOPIC, spec.name.encode(), json.dumps(_to_json(spec)).encode()) for spec in missing]
        await self._send(registry)
        self._specs.update({spec.name: spec for spec in missing})

    async def topics(self) -> list[TopicSpec]:
        """See :class:`services.oona.bus.Bus`."""
        return [self._specs[name] for name in sorted(self._specs)]

    async def publish(self, records: Sequence[Record]) -> list[Position]:
        """See :class:`services.oona.bus.Bus`."""
        for record in records:
            self._spec(record.topic)
        return await self._send(records)

    async def ranges(self, topic: str) -> list[OffsetRange]:
        """See :class:`services.oona.bus.Bus`."""
        spec = self._spec(topic)
        partitions = [KafkaTopicPartition(self._names.kafkas(topic), number) for number in range(spec.partitions)]
        starts, ends = await self._at_desk(
            lambda: [
                self._admin.list_partition_offsets(dict.fromkeys(partitions, spec_), timeout_ms=_READ_MILLISECONDS)
                for spec_ in (OffsetSpec.EARLIEST, OffsetSpec.LATEST)
            ]
        )
        return [OffsetRange(starts[partition].offset, ends[partition].offset) for partition in partitions]

    async def read(self, source: TopicPartition, offset: int, limit: int) -> list[StoredRecord]:
        """See :class:`services.oona.bus.Bus`."""
        bounds = (await self.ranges(source.topic))[source.partition]
        start = max(offset, bounds.start)
        if start >= bounds.end or limit <= 0:
            return []
        return await self._at_desk(lambda: self._read(source, start, bounds.end, limit))

    async def open_reader(self, starts: Mapping[TopicPartition, int]) -> KafkaReader:
        """See :class:`services.oona.bus.Bus`."""
        for source in starts:
            self._spec(source.topic)
        reader = KafkaReader(self._names, self._consumer_options, starts=starts)
        await reader.open()
        return reader

    async def join_group(self, group: str, topics: Sequence[str], *, latest: bool = False) -> KafkaReader:
        """See :class:`services.oona.bus.Bus`."""
        for topic in topics:
            self._spec(topic)
        if latest:
            await self._commit_ends(group, topics)
        member = KafkaReader(self._names, self._consumer_options, group=self._names.kafkas(group), topics=topics)
        await member.open()
        return member

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        """See :class:`services.oona.bus.Bus`."""
        name = self._names.kafkas(group)
        offsets = (await self._at_desk(lambda: self._admin.list_group_offsets({name: None})))[name]
        return {
            TopicPartition(self._names.ours(partition.topic), partition.partition): metadata.offset
            for partition, metadata in offsets.items()
            if metadata.offset >= 0
        }

    async def commit(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """See :class:`services.oona.bus.Bus`."""
        named = {
            KafkaTopicPartition(self._names.kafkas(source.topic), source.partition): OffsetAndMetadata(offset, "", -1)
            for source, offset in offsets.items()
        }
        await self._at_desk(lambda: self._store_offsets(self._names.kafkas(group), named))

    async def _commit_ends(self, group: str, topics: Sequence[str]) -> None:
        committed = await self.committed(group)
        ends = {
            TopicPartition(topic, partition): bounds.end
            for topic in topics
            for partition, bounds in enumerate(await self.ranges(topic))
            if TopicPartition(topic, partition) not in committed
        }
        if ends:
            await self.commit(group, ends)

    def _spec(self, topic: str) -> TopicSpec:
        spec = self._specs.get(topic)
        if spec is None:
            raise topic_not_found(topic)
        return spec

    async def _at_desk(self, call: Callable[[], T]) -> T:
        give_up = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._desk, call)
            except KafkaError as error:
                # Coordinators and leaders come and go: a group's first use, for one, makes its coordinator.
                if not error.retriable or time.monotonic() > give_up:
                    raise bus_unavailable(f"Kafka: {error}") from error
                _LOG.debug("trying again: %s", error)
            await asyncio.sleep(0.1)

    def _connect(self) -> None:
        self._admin = KafkaAdminClient(**self._options)
        self._clients.append(self._admin)
        self._producer = KafkaProducer(
            **self._options,
            acks="all",
            enable_idempotence=True,
            linger_ms=1,
            batch_size=256 * 1024,
            max_request_size=_MAX_RECORD_BYTES,
            delivery_timeout_ms=_DELIVERY_MILLISECONDS,
            max_block_ms=_CONNECT_MILLISECONDS,
            allow_auto_create_topics=False,
        )
        self._clients.append(self._producer)
        self._lookup = KafkaConsumer(**self._consumer_options)
        self._clients.append(self._lookup)

    def _open_registry(self) -> None:
        self._make_topics(
            [TopicSpec(REGISTRY_TOPIC, (), 1, -1)], {"cleanup.policy": "compact", "max.message.bytes": "1048588"}
        )
        registry = TopicPartition(REGISTRY_TOPIC, 0)
        partition = KafkaTopicPartition(self._names.kafkas(REGISTRY_TOPIC), 0)
        ends = self._admin.list_partition_offsets({partition: OffsetSpec.LATEST}, timeout_ms=_READ_MILLISECONDS)
        end = ends[partition].offset
        for record in self._read(registry, 0, end, end) if end else []:
            self._specs[record.key.decode()] = _from_json(record.key.decode(), json.loads(record.value))

    def _store_offsets(self, group: str, offsets: Mapping[KafkaTopicPartition, OffsetAndMetadata]) -> None:
        for partition, error in self._admin.alter_group_offsets(group, offsets).items():
            if error.errno:
                raise error(f"offset of {partition.topic}/{partition.partition}")

    def _make_topics(self, specs: Sequence[TopicSpec], configs: Mapping[str, str] | None = None) -> None:
        wanted = {
            self._names.kafkas(spec.name): {
                "num_partitions": spec.partitions,
                "replication_factor": self._replication_factor,
                "configs": configs
                or {
                    "retention.bytes": str(max(1, spec.retention_bytes // spec.partitions)),
                    "max.message.bytes": str(_MAX_RECORD_BYTES),
                },
            }
            for spec in specs
        }
        answer = self._admin.create_topics(wanted, raise_errors=False, timeout_ms=_CONNECT_MILLISECONDS)
        for topic in answer["topics"]:
            if topic["error_code"] not in (0, _ALREADY_EXISTS):
                raise KafkaError(f"topic {topic['name']} cannot be made: {topic['error_message']}")
        self._admin.wait_for_topics(list(wanted))

    def _read(self, source: TopicPartition, start: int, end: int, limit: int) -> list[StoredRecord]:
        partition = KafkaTopicPartition(self._names.kafkas(source.topic), source.partition)
        self._lookup.assign([partition])
        self._lookup.seek(partition, start)
        found: list[StoredRecord] = []
        while len(found) < limit and self._lookup.position(partition, timeout_ms=_READ_MILLISECONDS) < end:
            polled = self._lookup.poll(timeout_ms=_READ_MILLISECONDS, max_records=min(500, limit - len(found)))
            if not polled:
                raise KafkaError(f"nothing came from {source.topic}/{source.partition} at {start}")
            found += [stored(self._names, record) for record in polled[partition] if record.offset < end]
        return found

    async def _send(self, records: Sequence[Record]) -> list[Position]:
        size = sum(len(record.value) for record in records)
        if self._waiting_bytes + size > MAX_WAITING_BYTES or self._waiting_records + len(records) > MAX_WAITING_RECORDS:
            raise bus_overloaded(f"{self._waiting_records} records wait for Kafka")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._waiting_bytes += size
        self._waiting_records += len(records)
        # Its end is what frees the room, not the caller's: a caller that goes leaves its records under way.
        done.add_done_callback(lambda _: self._sent(size, len(records)))
        try:
            futures = await asyncio.shield(loop.run_in_executor(self._sender, self._hand_over, records, loop, done))
            await asyncio.shield(done)
        except KafkaError as error:
            raise bus_unavailable(f"Kafka: {error}") from error
        failed = next((future.exception for future in futures if future.failed()), None)
        if failed is not None:
            raise bus_unavailable(f"Kafka: {failed}")
        return [
            Position(record.topic, future.value.partition, future.value.offset)
            for record, future in zip(records, futures, strict=True)
        ]

    def _sent(self, size: int, count: int) -> None:
        self._waiting_bytes -= size
        self._waiting_records -= count

    def _hand_over(
        self, records: Sequence[Record], loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]
    ) -> list[Any]:
        futures: list[Any] = []
        # A partition is acknowledged in order: waiting for its last record is waiting for all, at less cost.
        last: dict[tuple[str, int], Any] = {}
        try:
            for record in records:
                partition = self._partition_of(record)
                future = self._producer.send(
                    self._names.kafkas(record.topic),
                    key=record.key or None,
                    value=record.value,
                    headers=list(record.headers),
                    partition=partition,
                )
                futures.append(future)
                last[record.topic, partition] = future
        finally:
            countdown = _Countdown(len(last), lambda: loop.call_soon_threadsafe(_finish, done))
            for future in last.values():
                future.add_both(countdown.one_done)
        return futures

    def _partition_of(self, record: Record) -> int:
        spec = self._specs.get(record.topic)
        partitions = 1 if spec is None else spec.partitions  # the registry is not in itself
        if record.key:
            return zlib.crc32(record.key) % partitions
        self._round_robin += 1
        return self._round_robin % partitions


class _Countdown:
    """Calls back once when everything is done; any thread."""

    def __init__(self, number: int, finished: Callable[[], object]) -> None:
        self._finished = finished
        self._left = number + 1
        self._lock = threading.Lock()
        self.one_done()

    def one_done(self, _outcome: object = None) -> None:
        """One of them is done."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._finished()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _to_json(spec: TopicSpec) -> dict[str, object]:
    return {
        "payload_types": list(spec.payload_types),
        "partitions": spec.partitions,
        "retention_bytes": spec.retention_bytes,
        "created_ns": spec.created_ns,
    }


def _from_json(name: str, fields: dict[str, Any]) -> TopicSpec:
    return TopicSpec(
        name, tuple(fields["payload_types"]), fields["partitions"], fields["retention_bytes"], fields["created_ns"]
    )

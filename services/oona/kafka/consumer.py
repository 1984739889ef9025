"""Kafka consumers for an event loop.

``KafkaConsumer`` belongs to one thread: each reader here has its own, which polls, hands records over in
bounded numbers, pauses its partitions while the other side is behind, and commits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata
from kafka import TopicPartition as KafkaTopicPartition
from kafka.errors import KafkaError

from services.oona.bus import Batch, StoredRecord, TopicPartition
from services.oona.errors import bus_unavailable
from services.oona.kafka.names import TopicNames

_LOG = logging.getLogger(__name__)

HANDOVER_RECORDS: Final = 2048
_POLL_RECORDS: Final = 500
_POLL_MILLISECONDS: Final = 50
_CLOSE_MILLISECONDS: Final = 2000
_RETRY_SECONDS: Final = 0.2


def stored(names: TopicNames, record: Any) -> StoredRecord:
    """A record of kafka-python in the words of the port."""
    return StoredRecord(
        TopicPartition(names.ours(record.topic), record.partition),
        record.offset,
        record.timestamp * 1_000_000,
        record.key or b"",
        record.value or b"",
        tuple((name, content or b"") for name, content in record.headers),
    )


class KafkaReader:
    """Reads partitions, alone (``starts``) or as a member of a group (``group`` and ``topics``).

    Args:
        options: of ``KafkaConsumer``: servers, client id, deadlines.
    """

    def __init__(
        self,
        names: TopicNames,
        options: Mapping[str, Any],
        *,
        starts: Mapping[TopicPartition, int] | None = None,
        group: str | None = None,
        topics: Sequence[str] = (),
    ) -> None:
        self._names = names
        self._options = dict(options)
        self._starts = dict(starts or {})
        self._group = group
        self._topics = [names.kafkas(topic) for topic in topics]
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._wake = asyncio.Event()
        self._failure: str | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        # Under the lock:
        self._handover: deque[StoredRecord | TopicPartition] = deque()  # a partition here: it was revoked
        self._commits: dict[KafkaTopicPartition, int] = {}
        self._assigned: set[KafkaTopicPartition] = set()
        self._thread = threading.Thread(target=self._run, name=f"oona-kafka-{group or 'reader'}", daemon=True)

    async def open(self) -> None:
        """Starts the thread and waits until it has reached the broker.

        Raises:
            EsperError: BUS_UNAVAILABLE, it has not.
        """
        self._thread.start()
        try:
            await self._ready
        except BaseException:
            self._closing.set()
            raise

    async def poll(self, limit: int) -> Batch:
        """See :class:`services.oona.bus.Reader`."""
        while True:
            self._wake.clear()
            batch = self._take(limit)
            if batch.records or batch.revoked:
                return batch
            if self._failure is not None:
                raise bus_unavailable(self._failure)
            await self._wake.wait()

    def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """See :class:`services.oona.bus.GroupMember`."""
        with self._lock:
            for source, offset in offsets.items():
                partition = KafkaTopicPartition(self._names.kafkas(source.topic), source.partition)
                if partition in self._assigned:
                    self._commits[partition] = offset

    async def close(self) -> None:
        """See :class:`services.oona.bus.Reader`."""
        self._closing.set()
        if self._thread.is_alive():
            await self._loop.run_in_executor(None, self._thread.join)

    def _take(self, limit: int) -> Batch:
        records: list[StoredRecord] = []
        revoked: list[TopicPartition] = []
        with self._lock:
            while self._handover and len(records) < limit:
                item = self._handover[0]
                if isinstance(item, TopicPartition):
                    if records:  # a revocation comes first in its batch: the records before it go alone
                        break
                    revoked.append(item)
                else:
                    records.append(item)
                self._handover.popleft()
        return Batch(records, revoked)

    # ---- the owner thread ----

    def _run(self) -> None:
        try:
            consumer = KafkaConsumer(**self._options, group_id=self._group, auto_offset_reset="earliest")
            try:
                self._begin(consumer)
                self._tell(self._opened)
                while not self._closing.is_set():
                    self._step(consumer)
            finally:
                self._store_commits(consumer)
                consumer.close(autocommit=False, timeout_ms=_CLOSE_MILLISECONDS)
        except Exception as error:  # noqa: BLE001  # the thread's last line: whoever waits for records must hear of it
            _LOG.warning("the Kafka consumer of %s ended: %s", self._group or "a reader", error)
            self._tell(self._fail, f"Kafka: {error}")

    def _begin(self, consumer: Any) -> None:
        if self._group is None:
            partitions = [KafkaTopicPartition(self._names.kafkas(s.topic), s.partition) for s in self._starts]
            consumer.assign(partitions)
            for partition, offset in zip(partitions, self._starts.values(), strict=True):
                consumer.seek(partition, offset)
        else:
            consumer.subscribe(self._topics, listener=_Rebalance(self, consumer))
            # Without it a group may be dealt out before the topics' partitions are known: to nobody.
            consumer.topics()

    def _step(self, consumer: Any) -> None:
        try:
            self._store_commits(consumer)
            with self._lock:
                behind = len(self._handover)
            if behind >= HANDOVER_RECORDS:
                consumer.pause(*consumer.assignment())
            elif consumer.paused() and behind < HANDOVER_RECORDS // 2:
                consumer.resume(*consumer.paused())
            polled = consumer.poll(timeout_ms=_POLL_MILLISECONDS, max_records=_POLL_RECORDS)
        except KafkaError as error:
            # The client finds the broker again by itself; this only keeps the loop from spinning.
            _LOG.warning("Kafka consumer of %s: %s", self._group or "a reader", error)
            self._closing.wait(_RETRY_SECONDS)
            return
        if polled:
            records = [stored(self._names, record) for found in polled.values() for record in found]
            with self._lock:
                self._handover.extend(records)
            self._tell(self._wake.set)

    def _store_commits(self, consumer: Any) -> None:
        with self._lock:
            commits, self._commits = self._commits, {}
        if not commits:
            return
        try:
            consumer.commit({partition: OffsetAndMetadata(offset, "", -1) for partition, offset in commits.items()})
        except KafkaError as error:
            _LOG.warning("offsets of group %s were not committed, will try again: %s", self._group, error)
            with self._lock:
                self._commits = {**{p: o for p, o in commits.items() if p in self._assigned}, **self._commits}
            self._closing.wait(_RETRY_SECONDS)

    # ---- kafka-python's IO thread: nothing here may block ----

    async def _revoke(self, consumer: Any, revoked: Collection[KafkaTopicPartition]) -> None:
        with self._lock:
            self._assigned.difference_update(revoked)
            last = {p: OffsetAndMetadata(offset, "", -1) for p, offset in self._commits.items() if p in revoked}
            self._commits = {p: offset for p, offset in self._commits.items() if p not in last}
            self._handover.extend(TopicPartition(self._names.ours(p.topic), p.partition) for p in revoked)
        self._tell(self._wake.set)
        if last:
            try:
                await consumer.commit_async(last)
            except KafkaError as error:
                _LOG.warning("offsets of group %s were lost with their partitions: %s", self._group, error)

    def _assign(self, assigned: Collection[KafkaTopicPartition]) -> None:
        with self._lock:
            self._assigned.update(assigned)

    def _opened(self) -> None:
        if not self._ready.done():  # whoever opened it may have gone
            self._ready.set_result(None)

    def _fail(self, why: str) -> None:
        self._failure = why
        self._wake.set()
        if not self._ready.done():
            self._ready.set_exception(bus_unavailable(why))

    def _tell(self, call: Any, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            self._closing.set()


class _Rebalance(AsyncConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no stubs
    """Commits what is handled before a partition goes."""

    def __init__(self, reader: KafkaReader, consumer: Any) -> None:
        self._reader = reader
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: Collection[KafkaTopicPartition]) -> None:
        """Called before another member gets them."""
        await self._reader._revoke(self._consumer, revoked)

    async def on_partitions_assigned(self, assigned: Collection[KafkaTopicPartition]) -> None:
        """Called before the first record of the new share."""
        self._reader._assign(assigned)

"""A member's side of a consumer group: credit, acknowledgement, redelivery, dead letters.

Stands between a :class:`services.oona.bus.GroupMember` and whoever handles the events; the same over
every bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from services.oona.bus import GroupMember, StoredRecord, TopicPartition
from services.oona.counters import Counters
from services.oona.delivery import DeliveryWindow, Entry

_LOG = logging.getLogger(__name__)

MAX_CREDIT: Final = 10_000
WINDOW_RECORDS: Final = 12_000
MAX_RETRY_DELAY: Final = 60.0
_POLL_RECORDS: Final = 512
_BATCH_BYTES: Final = 1 << 20

#: Header of a redriven record: the only group it is meant for.
REDRIVE_GROUP_HEADER: Final = "oona-redrive-group"


def retry_delay(failures: int) -> float:
    """Pause in seconds before a record is delivered again that has failed this often."""
    return min(5.0, 0.1 * 2.0 ** min(failures - 1, 10))


class FailureLedger:
    """How often each record has failed in each group: outlives streams, not the process. Bounded."""

    def __init__(self, limit: int = 65_536) -> None:
        self._limit = limit
        self._failures: OrderedDict[tuple[str, TopicPartition, int], int] = OrderedDict()

    def get(self, group: str, record: StoredRecord) -> int:
        """Failed deliveries so far."""
        return self._failures.get((group, record.source, record.offset), 0)

    def set(self, group: str, record: StoredRecord, failures: int) -> None:
        """Remembers failed deliveries, and forgets the oldest record of all where there are too many."""
        key = (group, record.source, record.offset)
        self._failures[key] = failures
        self._failures.move_to_end(key)
        if len(self._failures) > self._limit:
            self._failures.popitem(last=False)

    def forget(self, group: str, record: StoredRecord) -> None:
        """The record is settled."""
        self._failures.pop((group, record.source, record.offset), None)


@dataclass(frozen=True, slots=True)
class Delivered:
    """One delivery: its number, the record, and which attempt it is (from 1)."""

    delivery_id: int
    record: StoredRecord
    attempt: int


# (record, group, reason, failed attempts); returns when the dead letter is durable.
DeadLetterSink = Callable[[StoredRecord, str, str, int], Awaitable[None]]


class Subscription:
    """One open subscription. Made by :meth:`services.oona.exchange.EventExchange.subscribe`.

    Args:
        member: this member's part of the bus; closed with the subscription.
        dead_letter: takes records that failed ``max_attempts`` times.
        ledger: failures remembered across the group's subscriptions.
        credit: deliveries that may be on their way at first.
        counters: of the whole service.
        window_records: records between delivery and commit; reading stops there.
    """

    def __init__(
        self,
        *,
        group: str,
        member: GroupMember,
        dead_letter: DeadLetterSink,
        ledger: FailureLedger,
        max_attempts: int,
        credit: int,
        counters: Counters,
        window_records: int = WINDOW_RECORDS,
    ) -> None:
        self.group = group
        self._counters = counters
        self._member = member
        self._dead_letter = dead_letter
        self._ledger = ledger
        self._max_attempts = max_attempts
        self._window = DeliveryWindow(window_records)
        self._credit = min(MAX_CREDIT, credit)
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._filler = asyncio.create_task(self._fill(), name=f"oona-fill-{group}")

    @property
    def credit(self) -> int:
        """Deliveries that may still be sent."""
        return self._credit

    def grant(self, deliveries: int) -> None:
        """Adds credit; the sum is cut to 10,000."""
        self._credit = min(MAX_CREDIT, self._credit + deliveries)
        self._changed.set()

    def ack(self, delivery_ids: Sequence[int]) -> None:
        """Settles deliveries; unknown ones are ignored."""
        for delivery_id in delivery_ids:
            entry = self._window.in_flight(delivery_id)
            if entry is not None:
                self._settle(entry)
                self._counters.acknowledged += 1
        self._commit()

    async def nack(self, delivery_id: int, reason: str, delay: float | None = None) -> None:
        """Reports a failed delivery: again after ``delay`` seconds, or to the dead letters.

        Raises:
            EsperError: the dead letter could not be stored; the record stays with the group.
        """
        entry = self._window.in_flight(delivery_id)
        if entry is None:
            return
        failures = entry.failures + 1
        if failures >= self._max_attempts:
            await self._to_dead_letters(entry, reason, failures)
            return
        self._ledger.set(self.group, entry.record, failures)
        pause = retry_delay(failures) if delay is None else min(delay, MAX_RETRY_DELAY)
        self._window.fail(entry, time.monotonic() + pause)
        self._changed.set()

    async def give_up(self, delivery_id: int, reason: str) -> None:
        """Sends a delivery to the dead letters at once: no further try can help.

        Raises:
            EsperError: the dead letter could not be stored; the record stays with the group.
        """
        entry = self._window.in_flight(delivery_id)
        if entry is not None:
            await self._to_dead_letters(entry, reason, entry.failures + 1)

    async def deliveries(self) -> AsyncIterator[list[Delivered]]:
        """Yields deliveries in lists of at most a MiB, as credit allows, until closed.

        Raises:
            EsperError: the bus failed.
        """
        while True:
            self._changed.clear()
            batch = await self._take()
            if batch:
                yield batch
                continue
            if self._filler.done():
                await self._filler
                return
            due = self._window.next_retry() if self._credit > 0 else None
            wait = None if due is None else max(0.0, due - time.monotonic())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    async def close(self, *, vanished: bool = False) -> None:
        """Leaves the group; safe to repeat.

        With ``vanished`` (the handler's process died, it did not say goodbye) the first unsettled record of
        each partition counts as failed once: a record that kills its handler ends in the dead letters.
        """
        if vanished:
            for entry in self._window.oldest_in_flight():
                self._ledger.set(self.group, entry.record, entry.failures + 1)
        self._filler.cancel()
        await asyncio.gather(self._filler, return_exceptions=True)
        await self._member.close()

    async def _fill(self) -> None:
        try:
            while True:
                if self._window.full:
                    self._room.clear()
                    await self._room.wait()
                batch = await self._member.poll(min(_POLL_RECORDS, max(1, self._window.room)))
                for source in batch.revoked:
                    self._window.drop(source)
                for record in batch.records:
                    self._window.add(
                        record, failures=self._ledger.get(self.group, record), skip=self._is_for_another(record)
                    )
                self._commit()
                self._changed.set()
        finally:
            self._changed.set()

    def _is_for_another(self, record: StoredRecord) -> bool:
        return any(
            name == REDRIVE_GROUP_HEADER and value.decode(errors="replace") != self.group
            for name, value in record.headers
        )

    async def _take(self) -> list[Delivered]:
        batch: list[Delivered] = []
        size = 0
        now = time.monotonic()
        while self._credit > 0 and size < _BATCH_BYTES:
            entry = self._window.next(now)
            if entry is None:
                break
            if entry.failures >= self._max_attempts:
                await self._to_dead_letters(entry, "the consumer vanished while it handled the event", entry.failures)
                continue
            self._credit -= 1
            self._counters.delivered += 1
            self._counters.redelivered += entry.failures > 0
            size += len(entry.record.value)
            batch.append(Delivered(entry.delivery_id, entry.record, entry.attempt))
        return batch

    async def _to_dead_letters(self, entry: Entry, reason: str, failures: int) -> None:
        await self._dead_letter(entry.record, self.group, reason, failures)
        _LOG.warning(
            "dead letter: %s/%d offset %d, group %s, %d attempts: %s",
            entry.record.source.topic,
            entry.record.source.partition,
            entry.record.offset,
            self.group,
            failures,
            reason,
        )
        self._settle(entry)
        self._commit()

    def _settle(self, entry: Entry) -> None:
        if entry.failures:
            self._ledger.forget(self.group, entry.record)
        self._window.settle(entry)
        self._changed.set()

    def _commit(self) -> None:
        commits = self._window.take_commits()
        if commits:
            self._member.commit(commits)
            self._room.set()

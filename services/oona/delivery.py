"""Which event a member of a consumer group gets next, and what of it may be committed.

Pure bookkeeping: no clock, no input or output of its own. The rules are those of ordered delivery with
negative acknowledgement (as in Google Cloud Pub/Sub's ordering keys):

- records of a partition are delivered in the order of their offsets, many at a time;
- a failed record is delivered again after a pause, and so is everything behind it with the same key, even
  where it was acknowledged already, so that the last thing a handler sees is in order;
- until the failed record is settled its key waits; other keys of the partition go on;
- a partition is committed up to its first record that is not settled.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count

from services.oona.bus import StoredRecord, TopicPartition


class _State(Enum):
    WAITING = auto()  # to be delivered: in the ready queue, or behind a failed record of its key
    DELIVERED = auto()
    SETTLED = auto()  # acknowledged, or moved to the dead letters


@dataclass(slots=True, eq=False)
class Entry:
    """A record in the window; ``failures`` counts its failed deliveries."""

    record: StoredRecord
    failures: int
    state: _State = _State.WAITING
    delivery_id: int = 0

    @property
    def attempt(self) -> int:
        """Number of the delivery under way, from 1."""
        return self.failures + 1


# A key within a partition; a record without a key is ordered with nothing and stands alone by its offset.
_OrderKey = tuple[TopicPartition, bytes, int]


def _order_key(record: StoredRecord) -> _OrderKey:
    return (record.source, record.key, -1 if record.key else record.offset)


@dataclass(slots=True)
class _Blocked:
    """A key that waits for its failed record; ``behind`` are the later records of the key, in order."""

    head: Entry
    behind: deque[Entry] = field(default_factory=deque)


class DeliveryWindow:
    """The records between what the bus has handed over and what the group has committed.

    Args:
        limit: records in the window; :attr:`full` says that it is reached.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._next_id = 1
        self._partitions: dict[TopicPartition, OrderedDict[int, Entry]] = {}
        self._ready: deque[Entry] = deque()
        self._retries: list[tuple[float, int, Entry]] = []
        self._tiebreak = count()
        self._blocked: dict[_OrderKey, _Blocked] = {}
        self._in_flight: dict[int, Entry] = {}
        self._commits: dict[TopicPartition, int] = {}

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._size >= self._limit

    @property
    def room(self) -> int:
        """Records that may still be added."""
        return max(0, self._limit - self._size)

    def add(self, record: StoredRecord, *, failures: int = 0, skip: bool = False) -> None:
        """Takes the next record of a partition; one to ``skip`` is settled without a delivery."""
        entry = Entry(record, failures, _State.SETTLED if skip else _State.WAITING)
        self._partitions.setdefault(record.source, OrderedDict())[record.offset] = entry
        self._size += 1
        if skip:
            self._advance(record.source)
        else:
            self._ready.append(entry)

    def next(self, now: float) -> Entry | None:
        """The entry to deliver next, with a fresh ``delivery_id``; None if there is nothing to deliver now."""
        while self._retries and self._retries[0][0] <= now:
            entry = heapq.heappop(self._retries)[2]
            # The partition may be gone, or the entry may stand behind an earlier one that failed meanwhile.
            blocked = self._blocked.get(_order_key(entry.record))
            if blocked is not None and blocked.head is entry and entry.state is _State.WAITING:
                return self._deliver(entry)
        while self._ready:
            entry = self._ready.popleft()
            if entry.state is not _State.WAITING or not self._holds(entry):
                continue
            blocked = self._blocked.get(_order_key(entry.record))
            if blocked is not None:
                blocked.behind.append(entry)
                continue
            return self._deliver(entry)
        return None

    def next_retry(self) -> float | None:
        """When the next failed record is due; None if none waits."""
        return self._retries[0][0] if self._retries else None

    def in_flight(self, delivery_id: int) -> Entry | None:
        """The entry under this delivery; None if it is settled, taken back or never was."""
        return self._in_flight.get(delivery_id)

    def settle(self, entry: Entry) -> None:
        """The record is handled, or moved to the dead letters: its key goes on."""
        self._in_flight.pop(entry.delivery_id, None)
        if not self._holds(entry):
            return
        entry.state = _State.SETTLED
        key = _order_key(entry.record)
        blocked = self._blocked.get(key)
        if blocked is not None and blocked.head is entry:
            del self._blocked[key]
            self._ready.extendleft(reversed(blocked.behind))
        self._advance(entry.record.source)

    def fail(self, entry: Entry, retry_at: float) -> None:
        """The delivery failed: the record comes again at ``retry_at``, and after it the rest of its key."""
        entry.failures += 1
        self._take_back(entry)
        key = _order_key(entry.record)
        behind: deque[Entry] = deque()
        partition = self._partitions[entry.record.source]
        if entry.record.key:
            for offset, other in partition.items():
                if (
                    offset > entry.record.offset
                    and other.record.key == entry.record.key
                    and (other.state is not _State.WAITING or self._was_blocked(key, other))
                ):
                    self._take_back(other)
                    behind.append(other)
        self._blocked[key] = _Blocked(entry, behind)
        heapq.heappush(self._retries, (retry_at, next(self._tiebreak), entry))

    def _was_blocked(self, key: _OrderKey, entry: Entry) -> bool:
        blocked = self._blocked.get(key)
        return blocked is not None and (blocked.head is entry or entry in blocked.behind)

    def drop(self, source: TopicPartition) -> None:
        """The partition went to another member: forget it, and whatever is still said about it."""
        entries = self._partitions.pop(source, OrderedDict())
        self._size -= len(entries)
        self._commits.pop(source, None)
        for entry in entries.values():
            self._in_flight.pop(entry.delivery_id, None)
            self._blocked.pop(_order_key(entry.record), None)

    def take_commits(self) -> dict[TopicPartition, int]:
        """Offsets that may be committed since the last call."""
        commits, self._commits = self._commits, {}
        return commits

    def oldest_in_flight(self) -> list[Entry]:
        """The first delivered, unsettled entry of each partition: what a member was at when it vanished."""
        found = []
        for entries in self._partitions.values():
            for entry in entries.values():
                if entry.state is _State.DELIVERED:
                    found.append(entry)
                    break
        return found

    def _deliver(self, entry: Entry) -> Entry:
        entry.state = _State.DELIVERED
        entry.delivery_id = self._next_id
        self._in_flight[self._next_id] = entry
        self._next_id += 1
        return entry

    def _take_back(self, entry: Entry) -> None:
        self._in_flight.pop(entry.delivery_id, None)
        entry.delivery_id = 0
        entry.state = _State.WAITING

    def _holds(self, entry: Entry) -> bool:
        partition = self._partitions.get(entry.record.source)
        return partition is not None and partition.get(entry.record.offset) is entry

    def _advance(self, source: TopicPartition) -> None:
        entries = self._partitions[source]
        while entries:
            offset, entry = next(iter(entries.items()))
            if entry.state is not _State.SETTLED:
                break
            del entries[offset]
            self._size -= 1
            self._commits[source] = offset + 1

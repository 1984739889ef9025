"""Consumer groups of the embedded bus: who reads which partition, and from where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from services.oona.bus import Batch, StoredRecord, TopicPartition

ReadPartition = Callable[[TopicPartition, int, int], list[StoredRecord]]
CommitOffsets = Callable[[str, Mapping[TopicPartition, int]], None]


class LogReader:
    """Reads partitions in turn, each in order; wakes when the bus says that there is more."""

    def __init__(self, read: ReadPartition, starts: Mapping[TopicPartition, int], release: Callable[[], None]) -> None:
        self._read = read
        self._next = dict(starts)
        self._revoked: list[TopicPartition] = []
        self._release = release
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Says that there may be more to read."""
        self._wake.set()

    async def poll(self, limit: int) -> Batch:
        """See :class:`services.oona.bus.Reader`."""
        while True:
            self._wake.clear()
            revoked, self._revoked = self._revoked, []
            records = self._collect(limit)
            if records or revoked:
                return Batch(records, revoked)
            await self._wake.wait()

    async def close(self) -> None:
        """See :class:`services.oona.bus.Reader`."""
        self._release()

    def _collect(self, limit: int) -> list[StoredRecord]:
        records: list[StoredRecord] = []
        # The partition that was served first comes last next time: none starves.
        for source in list(self._next):
            found = self._read(source, self._next[source], limit - len(records))
            if found:
                del self._next[source]
                self._next[source] = found[-1].offset + 1
                records += found
            if len(records) >= limit:
                break
        return records


class LogGroupMember(LogReader):
    """A member of a group of the embedded bus."""

    def __init__(
        self, group: str, topics: Sequence[str], read: ReadPartition, commit: CommitOffsets, release: Callable[[], None]
    ) -> None:
        super().__init__(read, {}, release)
        self.group = group
        self.topics = tuple(topics)
        self._commit = commit

    @property
    def assigned(self) -> set[TopicPartition]:
        """The member's share."""
        return set(self._next)

    def assign(self, sources: Mapping[TopicPartition, int]) -> None:
        """Takes its new share, with the offset at which each partition begins; what it had already goes on."""
        self._revoked += [source for source in self._next if source not in sources]
        self._next = {source: self._next.get(source, start) for source, start in sources.items()}
        self.wake()

    def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        """See :class:`services.oona.bus.GroupMember`."""
        mine = {source: offset for source, offset in offsets.items() if source in self._next}
        if mine:
            self._commit(self.group, mine)


def share(sources: Sequence[TopicPartition], members: Sequence[LogGroupMember]) -> list[list[TopicPartition]]:
    """Deals partitions to the members that want them, in turn; the same input gives the same shares.

    Partitions that a member has and may keep stay with it, as far as the shares stay even.
    """
    shares: list[list[TopicPartition]] = [[] for _ in members]
    homeless = []
    for source in sources:
        able = [number for number, member in enumerate(members) if source.topic in member.topics]
        if not able:
            continue
        fair = -(-sum(1 for other in sources if other.topic == source.topic) // len(able))
        owner = next((number for number in able if source in members[number].assigned), None)
        held = 0 if owner is None else sum(1 for other in shares[owner] if other.topic == source.topic)
        if owner is not None and held < fair:
            shares[owner].append(source)
        else:
            homeless.append((source, able))
    for source, able in homeless:
        shares[min(able, key=lambda number: (len(shares[number]), number))].append(source)
    return shares

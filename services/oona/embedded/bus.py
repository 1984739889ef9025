"""The embedded bus: one process, files, no broker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from services.chassis.errors import EsperError
from services.oona.bus import OffsetRange, Position, Reader, Record, StoredRecord, TopicPartition
from services.oona.embedded.groups import LogGroupMember, LogReader, share
from services.oona.embedded.log import TopicLog
from services.oona.embedded.metadata import Metadata
from services.oona.errors import LogCorruptError, bus_overloaded, bus_unavailable, topic_not_found
from services.oona.topics import TopicSpec

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

MAX_WAITING_BYTES: Final = 64 * 2**20
MAX_WAITING_RECORDS: Final = 100_000


@dataclass(slots=True)
class _Write:
    """A publish that waits for the disk."""

    records: Sequence[Record]
    done: asyncio.Future[list[Position]]
    size: int


class EmbeddedBus:
    """See :class:`services.oona.bus.Bus`.

    Publishes that arrive while the disk syncs share the next sync (group commit): the more load, the more
    records per sync. A record is acknowledged, and seen by readers, only after its sync.

    Args:
        folder: where everything is kept; locked against a second process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logs: dict[str, TopicLog] = {}
        self._offsets: dict[str, dict[TopicPartition, int]] = {}
        self._dirty: dict[tuple[str, TopicPartition], int] = {}
        self._members: dict[str, list[LogGroupMember]] = {}
        self._readers: set[LogReader] = set()
        self._waiting: list[_Write] = []
        self._waiting_bytes = 0
        self._waiting_records = 0
        self._work = asyncio.Event()
        self._storing = asyncio.Lock()
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="oona-disk")
        self._cleanup = contextlib.AsyncExitStack()
        self._stopping = False

    async def start(self) -> None:
        """See :class:`services.oona.bus.Bus`."""
        self._cleanup.callback(self._disk.shutdown)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._cleanup.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._metadata = Metadata(self._folder / "metadata.sqlite")
            self._cleanup.callback(self._metadata.close)
            self._offsets = self._metadata.offsets()
            for spec in self._metadata.topics():
                self._logs[spec.name] = await self._on_disk(partial(TopicLog, self._log_folder(spec.name), spec))
        except BlockingIOError as error:
            await self._cleanup.aclose()
            raise bus_unavailable(f"another process uses {self._folder}") from error
        except (OSError, sqlite3.Error, LogCorruptError) as error:
            await self._cleanup.aclose()
            raise bus_unavailable(f"the log in {self._folder} cannot be opened: {error}") from error
        self._cleanup.callback(self._close_logs)
        writer = asyncio.create_task(self._write_forever(), name="oona-log-writer")
        self._cleanup.push_async_callback(self._finish, writer)

    async def stop(self) -> None:
        """See :class:`services.oona.bus.Bus`."""
        await self._cleanup.aclose()

    async def create_topics(self, specs: Sequence[TopicSpec]) -> None:
        """See :class:`services.oona.bus.Bus`."""
        missing = [spec for spec in specs if spec.name not in self._logs]
        if not missing:
            return
        try:
            logs = await self._on_disk(lambda: [TopicLog(self._log_folder(spec.name), spec) for spec in missing])
            await self._on_disk(lambda: self._metadata.add_topics(missing))
        except (OSError, sqlite3.Error) as error:
            raise bus_unavailable(f"a topic cannot be made: {error}") from error
        for log in logs:
            self._logs.setdefault(log.spec.name, log)

    async def topics(self) -> list[TopicSpec]:
        """See :class:`services.oona.bus.Bus`."""
        return [self._logs[name].spec for name in sorted(self._logs)]

    async def publish(self, records: Sequence[Record]) -> list[Position]:
        """See :class:`services.oona.bus.Bus`."""
        if self._stopping:
            raise bus_unavailable("it is stopping")
        for record in records:
            self._log(record.topic)
        size = sum(len(record.value) for record in records)
        if self._waiting_bytes + size > MAX_WAITING_BYTES or self._waiting_records + len(records) > MAX_WAITING_RECORDS:
            raise bus_overloaded(f"{self._waiting_records} records wait for the disk")
        write = _Write(records, asyncio.get_running_loop().create_future(), size)
        self._waiting.append(write)
        self._waiting_bytes += size
        self._waiting_records += len(records)
        self._work.set()
        return await write.done

    async def ranges(self, topic: str) -> list[OffsetRange]:
        """See :class:`services.oona.bus.Bus`."""
        return self._log(topic).ranges()

    async def read(self, source: TopicPartition, offset: int, limit: int) -> list[StoredRecord]:
        """See :class:`services.oona.bus.Bus`."""
        return self._read(source, offset, limit)

    async def open_reader(self, starts: Mapping[TopicPartition, int]) -> Reader:
        """See :class:`services.oona.bus.Bus`."""
        for source in starts:
            self._log(source.topic)
        reader = LogReader(self._read, starts, lambda: self._readers.discard(reader))
        self._readers.add(reader)
        return reader

    async def join_group(self, group: str, topics: Sequence[str], *, latest: bool = False) -> LogGroupMember:
        """See :class:`services.oona.bus.Bus`."""
        logs = [self._log(topic) for topic in topics]
        if latest:
            committed = self._offsets.get(group, {})
            ends = {
                TopicPartition(log.spec.name, partition): log.end(partition)
                for log in logs
                for partition in range(log.spec.partitions)
            }
            self._commit_soon(group, {source: end for source, end in ends.items() if source not in committed})
        member = LogGroupMember(group, topics, self._read, self._commit_soon, lambda: self._leave(member))
        self._members.setdefault(group, []).append(member)
        self._readers.add(member)
        self._rebalance(group)
        return member

    async def committed(self, group: str) -> dict[TopicPartition, int]:
        """See :class:`services.oona.bus.Bus`."""
        return dict(self._offsets.get(group, {}))

    async def commit(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        """See :class:`services.oona.bus.Bus`."""
        self._commit_soon(group, offsets)
        await self._store_offsets()

    def _log(self, topic: str) -> TopicLog:
        log = self._logs.get(topic)
        if log is None:
            raise topic_not_found(topic)
        return log

    def _log_folder(self, topic: str) -> Path:
        return self._folder / "topics" / topic

    def _read(self, source: TopicPartition, offset: int, limit: int) -> list[StoredRecord]:
        try:
            return self._log(source.topic).read(source.partition, offset, limit)
        except (OSError, LogCorruptError) as error:
            raise bus_unavailable(f"{source.topic}/{source.partition} cannot be read: {error}") from error

    def _commit_soon(self, group: str, offsets: Mapping[TopicPartition, int]) -> None:
        committed = self._offsets.setdefault(group, {})
        for source, offset in offsets.items():
            if offset > committed.get(source, -1):  # a member that lost the partition meanwhile may come late
                committed[source] = offset
                self._dirty[group, source] = offset
        self._work.set()

    def _leave(self, member: LogGroupMember) -> None:
        self._readers.discard(member)
        members = self._members.get(member.group, [])
        if member in members:
            members.remove(member)
            self._rebalance(member.group)

    def _rebalance(self, group: str) -> None:
        members = self._members[group]
        committed = self._offsets.get(group, {})
        wanted = sorted({topic for member in members for topic in member.topics})
        sources = [
            TopicPartition(topic, partition)
            for topic in wanted
            for partition in range(self._logs[topic].spec.partitions)
        ]
        for member, mine in zip(members, share(sources, members), strict=True):
            member.assign({source: committed.get(source, 0) for source in mine})

    async def _write_forever(self) -> None:
        while not (self._stopping and not self._waiting):
            await self._work.wait()
            self._work.clear()
            writes, self._waiting = self._waiting, []
            await self._write(writes)
            await self._store_offsets_or_log()

    async def _write(self, writes: Sequence[_Write]) -> None:
        # One append and one sync per topic, whatever the number of publishes.
        by_topic: dict[str, list[Record]] = {}
        for write in writes:
            for record in write.records:
                by_topic.setdefault(record.topic, []).append(record)
        outcomes = await self._on_disk(
            lambda: {topic: self._append(topic, records) for topic, records in by_topic.items()}
        )
        taken = dict.fromkeys(by_topic, 0)
        for topic, outcome in outcomes.items():
            if not isinstance(outcome, OSError):
                self._logs[topic].expose(outcome)
        for write in writes:
            positions: list[Position] = []
            failure: OSError | None = None
            for record in write.records:
                outcome = outcomes[record.topic]
                if isinstance(outcome, OSError):
                    failure = outcome
                    continue
                positions.append(outcome[taken[record.topic]])
                taken[record.topic] += 1
            self._waiting_bytes -= write.size
            self._waiting_records -= len(write.records)
            if write.done.done():  # its caller has gone; the records are stored all the same
                continue
            if failure is not None:
                write.done.set_exception(bus_unavailable(f"the log cannot be written: {failure}"))
            else:
                write.done.set_result(positions)
        if writes:
            for reader in self._readers:
                reader.wake()

    def _append(self, topic: str, records: Sequence[Record]) -> list[Position] | OSError:
        try:
            return self._logs[topic].append(records)
        except OSError as error:
            return error

    async def _store_offsets(self) -> None:
        async with self._storing:  # who comes second returns only when the first, which has its offsets, is done
            dirty, self._dirty = self._dirty, {}
            if not dirty:
                return
            try:
                await self._on_disk(lambda: self._metadata.store_offsets(dirty))
            except sqlite3.Error as error:
                # Kept for the next try: until then a crash means that their events are delivered again.
                self._dirty = {**dirty, **self._dirty}
                raise bus_unavailable(f"offsets cannot be stored: {error}") from error

    async def _store_offsets_or_log(self) -> None:
        try:
            await self._store_offsets()
        except EsperError as error:
            _LOG.error("%s", error)

    async def _on_disk(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, call)

    async def _finish(self, writer: asyncio.Task[None]) -> None:
        self._stopping = True
        self._work.set()
        await writer
        await self._store_offsets_or_log()

    def _close_logs(self) -> None:
        for log in self._logs.values():
            log.close()

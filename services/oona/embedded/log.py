"""The log of one topic: segments, offsets, retention.

Two threads share it by a simple rule. The bus's disk thread alone calls :meth:`TopicLog.append`; the event
loop alone calls everything else. Readers see a record only after :meth:`TopicLog.expose`, which the loop
calls when the disk thread has made it durable.
"""

from __future__ import annotations

import contextlib
import errno
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from services.oona.bus import OffsetRange, Position, Record, StoredRecord
from services.oona.embedded.segment import Segment, encode_record
from services.oona.topics import TopicSpec

_SEGMENTS_PER_TOPIC: Final = 8
_MIN_SEGMENT_BYTES: Final = 64 * 1024
_MAX_SEGMENT_BYTES: Final = 32 * 2**20


class TopicLog:
    """The durable log of a topic.

    Args:
        folder: the topic's folder; made where missing. What a crash left torn at its end is cut.

    Raises:
        LogCorruptError: the log is damaged elsewhere than at its end.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, spec: TopicSpec) -> None:
        self.spec = spec
        self._folder = folder
        self._segment_bytes = min(
            _MAX_SEGMENT_BYTES, max(_MIN_SEGMENT_BYTES, spec.retention_bytes // _SEGMENTS_PER_TOPIC)
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._segments = self._open_segments()
        self._number = 1 + max((int(segment.path.stem) for segment in self._segments), default=-1)
        if not self._segments:
            self._roll([0] * spec.partitions)
        self._next = self._segments[-1].ends()
        self._durable = list(self._next)
        self._round_robin = 0
        self._failed = False

    def append(self, records: Sequence[Record]) -> list[Position]:
        """Writes records and makes them durable. Disk thread only.

        Raises:
            OSError: the disk refused; nothing of this call will be seen by readers.
        """
        if self._failed:
            raise OSError(
                errno.EIO, "an earlier write could not be made durable; restart the service", str(self._folder)
            )
        now = time.time_ns()
        ends = list(self._next)
        frames: list[tuple[int, bytes]] = []
        positions: list[Position] = []
        for record in records:
            partition = self._partition_of(record.key)
            offset = ends[partition]
            ends[partition] += 1
            content = encode_record(partition, offset, now, key=record.key, value=record.value, headers=record.headers)
            frames.append((partition, content))
            positions.append(Position(self.spec.name, partition, offset))
        active = self._segments[-1]
        if active.size >= self._segment_bytes:
            active.seal()
            self._roll(self._next)
            active = self._segments[-1]
        active.append(frames)
        try:
            active.sync()
        except OSError:
            # What the kernel has dropped it may not report again: nothing more is acknowledged in this log
            # before a restart has read what is really there.
            self._failed = True
            raise
        self._next = ends
        return positions

    def expose(self, positions: Sequence[Position]) -> None:
        """Lets readers see what :meth:`append` has stored, and deletes what is beyond the retention."""
        for position in positions:
            self._durable[position.partition] = position.offset + 1
        total = sum(segment.size for segment in self._segments)
        while total > self.spec.retention_bytes and len(self._segments) > 1:
            oldest = self._segments.pop(0)
            total -= oldest.size
            oldest.delete()

    def ranges(self) -> list[OffsetRange]:
        """The readable part of each partition."""
        return [OffsetRange(start, end) for start, end in zip(self._segments[0].first, self._durable, strict=True)]

    def end(self, partition: int) -> int:
        """The offset after the last readable record."""
        return self._durable[partition]

    def read(self, partition: int, offset: int, limit: int) -> list[StoredRecord]:
        """At most ``limit`` records from ``offset``, or from the start where that is later.

        Raises:
            LogCorruptError: a record's checksum is wrong.
        """
        offset = max(offset, self._segments[0].first[partition])
        end = min(offset + limit, self._durable[partition])
        found: list[StoredRecord] = []
        for number, segment in enumerate(self._segments):
            if offset >= end:
                break
            following = self._segments[number + 1].first[partition] if number + 1 < len(self._segments) else end
            if offset < following:
                found.extend(segment.read(self.spec.name, partition, offset, end))
                offset = following
        return found

    def close(self) -> None:
        """Closes the files."""
        for segment in self._segments:
            segment.close()
        self._segments = []

    def _partition_of(self, key: bytes) -> int:
        if key:
            return zlib.crc32(key) % self.spec.partitions
        self._round_robin += 1
        return self._round_robin % self.spec.partitions

    def _roll(self, first: Sequence[int]) -> None:
        path = self._folder / f"{self._number:012d}.log"
        # A roll that failed (disk full) leaves a file without a header; the next try takes its place.
        self._segments.append(Segment.create(path, first))
        self._number += 1

    def _open_segments(self) -> list[Segment]:
        paths = sorted(self._folder.glob("*.log"))
        with contextlib.ExitStack() as opened:
            segments: list[Segment] = []
            for number, path in enumerate(paths):
                segment = Segment.open(path, active=number == len(paths) - 1)
                if segment is None:
                    path.unlink()
                    continue
                opened.callback(segment.close)
                segments.append(segment)
            opened.pop_all()
        return segments

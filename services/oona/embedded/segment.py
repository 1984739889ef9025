"""One file of a topic's log.

Layout: an 8-byte magic, then frames. A frame is ``length:u32 crc32:u32 body``, little-endian. The first
frame is the header, JSON with the first offset of each partition in this file; every further frame is a
record: ``partition:u16 offset:i64 append_ns:i64 key_length:u16 header_count:u16``, key, headers
(``name_length:u16 value_length:u32 name value``), value.

A file that is written no more is *sealed* and has an index file beside it, so that a restart reads only
the last segment frame by frame.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from services.oona.bus import Headers, StoredRecord, TopicPartition
from services.oona.errors import LogCorruptError

MAGIC: Final = b"OONALOG1"
_INDEX_MAGIC: Final = b"OONAIDX1"
_FRAME: Final = struct.Struct("<II")
_RECORD: Final = struct.Struct("<HqqHH")
_HEADER: Final = struct.Struct("<HI")
# A frame's place in one integer: position << 24 | length. Frames stay below 16 MiB, files below 1 TiB.
_LENGTH_BITS: Final = 24
MAX_FRAME_BYTES: Final = (1 << _LENGTH_BITS) - 1


def frame(body: bytes) -> bytes:
    """A body with its length and checksum in front."""
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def encode_record(
    partition: int, offset: int, append_ns: int, *, key: bytes, value: bytes, headers: Headers = ()
) -> bytes:
    """The frame of a record."""
    parts = [_RECORD.pack(partition, offset, append_ns, len(key), len(headers)), key]
    for name, content in headers:
        encoded = name.encode()
        parts += [_HEADER.pack(len(encoded), len(content)), encoded, content]
    parts.append(value)
    return frame(b"".join(parts))


def decode_record(topic: str, body: bytes) -> StoredRecord:
    """The record of a frame's body, whose checksum has been verified."""
    partition, offset, append_ns, key_length, header_count = _RECORD.unpack_from(body)
    at = _RECORD.size
    key = body[at : at + key_length]
    at += key_length
    headers = []
    for _ in range(header_count):
        name_length, content_length = _HEADER.unpack_from(body, at)
        at += _HEADER.size
        name = body[at : at + name_length].decode()
        at += name_length
        headers.append((name, body[at : at + content_length]))
        at += content_length
    return StoredRecord(TopicPartition(topic, partition), offset, append_ns, key, body[at:], tuple(headers))


class Segment:
    """A segment file with its index in memory: 8 bytes per record.

    Attributes:
        first: first offset of each partition in this file.
        size: bytes of whole frames.
    """

    def __init__(self, path: Path, descriptor: int, first: Sequence[int], size: int) -> None:
        self.path = path
        self.first = list(first)
        self.size = size
        self._descriptor = descriptor
        self._index = [array("Q") for _ in first]

    @classmethod
    def create(cls, path: Path, first: Sequence[int]) -> Segment:
        """Makes an empty segment; it and its folder entry are durable on return."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, descriptor)
            head = MAGIC + frame(json.dumps({"first": list(first)}).encode())
            _write_all(descriptor, head, 0)
            os.fsync(descriptor)
            sync_folder(path.parent)
            on_failure.pop_all()
        return cls(path, descriptor, first, len(head))

    @classmethod
    def open(cls, path: Path, *, active: bool) -> Segment | None:
        """Opens a segment.

        The active one (the last of its topic) is read frame by frame and cut where a write was torn; None if
        not even its header is whole, in which case nothing in it was ever acknowledged.

        Raises:
            LogCorruptError: a sealed segment is damaged.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(os.close, descriptor)
            first = _read_first(descriptor)
            if first is None:
                if active:
                    return None
                raise LogCorruptError(f"{path.name} has no valid header")
            segment = cls(path, descriptor, first, 0)
            if active:
                path.with_suffix(".idx").unlink(missing_ok=True)
                segment._scan(tolerate_torn_end=True)
                if segment.size < os.fstat(descriptor).st_size:
                    os.ftruncate(descriptor, segment.size)
                    os.fsync(descriptor)
            elif not segment._load_index():
                segment._scan(tolerate_torn_end=False)
            on_failure.pop_all()
        return segment

    def ends(self) -> list[int]:
        """The offset after the last record of each partition."""
        return [first + len(index) for first, index in zip(self.first, self._index, strict=True)]

    def append(self, frames: Sequence[tuple[int, bytes]]) -> None:
        """Writes (partition, frame) pairs at the end; not durable before :meth:`sync`.

        Raises:
            OSError: nothing was written; the file is as before.
        """
        data = b"".join(content for _, content in frames)
        try:
            _write_all(self._descriptor, data, self.size)
        except OSError:
            os.ftruncate(self._descriptor, self.size)
            raise
        at = self.size
        for partition, content in frames:
            self._index[partition].append(at << _LENGTH_BITS | len(content))
            at += len(content)
        self.size = at

    def sync(self) -> None:
        """Makes all that was appended durable."""
        os.fdatasync(self._descriptor)

    def read(self, topic: str, partition: int, offset: int, end: int) -> Iterator[StoredRecord]:
        """The records ``offset <= o < end`` of a partition that are in this file.

        Raises:
            LogCorruptError: a record's checksum is wrong.
        """
        index, first = self._index[partition], self.first[partition]
        for position in range(max(offset - first, 0), min(end - first, len(index))):
            place = index[position]
            yield decode_record(topic, self._read_frame(place >> _LENGTH_BITS, place & MAX_FRAME_BYTES))

    def seal(self) -> None:
        """Writes the index file; the segment is written no more."""
        counts = [len(index) for index in self._index]
        body = json.dumps({"size": self.size, "counts": counts}).encode()
        arrays = b"".join(index.tobytes() for index in self._index)
        temporary = self.path.with_suffix(".idx.tmp")
        temporary.write_bytes(_INDEX_MAGIC + frame(body) + frame(arrays))
        temporary.replace(self.path.with_suffix(".idx"))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def delete(self) -> None:
        """Closes and removes the file and its index."""
        self.close()
        self.path.with_suffix(".idx").unlink(missing_ok=True)
        self.path.unlink()

    def _read_frame(self, position: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, position)
        body = data[_FRAME.size :]
        if len(data) != length or _FRAME.unpack_from(data) != (len(body), zlib.crc32(body)):
            raise LogCorruptError(f"{self.path.name}: the record at byte {position} is damaged")
        return body

    def _scan(self, *, tolerate_torn_end: bool) -> None:
        data = self.path.read_bytes()
        (header_length, _), at = _FRAME.unpack_from(data, len(MAGIC)), len(MAGIC) + _FRAME.size
        at += header_length
        expected = list(self.first)
        while at < len(data):
            body = _whole_frame(data, at)
            if body is None:
                if tolerate_torn_end:
                    break
                raise LogCorruptError(f"{self.path.name}: the record at byte {at} is damaged")
            partition, offset = _RECORD.unpack_from(body)[:2]
            if partition >= len(expected) or offset != expected[partition]:
                raise LogCorruptError(f"{self.path.name}: the record at byte {at} is out of order")
            expected[partition] += 1
            length = _FRAME.size + len(body)
            self._index[partition].append(at << _LENGTH_BITS | length)
            at += length
        self.size = at

    def _load_index(self) -> bool:
        path = self.path.with_suffix(".idx")
        if not path.exists():
            return False
        data = path.read_bytes()
        body = _whole_frame(data, len(_INDEX_MAGIC))
        if data[: len(_INDEX_MAGIC)] != _INDEX_MAGIC or body is None:
            return False
        arrays = _whole_frame(data, len(_INDEX_MAGIC) + _FRAME.size + len(body))
        if arrays is None:
            return False
        meta = json.loads(body)
        at = 0
        for index, count in zip(self._index, meta["counts"], strict=True):
            index.frombytes(arrays[at : at + count * index.itemsize])
            at += count * index.itemsize
        self.size = meta["size"]
        return True


def _whole_frame(data: bytes, at: int) -> bytes | None:
    if at + _FRAME.size > len(data):
        return None
    length, checksum = _FRAME.unpack_from(data, at)
    body = data[at + _FRAME.size : at + _FRAME.size + length]
    return body if len(body) == length and zlib.crc32(body) == checksum else None


def _read_first(descriptor: int) -> list[int] | None:
    head = os.pread(descriptor, 65_536, 0)
    body = _whole_frame(head, len(MAGIC))
    if head[: len(MAGIC)] != MAGIC or body is None:
        return None
    first: list[int] = json.loads(body)["first"]
    return first


def _write_all(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

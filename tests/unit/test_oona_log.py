"""The embedded log: what is on disk, what is cut, what is refused."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.chassis.errors import EsperError, Reason
from services.oona.bus import Position, Record, TopicPartition
from services.oona.embedded import bus as embedded
from services.oona.embedded.bus import EmbeddedBus
from services.oona.embedded.groups import LogGroupMember, share
from services.oona.embedded.log import TopicLog
from services.oona.embedded.metadata import Metadata
from services.oona.embedded.segment import Segment, decode_record, encode_record
from services.oona.errors import LogCorruptError
from services.oona.topics import TopicSpec

SPEC = TopicSpec("t", ("a.B",), 2, 2**19)  # segments of 64 KiB, eight kept
ROOT = Path(__file__).resolve().parents[2]


def fill(log: TopicLog, count: int, *, size: int = 1000, start: int = 0) -> list[Position]:
    positions = log.append(
        [Record("t", b"k%d" % (n % 5), b"%d " % n + b"x" * size) for n in range(start, start + count)]
    )
    log.expose(positions)
    return positions


def values(log: TopicLog) -> list[int]:
    found = []
    for partition, bounds in enumerate(log.ranges()):
        found += [int(r.value.split()[0]) for r in log.read(partition, bounds.start, 10**6)]
    return sorted(found)


def files(folder: Path, suffix: str = ".log") -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A full disk, as the kernel tells it: a write beyond fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_is_what_it_was() -> None:
    headers = (("a", b"1"), ("bü", b""))
    body = encode_record(3, 7, 11, key=b"key", value=b"value", headers=headers)[8:]
    record = decode_record("t", body)
    assert (record.source, record.offset, record.append_ns) == (TopicPartition("t", 3), 7, 11)
    assert (record.key, record.value, record.headers) == (b"key", b"value", headers)


def test_segments_roll_and_are_read_across(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    for batch in range(20):
        fill(log, 10, start=10 * batch)
    assert len(files(tmp_path)) > 2
    assert len(files(tmp_path, ".idx")) == len(files(tmp_path)) - 1
    assert values(log) == list(range(200))
    partition = next(p for p, bounds in enumerate(log.ranges()) if bounds.end > 60)
    middle = log.read(partition, 30, 25)
    assert [record.offset for record in middle] == list(range(30, 55))
    log.close()


@pytest.mark.parametrize("spoil", ["nothing", "no index", "torn index", "alien index", "half index"])
def test_a_restart_reads_everything_with_or_without_index(tmp_path: Path, spoil: str) -> None:
    log = TopicLog(tmp_path, SPEC)
    for batch in range(20):
        fill(log, 10, start=10 * batch)
    log.close()
    for index in files(tmp_path, ".idx"):
        match spoil:
            case "no index":
                index.unlink()
            case "torn index":
                index.write_bytes(index.read_bytes()[:12])
            case "alien index":
                index.write_bytes(b"x" * 100)
            case "half index":
                index.write_bytes(index.read_bytes()[:-1])
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == list(range(200))
    fill(log, 10, start=200)
    assert values(log) == list(range(210))
    log.close()


def test_retention_deletes_the_oldest_and_keeps_offsets(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    for batch in range(100):
        fill(log, 10, start=10 * batch)
    starts = [bounds.start for bounds in log.ranges()]
    assert all(start > 0 for start in starts)
    kept = values(log)
    assert kept[-1] == 999
    assert len(kept) < 1000
    assert sum(path.stat().st_size for path in files(tmp_path)) <= SPEC.retention_bytes
    assert log.read(0, 0, 1)[0].offset == starts[0], "an offset that is gone is read from the start"
    log.close()
    log = TopicLog(tmp_path, SPEC)
    assert [bounds.start for bounds in log.ranges()] == starts
    assert values(log) == kept
    log.close()


@pytest.mark.parametrize("cut", [1, 5, 500, 1005])
def test_a_torn_end_is_cut(tmp_path: Path, cut: int) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 10)
    log.close()
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == list(range(9))
    fill(log, 1, start=9)
    log.close()
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == list(range(10))
    log.close()


def test_a_segment_whose_header_was_torn_held_nothing(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 10)
    log.close()
    (tmp_path / "000000000001.log").write_bytes(b"OONAL")
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == list(range(10))
    fill(log, 5, start=10)
    assert values(log) == list(range(15))
    log.close()


@pytest.mark.parametrize("what", ["header", "record", "order"])
def test_damage_elsewhere_is_not_passed_over(tmp_path: Path, what: str) -> None:
    log = TopicLog(tmp_path, SPEC)
    for batch in range(20):
        fill(log, 10, start=10 * batch)
    log.close()
    first = files(tmp_path)[0]
    data = bytearray(first.read_bytes())
    if what == "header":
        data[9] ^= 1
    elif what == "record":
        data[2000] ^= 1
    else:
        data += encode_record(0, 10**6, 0, key=b"", value=b"")
    first.write_bytes(data)
    first.with_suffix(".idx").unlink()
    with pytest.raises(LogCorruptError, match=first.name):
        TopicLog(tmp_path, SPEC)


def test_a_record_that_rots_is_found_when_it_is_read(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 10)
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogCorruptError, match="damaged"):
        values(log)
    log.close()


def test_a_full_disk_refuses_and_harms_nothing(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 10)
    with file_size_limit(20_000), pytest.raises(OSError, match="large"):
        fill(log, 30, start=10)
    assert values(log) == list(range(10))
    fill(log, 5, start=10)
    log.close()
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == list(range(15))
    log.close()


def test_a_segment_that_cannot_be_made_leaves_the_log_usable(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 70)
    with file_size_limit(10), pytest.raises(OSError, match="large"):
        fill(log, 1, start=70)
    fill(log, 1, start=70)
    assert values(log) == list(range(71))
    log.close()


def test_after_a_failed_sync_nothing_more_is_acknowledged(tmp_path: Path) -> None:
    log = TopicLog(tmp_path, SPEC)
    fill(log, 3)
    # A device that takes writes and cannot make them durable: fdatasync of it is EINVAL.
    os.close(log._segments[-1]._descriptor)
    log._segments[-1]._descriptor = os.open("/dev/null", os.O_RDWR)
    with pytest.raises(OSError, match="Invalid argument"):
        fill(log, 1, start=3)
    with pytest.raises(OSError, match="restart the service"):
        fill(log, 1, start=3)
    assert sum(bounds.end for bounds in log.ranges()) == 3
    log.close()
    log = TopicLog(tmp_path, SPEC)
    assert values(log) == [0, 1, 2]
    log.close()


def test_segments_close_what_they_cannot_use(tmp_path: Path) -> None:
    bad = tmp_path / "1.log"
    bad.write_bytes(b"no log")
    assert Segment.open(bad, active=True) is None
    with pytest.raises(LogCorruptError, match="no valid header"):
        Segment.open(bad, active=False)


# ---- metadata ----


def test_metadata_are_kept(tmp_path: Path) -> None:
    store = Metadata(tmp_path / "m.sqlite")
    other = TopicSpec("u", ("a.B", "a.C"), 1, 5, created_ns=7)
    store.add_topics([other, SPEC])
    store.store_offsets({("g", TopicPartition("t", 0)): 4})
    store.store_offsets({("g", TopicPartition("t", 0)): 9, ("h", TopicPartition("t", 1)): 1})
    store.close()
    store = Metadata(tmp_path / "m.sqlite")
    assert store.topics() == [SPEC, other]
    assert store.offsets() == {"g": {TopicPartition("t", 0): 9}, "h": {TopicPartition("t", 1): 1}}
    with pytest.raises(sqlite3.Error):
        store._transact("INSERT INTO nowhere VALUES (?)", [(1,)])
    store.store_offsets({("g", TopicPartition("t", 0)): 10})
    store.close()


# ---- groups ----


def members(*topics: list[str]) -> list[LogGroupMember]:
    return [LogGroupMember("g", wanted, lambda *_: [], lambda *_: None, lambda: None) for wanted in topics]


def test_shares_are_even_and_stay_where_they_are() -> None:
    sources = [TopicPartition(topic, p) for topic in ("a", "b") for p in range(4)]
    both = members(["a", "b"], ["a", "b"])
    both[0].assign(dict.fromkeys(sources, 0))
    shares = share(sources, both)
    assert [len(part) for part in shares] == [4, 4]
    assert sorted(shares[0] + shares[1], key=str) == sorted(sources, key=str)
    for member, part in zip(both, shares, strict=True):
        member.assign(dict.fromkeys(part, 0))
    assert share(sources, both) == shares
    (everything,) = share(sources, both[1:])
    assert sorted(everything, key=str) == sorted(sources, key=str)


def test_only_who_wants_a_topic_gets_its_partitions() -> None:
    sources = [TopicPartition("a", 0), TopicPartition("b", 0), TopicPartition("c", 0)]
    assert share(sources, members(["a"], ["b"])) == [[sources[0]], [sources[1]]]


# ---- the bus ----


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[EmbeddedBus]:
    opened = EmbeddedBus(tmp_path / "log")
    await opened.start()
    await opened.create_topics([SPEC])
    yield opened
    await opened.stop()


async def test_a_second_process_is_refused(bus: EmbeddedBus, tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
sys.path[:0] = [{str(ROOT)!r}]
import services
from pathlib import Path
from services.oona.embedded.bus import EmbeddedBus
asyncio.run(EmbeddedBus(Path({str(tmp_path / "log")!r})).start())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "another process uses" in done.stderr


async def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    bus = EmbeddedBus(tmp_path / "log")
    await bus.start()
    await bus.create_topics([SPEC])
    await bus.stop()
    folder = tmp_path / "log" / "topics" / "t"
    (folder / "000000000000.log").write_bytes(b"damaged")
    (folder / "000000000009.log").write_bytes(b"")
    with pytest.raises(EsperError, match="no valid header") as caught:
        await EmbeddedBus(tmp_path / "log").start()
    assert caught.value.reason is Reason.BUS_UNAVAILABLE


async def test_a_full_disk_is_an_error_of_the_publish_and_passes(bus: EmbeddedBus) -> None:
    await bus.publish([Record("t", b"k", b"1")])
    with file_size_limit(10), pytest.raises(EsperError) as caught:
        await bus.publish([Record("t", b"k", b"x" * 1000)])
    assert caught.value.reason is Reason.BUS_UNAVAILABLE
    await bus.publish([Record("t", b"k", b"2")])
    partition = next(p for p, bounds in enumerate(await bus.ranges("t")) if bounds.end)
    assert [r.value for r in await bus.read(TopicPartition("t", partition), 0, 9)] == [b"1", b"2"]


async def test_a_topic_that_cannot_be_made_is_an_error(bus: EmbeddedBus) -> None:
    with file_size_limit(10), pytest.raises(EsperError, match="cannot be made"):
        await bus.create_topics([TopicSpec("u", ("a.B",), 1, 2**20)])
    await bus.create_topics([TopicSpec("u", ("a.B",), 1, 2**20)])


async def test_what_waits_for_the_disk_is_bounded(bus: EmbeddedBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MAX_WAITING_RECORDS", 5)
    monkeypatch.setattr(embedded, "MAX_WAITING_BYTES", 1000)
    for records in ([Record("t", b"", b"")] * 6, [Record("t", b"", b"x" * 1001)]):
        with pytest.raises(EsperError) as caught:
            await bus.publish(records)
        assert caught.value.reason is Reason.BUS_OVERLOADED
    await asyncio.gather(*(bus.publish([Record("t", b"", b"")]) for _ in range(5)))


async def test_a_caller_that_goes_leaves_its_records(bus: EmbeddedBus) -> None:
    publishing = asyncio.create_task(bus.publish([Record("t", b"k", b"1")]))
    await asyncio.sleep(0)
    publishing.cancel()
    await bus.publish([Record("t", b"k", b"2")])
    assert sum(bounds.end for bounds in await bus.ranges("t")) == 2


async def test_a_stopped_bus_refuses(tmp_path: Path) -> None:
    bus = EmbeddedBus(tmp_path / "log")
    await bus.start()
    await bus.create_topics([SPEC])
    await bus.stop()
    with pytest.raises(EsperError, match="stopping"):
        await bus.publish([Record("t", b"", b"")])


async def test_damage_met_while_reading_is_an_error(bus: EmbeddedBus, tmp_path: Path) -> None:
    (position,) = await bus.publish([Record("t", b"k", b"1")])
    path = tmp_path / "log/topics/t/000000000000.log"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EsperError, match="damaged"):
        await bus.read(TopicPartition("t", position.partition), 0, 1)


async def test_offsets_that_cannot_be_stored_are_kept_for_the_next_try(bus: EmbeddedBus, tmp_path: Path) -> None:
    lock = sqlite3.connect(tmp_path / "log/metadata.sqlite", isolation_level=None)
    bus._metadata._connection.execute("PRAGMA busy_timeout=50")
    lock.execute("BEGIN IMMEDIATE")
    source = TopicPartition("t", 0)
    with pytest.raises(EsperError, match="offsets cannot be stored"):
        await bus.commit("g", {source: 3})
    await bus.publish([Record("t", b"k", b"1")])  # the writer met the lock too, and lives
    lock.execute("ROLLBACK")
    lock.close()
    await bus.commit("g", {source: 2})
    assert await bus.committed("g") == {source: 3}, "a commit never goes back"
    assert Metadata(tmp_path / "log/metadata.sqlite").offsets() == {"g": {source: 3}}

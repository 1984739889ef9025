"""One suite over both implementations of the bus port: the embedded log and a real Kafka broker."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from services.chassis.errors import EsperError, Reason
from services.oona.bus import Bus, Position, Reader, Record, StoredRecord, TopicPartition
from services.oona.counters import Counters
from services.oona.embedded.bus import EmbeddedBus
from services.oona.kafka.bus import KafkaBus
from services.oona.kafka.consumer import HANDOVER_RECORDS, KafkaReader
from services.oona.subscription import REDRIVE_GROUP_HEADER, Delivered, FailureLedger, Subscription
from services.oona.topics import TopicSpec
from tests.infrastructure.kafka import KafkaBroker

ROOT = Path(__file__).resolve().parents[2]
TOPIC = TopicSpec("grades", ("a.B",), 3, 2**20)
OTHER = TopicSpec("other", ("a.B", "a.C"), 1, 2**20, created_ns=1234)

pytestmark = pytest.mark.timeout(120)

OpenBus = Callable[[], Awaitable[Bus]]


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
async def open_bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OpenBus]:
    """Opens the bus over the same data each time; closes what a test leaves open."""
    prefix = f"t{uuid.uuid4().hex[:8]}-"
    opened: list[Bus] = []
    broker: KafkaBroker | None = request.getfixturevalue("kafka_broker") if request.param == "kafka" else None

    async def open_one() -> Bus:
        bus: Bus = EmbeddedBus(tmp_path / "log") if broker is None else KafkaBus([broker.bootstrap], prefix=prefix)
        await bus.start()
        opened.append(bus)
        await bus.create_topics([TOPIC, OTHER])
        return bus

    yield open_one
    for bus in opened:
        await bus.stop()


def records(count: int, *, keys: int = 4, start: int = 0, topic: str = TOPIC.name) -> list[Record]:
    return [Record(topic, f"k{n % keys}".encode(), f"{n}".encode()) for n in range(start, start + count)]


def numbers(found: Sequence[StoredRecord]) -> list[int]:
    return [int(record.value) for record in found]


async def read_all(bus: Bus, topic: str = TOPIC.name) -> list[StoredRecord]:
    found: list[StoredRecord] = []
    for partition, bounds in enumerate(await bus.ranges(topic)):
        found += await bus.read(TopicPartition(topic, partition), bounds.start, 100_000)
    return found


async def take(reader: Reader, count: int) -> list[StoredRecord]:
    found: list[StoredRecord] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += (await reader.poll(100)).records
    return found


def assert_order_per_key(found: Sequence[StoredRecord]) -> None:
    last: dict[bytes, int] = {}
    for record in found:
        assert last.get(record.key, -1) < int(record.value), f"key {record.key!r} out of order"
        last[record.key] = int(record.value)


@contextlib.asynccontextmanager
async def subscribed(
    bus: Bus, group: str = "g", *, credit: int = 1000, max_attempts: int = 3, ledger: FailureLedger | None = None
) -> AsyncIterator[tuple[Subscription, list[tuple[StoredRecord, str, str, int]]]]:
    letters: list[tuple[StoredRecord, str, str, int]] = []

    async def dead_letter(record: StoredRecord, name: str, reason: str, attempts: int) -> None:
        letters.append((record, name, reason, attempts))

    subscription = Subscription(
        group=group,
        member=await bus.join_group(group, [TOPIC.name]),
        dead_letter=dead_letter,
        ledger=ledger or FailureLedger(),
        max_attempts=max_attempts,
        credit=credit,
        counters=Counters(),
    )
    try:
        yield subscription, letters
    finally:
        await subscription.close()


async def deliveries(subscription: Subscription) -> AsyncIterator[Delivered]:
    async with asyncio.timeout(40):
        async for batch in subscription.deliveries():
            for delivered in batch:
                yield delivered


async def test_topics_are_listed_by_name_and_stay_as_they_are(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.create_topics([TopicSpec(TOPIC.name, ("x.Y",), 3, 2**21)])
    assert await bus.topics() == [TOPIC, OTHER]


async def test_topics_survive_a_restart(open_bus: OpenBus) -> None:
    await (await open_bus()).stop()
    assert await (await open_bus()).topics() == [TOPIC, OTHER]


async def test_publish_gives_one_position_per_record_and_keeps_key_in_one_partition(open_bus: OpenBus) -> None:
    bus = await open_bus()
    positions = await bus.publish(records(40))
    by_key: dict[int, set[int]] = {}
    for number, position in enumerate(positions):
        assert position.topic == TOPIC.name
        by_key.setdefault(number % 4, set()).add(position.partition)
    assert all(len(partitions) == 1 for partitions in by_key.values())
    assert len(set(positions)) == 40


async def test_records_are_read_as_they_were_published(open_bus: OpenBus) -> None:
    bus = await open_bus()
    headers = (("traceparent", b"00-1-2-01"), ("empty", b""))
    (first, second) = await bus.publish([Record("other", b"", b"v", headers), Record("other", b"key", b"")])
    found = await bus.read(TopicPartition("other", 0), 0, 10)
    assert [(r.key, r.value, r.headers, r.offset) for r in found] == [
        (b"", b"v", headers, first.offset),
        (b"key", b"", (), second.offset),
    ]
    assert all(record.append_ns > 1_600_000_000 * 10**9 for record in found)
    assert first == Position("other", 0, 0)


async def test_records_without_key_use_all_partitions(open_bus: OpenBus) -> None:
    bus = await open_bus()
    for _ in range(30):
        await bus.publish([Record(TOPIC.name, b"", b"1")])
    assert all(bounds.end > 0 for bounds in await bus.ranges(TOPIC.name))


async def test_read_is_bounded_and_clamped(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(10, topic="other"))
    source = TopicPartition("other", 0)
    assert numbers(await bus.read(source, 3, 4)) == [3, 4, 5, 6]
    assert numbers(await bus.read(source, 8, 100)) == [8, 9]
    assert await bus.read(source, 10, 5) == []
    assert await bus.read(source, 3, 0) == []
    assert numbers(await bus.read(source, -5, 2)) == [0, 1]


async def test_concurrent_publishes_keep_their_own_order(open_bus: OpenBus) -> None:
    bus = await open_bus()
    batches = [[Record(TOPIC.name, f"p{p}".encode(), f"{n}".encode()) for n in range(200)] for p in range(8)]
    await asyncio.gather(*(bus.publish(batch) for batch in batches))
    found = await read_all(bus)
    assert len(found) == 1600
    assert_order_per_key(found)


async def test_unknown_topic_is_refused_everywhere(open_bus: OpenBus) -> None:
    bus = await open_bus()
    attempts: list[Awaitable[object]] = [
        bus.publish([*records(1), Record("nowhere", b"", b"")]),
        bus.ranges("nowhere"),
        bus.read(TopicPartition("nowhere", 0), 0, 1),
        bus.open_reader({TopicPartition("nowhere", 0): 0}),
        bus.join_group("g", ["nowhere"]),
    ]
    for attempt in attempts:
        with pytest.raises(EsperError) as caught:
            await attempt
        assert caught.value.reason is Reason.TOPIC_NOT_FOUND
    assert await read_all(bus) == []


async def test_records_and_offsets_survive_a_restart(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(30))
    await bus.commit("g", {TopicPartition(TOPIC.name, 1): 2})
    await bus.stop()
    await bus.stop()
    bus = await open_bus()
    assert sorted(numbers(await read_all(bus))) == list(range(30))
    assert await bus.committed("g") == {TopicPartition(TOPIC.name, 1): 2}
    assert await bus.committed("nobody") == {}
    assert (await bus.publish(records(1, topic="other")))[0].offset == 0


async def test_a_reader_follows_new_records(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(5, topic="other"))
    reader = await bus.open_reader({TopicPartition("other", 0): 3})
    assert numbers(await take(reader, 2)) == [3, 4]
    waiting = asyncio.create_task(take(reader, 3))
    await asyncio.sleep(0)
    await bus.publish(records(3, start=5, topic="other"))
    assert numbers(await waiting) == [5, 6, 7]
    await reader.close()
    await reader.close()


async def test_a_group_begins_at_the_start_or_with_latest_at_the_end(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(6))
    early = await bus.join_group("early", [TOPIC.name])
    assert sorted(numbers(await take(early, 6))) == list(range(6))
    await early.close()
    late = await bus.join_group("late", [TOPIC.name], latest=True)
    waiting = asyncio.create_task(take(late, 4))
    async with asyncio.timeout(20):
        while sum(offset for offset in (await bus.committed("late")).values()) < 6:
            await asyncio.sleep(0.02)
    await bus.publish(records(4, start=6))
    assert sorted(numbers(await waiting)) == [6, 7, 8, 9]
    await late.close()
    # Committed with the first join: what comes while nobody is there is not lost.
    await bus.publish(records(4, start=10))
    again = await bus.join_group("late", [TOPIC.name], latest=True)
    assert set(range(10, 14)) <= set(numbers(await take(again, 8)))
    await again.close()


async def test_acknowledged_is_committed_and_not_delivered_again(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(50))
    async with subscribed(bus) as (subscription, _):
        seen: list[StoredRecord] = []
        async for delivered in deliveries(subscription):
            seen.append(delivered.record)
            subscription.ack([delivered.delivery_id, 999_999])
            if len(seen) == 50:
                break
    assert_order_per_key(seen)
    ends = {TopicPartition(TOPIC.name, p): bounds.end for p, bounds in enumerate(await bus.ranges(TOPIC.name))}
    assert await bus.committed("g") == {source: end for source, end in ends.items() if end}
    await bus.publish(records(1, start=50))
    async with subscribed(bus) as (subscription, _):
        async for delivered in deliveries(subscription):
            assert int(delivered.record.value) == 50
            break


async def test_only_the_in_order_prefix_is_committed(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(10, keys=1))
    async with subscribed(bus) as (subscription, _):
        async for delivered in deliveries(subscription):
            if delivered.record.value not in {b"3", b"7"}:
                subscription.ack([delivered.delivery_id])
            if delivered.record.value == b"9":
                break
    assert list((await bus.committed("g")).values()) == [3]
    async with subscribed(bus) as (subscription, _):
        again = []
        async for delivered in deliveries(subscription):
            again.append(int(delivered.record.value))
            if len(again) == 7:
                break
    assert again == [3, 4, 5, 6, 7, 8, 9]


async def test_a_failed_record_comes_again_with_the_rest_of_its_key_in_order(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish([Record(TOPIC.name, b"a", f"{n}".encode()) for n in range(5)])
    await bus.publish([Record(TOPIC.name, b"b", f"{n}".encode()) for n in range(5)])
    seen: dict[bytes, list[tuple[int, int]]] = {b"a": [], b"b": []}
    failed = False
    async with subscribed(bus) as (subscription, letters):
        async for delivered in deliveries(subscription):
            seen[delivered.record.key].append((int(delivered.record.value), delivered.attempt))
            if delivered.record.key == b"a" and delivered.record.value == b"3" and not failed:
                failed = True
                await subscription.nack(delivered.delivery_id, "not yet", 0.05)
                await subscription.nack(delivered.delivery_id, "said twice", 0.05)
            else:
                subscription.ack([delivered.delivery_id])
            if [n for n, _ in seen[b"a"]][-2:] == [3, 4] and failed and len(seen[b"b"]) == 5 and len(seen[b"a"]) >= 6:
                break
    assert seen[b"b"] == [(n, 1) for n in range(5)]
    assert seen[b"a"][:4] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert seen[b"a"][-2][:2] == (3, 2)
    assert seen[b"a"][-1][0] == 4
    assert letters == []


async def test_poison_goes_to_the_dead_letters_and_the_key_goes_on(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(3, keys=1))
    attempts = []
    async with subscribed(bus) as (subscription, letters):
        async for delivered in deliveries(subscription):
            if delivered.record.value == b"1":
                attempts.append(delivered.attempt)
                await subscription.nack(delivered.delivery_id, f"no, for the {delivered.attempt}. time", 0.0)
            else:
                subscription.ack([delivered.delivery_id])
            if delivered.record.value == b"2" and len(attempts) == 3:
                break
    assert attempts == [1, 2, 3]
    ((record, group, reason, failures),) = letters
    assert (record.value, group, reason, failures) == (b"1", "g", "no, for the 3. time", 3)
    assert list((await bus.committed("g")).values()) == [3]


async def test_failures_are_remembered_across_subscriptions(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(1))
    ledger = FailureLedger()
    for attempt in (1, 2):
        async with subscribed(bus, ledger=ledger, max_attempts=2) as (subscription, letters):
            async for delivered in deliveries(subscription):
                assert delivered.attempt == attempt
                await subscription.close(vanished=True)  # the handler died with the record in its hands
                break
    async with subscribed(bus, ledger=ledger, max_attempts=2) as (subscription, letters):
        await bus.publish(records(1, start=4))  # same key
        async for delivered in deliveries(subscription):
            assert delivered.record.value == b"4"
            break
        ((_, _, reason, failures),) = letters
        assert "vanished" in reason
        assert failures == 2


async def test_credit_bounds_what_is_on_its_way(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(records(30))
    async with subscribed(bus, credit=0) as (subscription, _):
        batches = aiter(subscription.deliveries())
        waiting = asyncio.ensure_future(anext(batches))
        done, _pending = await asyncio.wait({waiting}, timeout=0.5)
        assert not done
        subscription.grant(4)
        got = len(await waiting)
        while got < 4:
            got += len(await anext(batches))
        assert got == 4
        assert subscription.credit == 0
        subscription.grant(10**6)
        assert subscription.credit == 10_000


async def test_a_redriven_record_reaches_only_its_group(open_bus: OpenBus) -> None:
    bus = await open_bus()
    await bus.publish(
        [Record(TOPIC.name, b"k", b"1", ((REDRIVE_GROUP_HEADER, b"mine"),)), Record(TOPIC.name, b"k", b"2")]
    )
    for group, expected in (("mine", [1, 2]), ("yours", [2])):
        seen: list[int] = []
        async with subscribed(bus, group) as (subscription, _):
            async for delivered in deliveries(subscription):
                seen.append(int(delivered.record.value))
                subscription.ack([delivered.delivery_id])
                if seen[-1] == 2:
                    break
        assert seen == expected


async def test_members_share_partitions_and_take_over(open_bus: OpenBus) -> None:
    bus = await open_bus()
    keys = 24
    seen: dict[str, list[StoredRecord]] = {"one": [], "two": []}
    everything = asyncio.Event()
    published = 0

    async def work(name: str, subscription: Subscription) -> None:
        async for batch in subscription.deliveries():
            for delivered in batch:
                seen[name].append(delivered.record)
                subscription.ack([delivered.delivery_id])
            subscription.grant(len(batch))
            if {int(record.value) for found in seen.values() for record in found} == set(range(published)):
                everything.set()

    async def publish(count: int) -> None:
        nonlocal published
        everything.clear()
        start, published = published, published + count
        await bus.publish(records(count, keys=keys, start=start))
        await asyncio.wait_for(everything.wait(), 60)

    async with subscribed(bus) as (one, _):
        first = asyncio.create_task(work("one", one))
        await publish(240)
        async with subscribed(bus) as (two, _):
            second = asyncio.create_task(work("two", two))
            # Publish until the newcomer has its share.
            async with asyncio.timeout(60):
                while not seen["two"]:
                    await publish(24)
            second.cancel()
            await asyncio.gather(second, return_exceptions=True)
        await publish(240)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_slow_reader_is_waited_for(open_bus: OpenBus) -> None:
    bus = await open_bus()
    reader = await bus.open_reader({TopicPartition("other", 0): 0})
    total = 8000  # several times what is handed over ahead
    for start in range(0, total, 1000):
        await bus.publish(records(1000, start=start, topic="other"))
    if isinstance(reader, KafkaReader):
        async with asyncio.timeout(20):
            while len(reader._handover) < HANDOVER_RECORDS:
                await asyncio.sleep(0.05)
    assert numbers(await take(reader, total)) == list(range(total))
    if isinstance(reader, KafkaReader):
        assert len(reader._handover) == 0
    await reader.close()


async def test_what_waits_for_the_bus_is_bounded(open_bus: OpenBus, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = await open_bus()
    for module in ("services.oona.embedded.bus", "services.oona.kafka.bus"):
        monkeypatch.setattr(f"{module}.MAX_WAITING_RECORDS", 5)
        monkeypatch.setattr(f"{module}.MAX_WAITING_BYTES", 1000)
    for batch in ([Record("other", b"", b"")] * 6, [Record("other", b"", b"x" * 1001)]):
        with pytest.raises(EsperError) as caught:
            await bus.publish(batch)
        assert caught.value.reason is Reason.BUS_OVERLOADED
    await asyncio.gather(*(bus.publish(records(1, topic="other")) for _ in range(5)))
    await bus.publish(records(5, topic="other"))


PUBLISHER = """
import asyncio, sys
sys.path[:0] = [{root!r}, {contracts!r}]
from pathlib import Path
from services.oona.bus import Record
from services.oona.embedded.bus import EmbeddedBus

async def main():
    bus = EmbeddedBus(Path({folder!r}))
    await bus.start()
    async def publish(lane):
        for n in range(10**6):
            batch = [Record("grades", b"k%d" % lane, b"%d" % (10 * n + m)) for m in range(10)]
            await bus.publish(batch)
            print(lane, 10 * n + 9, flush=True)
    await asyncio.gather(*(publish(lane) for lane in range(4)))

asyncio.run(main())
"""


@pytest.mark.parametrize("torn", [b"", b"\x30\x00\x00\x00half of a rec"])
async def test_nothing_acknowledged_is_lost_when_the_embedded_bus_is_killed(tmp_path: Path, torn: bytes) -> None:
    folder = tmp_path / "log"
    bus = EmbeddedBus(folder)
    await bus.start()
    await bus.create_topics([TopicSpec(TOPIC.name, ("a.B",), 3, 2**26)])
    await bus.stop()
    acknowledged: dict[int, int] = {}
    for _ in range(2):
        source = PUBLISHER.format(root=str(ROOT), contracts=str(ROOT / "services/contracts"), folder=str(folder))
        with subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            lines = 0
            for line in child.stdout:  # goes on after the kill, to what was acknowledged before it
                if not line.endswith("\n"):  # the kill met it in the middle of its report
                    break
                lane, number = map(int, line.split())
                acknowledged[lane] = number
                lines += 1
                if lines == 150:
                    os.kill(child.pid, signal.SIGKILL)
            assert child.stderr is not None
            assert lines >= 150, child.stderr.read()
        # What the kernel would leave of a write that a power cut has torn.
        newest = max((folder / "topics" / TOPIC.name).glob("*.log"))
        with newest.open("ab") as log:
            log.write(torn)
        bus = EmbeddedBus(folder)
        await bus.start()
        found = await read_all(bus)
        stored: dict[int, list[int]] = {}
        for record in found:
            stored.setdefault(int(record.key[1:]), []).append(int(record.value))
        for lane, last in acknowledged.items():
            assert set(range(last + 1)) <= set(stored[lane])
        for bounds in await bus.ranges(TOPIC.name):
            assert bounds.start == 0
        # Each life numbers from 0 again; within a life every lane is in order.
        for numbers_of_lane in stored.values():
            lives = [n for n in numbers_of_lane if n == 0]
            steps = sum(later != earlier + 1 for earlier, later in itertools.pairwise(numbers_of_lane))
            assert steps == len(lives) - 1
        await bus.stop()
        acknowledged = {}


@pytest.mark.kafka
async def test_nothing_acknowledged_is_lost_when_the_broker_is_killed(kafka_broker: KafkaBroker) -> None:
    bus = KafkaBus([kafka_broker.bootstrap], prefix=f"t{uuid.uuid4().hex[:8]}-")
    await bus.start()
    acknowledged: set[int] = set()
    seen: list[StoredRecord] = []
    try:
        await bus.create_topics([TOPIC])
        done = asyncio.Event()

        async def publish() -> None:
            for number in range(0, 3000, 10):
                await bus.publish(records(10, start=number))
                acknowledged.update(range(number, number + 10))
                if number == 1000:
                    killed.set()
            done.set()

        async def consume(subscription: Subscription) -> None:
            async for batch in subscription.deliveries():
                for delivered in batch:
                    seen.append(delivered.record)
                    subscription.ack([delivered.delivery_id])
                subscription.grant(len(batch))
                if done.is_set() and acknowledged <= {int(record.value) for record in seen}:
                    return

        killed = asyncio.Event()
        async with subscribed(bus) as (subscription, _):
            consumer = asyncio.create_task(consume(subscription))
            publisher = asyncio.create_task(publish())
            await killed.wait()
            await asyncio.to_thread(kafka_broker.kill9)
            await asyncio.to_thread(kafka_broker.start)
            await asyncio.wait_for(publisher, 60)
            await asyncio.wait_for(consumer, 60)
        stored = await read_all(bus)
        assert len(stored) == len({int(record.value) for record in stored}) == 3000, "idempotent producer: none twice"
        assert_order_per_key(stored)
        # A consumer may see the records before its last commit again, in order: each key's first sight is in order.
        first: dict[int, StoredRecord] = {}
        for record in seen:
            first.setdefault(int(record.value), record)
        assert set(first) == acknowledged == set(range(3000))
        assert_order_per_key(list(first.values()))
    finally:
        await bus.stop()


@pytest.mark.kafka
async def test_a_consumer_that_cannot_go_on_says_so(kafka_broker: KafkaBroker) -> None:
    bus = KafkaBus([kafka_broker.bootstrap], prefix=f"t{uuid.uuid4().hex[:8]}-")
    await bus.start()
    await bus.create_topics([TOPIC])
    reader = await bus.open_reader({TopicPartition(TOPIC.name, 0): 0})
    waiting = asyncio.create_task(reader.poll(1))
    reader._tell(reader._fail, "Kafka: made up")
    with pytest.raises(EsperError, match="made up") as caught:
        await asyncio.wait_for(waiting, 10)
    assert caught.value.reason is Reason.BUS_UNAVAILABLE
    await reader.close()
    bus._consumer_options["bootstrap_servers"] = ["127.0.0.1:1"]
    bus._consumer_options["bootstrap_timeout_ms"] = 300
    with pytest.raises(EsperError) as caught:
        await bus.join_group("g", [TOPIC.name])
    assert caught.value.reason is Reason.BUS_UNAVAILABLE
    await bus.stop()


@pytest.mark.kafka
async def test_a_topic_that_the_broker_refuses_is_an_error(kafka_broker: KafkaBroker) -> None:
    bus = KafkaBus([kafka_broker.bootstrap], prefix=f"t{uuid.uuid4().hex[:8]}-", replication_factor=1)
    await bus.start()
    bus._replication_factor = 3  # of one broker
    with pytest.raises(EsperError, match="cannot be made") as caught:
        await bus.create_topics([TOPIC])
    assert caught.value.reason is Reason.BUS_UNAVAILABLE
    await bus.stop()


async def test_a_kafka_that_is_not_there_is_named(unused_tcp_port: int) -> None:
    bus = KafkaBus([f"127.0.0.1:{unused_tcp_port}"])
    bus._options["bootstrap_timeout_ms"] = 300
    with pytest.raises(EsperError) as caught:
        await bus.start()
    assert caught.value.reason is Reason.BUS_UNAVAILABLE
    await bus.stop()

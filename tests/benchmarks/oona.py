"""How fast Oona is: ``python -m tests.benchmarks.oona --out FILE [--seconds S] [--kafka]``.

Starts the real service as a process and publishes through the generated client, one client process, one server
process, durable acknowledgements, events of about 200 bytes:

- ``publish``: unary calls of 100 events at a steady 12,000 events/s;
- ``publish_stream``: one stream, batches of 50 events at a steady 12,000 events/s;
- ``saturated``: the same stream with eight batches under way all the time, for the highest rate;
- ``end_to_end``: 100 events/s, one by one, from the call of Publish to the delivery at a subscriber.

Latency of the first three is from the moment a batch is due (or, saturated, sent) to its acknowledgement. The limits
are those of the platform's design: above 10,000 messages/s at a median below 10 ms. Kafka: a real broker, started for
the run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio

import services  # noqa: F401 - puts the generated contracts on sys.path
from esper.events.v1 import events_pb2
from esper.oona.v1 import event_service_pb2 as pb
from esper.oona.v1.event_pb2 import Event
from esper.oona.v1.event_service_pb2_grpc import EventServiceStub
from services.chassis.files import write_atomically
from services.chassis.ids import new_id
from tests.infrastructure.kafka import KafkaBroker

if TYPE_CHECKING:
    from esper.oona.v1.event_service_pb2_grpc import EventServiceAsyncStub

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"messages_per_second_min": 10_000, "p50_ms_max": 10.0}
RATE = 12_000
TOPIC = "topics/system.events.epoch"


def make_events(count: int) -> list[Event]:
    """Events of one run each, of distinct ids."""
    made = []
    for number in range(count):
        event = Event(
            event_id=new_id(),
            type="esper.events.v1.EpochCompleted",
            source="runs/benchmark",
            topic=TOPIC,
            key=f"runs/{number % 16}",
            schema_version=1,
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        event.event_time.GetCurrentTime()
        event.payload.Pack(events_pb2.EpochCompleted(run=f"runs/{number % 16}"))
        made.append(event)
    return made


def summary(latencies: Sequence[float], messages: int, seconds: float) -> dict[str, Any]:
    """Rate and latency percentiles, milliseconds."""
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "messages": messages,
        "seconds": round(seconds, 3),
        "messages_per_second": round(messages / seconds),
        "p50_ms": round(1e3 * cuts[49], 3),
        "p99_ms": round(1e3 * cuts[98], 3),
    }


async def pace(begin: float, number: int, per_second: float) -> float:
    """Waits for the turn of a batch; returns when that was, so that a late start counts as latency."""
    due = begin + number / per_second
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    return due


async def publish(stub: EventServiceAsyncStub, seconds: float, *, batch: int = 100, rate: int = RATE) -> dict[str, Any]:
    """Unary calls at a steady rate."""
    latencies: list[float] = []
    calls = int(seconds * rate / batch)
    requests = [pb.PublishRequest(events=make_events(batch)) for _ in range(calls)]
    begin = time.perf_counter()

    async def one(number: int) -> None:
        due = await pace(begin, number, rate / batch)
        await stub.Publish(requests[number], timeout=10.0)
        latencies.append(time.perf_counter() - due)

    await asyncio.gather(*(one(number) for number in range(calls)))
    return {"batch": batch, "rate": rate, **summary(latencies, batch * calls, time.perf_counter() - begin)}


async def publish_stream(
    stub: EventServiceAsyncStub, seconds: float, *, batch: int = 50, rate: int | None = RATE, under_way: int = 8
) -> dict[str, Any]:
    """One stream, at a steady rate or as fast as it goes."""
    call = stub.PublishStream()
    latencies: list[float] = []
    sent: dict[int, float] = {}
    room = asyncio.Semaphore(under_way)
    batches = int(seconds * (rate or 4 * RATE) / batch)
    requests = [pb.PublishStreamRequest(sequence=n, events=make_events(batch)) for n in range(batches)]
    begin = time.perf_counter()

    async def write() -> None:
        for number, request in enumerate(requests):
            if rate is None:
                await room.acquire()
                sent[number] = time.perf_counter()
                if sent[number] > begin + seconds:
                    break
            else:
                sent[number] = await pace(begin, number, rate / batch)
            await call.write(request)
        await call.done_writing()

    writer = asyncio.create_task(write())
    async for answer in call:
        latencies.append(time.perf_counter() - sent.pop(answer.sequence))
        room.release()
    await writer
    return {"batch": batch, "rate": rate, **summary(latencies, batch * len(latencies), time.perf_counter() - begin)}


async def end_to_end(stub: EventServiceAsyncStub, seconds: float, *, rate: int = 100) -> dict[str, Any]:
    """From Publish to the subscriber, at a steady rate."""
    call = stub.Subscribe()
    start = pb.SubscribeStart(
        consumer_group=f"benchmark-{new_id()}", topics=[TOPIC], credit=10_000, start_from=pb.START_FROM_LATEST
    )
    await call.write(pb.SubscribeRequest(start=start))
    stream = aiter(call)
    await anext(stream)
    sent: dict[str, float] = {}
    latencies: list[float] = []
    count = int(rate * seconds)
    begin = time.perf_counter()

    async def one(event: Event) -> None:
        sent[event.event_id] = time.perf_counter()
        await stub.Publish(pb.PublishRequest(events=[event]), timeout=10.0)

    async def produce() -> None:
        async with asyncio.TaskGroup() as calls:
            for number, event in enumerate(make_events(count)):
                await asyncio.sleep(max(0.0, begin + number / rate - time.perf_counter()))
                calls.create_task(one(event))

    producer = asyncio.create_task(produce())
    while len(latencies) < count:
        response = await asyncio.wait_for(anext(stream), 20)
        arrived = time.perf_counter()
        deliveries = response.deliveries.deliveries
        latencies += [arrived - sent[d.stored_event.event.event_id] for d in deliveries]
        ack = pb.SubscribeAck(delivery_ids=[d.delivery_id for d in deliveries])
        await call.write(pb.SubscribeRequest(ack=ack))
        credit = pb.SubscribeCredit(deliveries=len(deliveries))
        await call.write(pb.SubscribeRequest(credit=credit))
    seconds_taken = time.perf_counter() - begin
    await producer
    call.cancel()
    return {"rate": rate, **summary(latencies, count, seconds_taken)}


@contextlib.asynccontextmanager
async def serving(folder: Path, overrides: dict[str, str]) -> AsyncIterator[EventServiceAsyncStub]:
    """The service as a process."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.oona", "--run-dir", str(folder)),
        cwd=ROOT,
        env={**os.environ, **overrides},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert child.stdout is not None
        line = await asyncio.wait_for(child.stdout.readline(), 60)
        async with grpc.aio.insecure_channel(json.loads(line)["address"]) as channel:
            yield EventServiceStub(channel)
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        await child.wait()


async def measure(seconds: float, overrides: dict[str, str]) -> dict[str, Any]:
    """All measurements on one backend, after a warm-up."""
    with tempfile.TemporaryDirectory(prefix="esper-oona-") as folder:
        async with serving(Path(folder), overrides) as stub:
            await publish(stub, min(2.0, seconds))
            found = {
                "publish": await publish(stub, seconds),
                "publish_stream": await publish_stream(stub, seconds),
                "saturated": await publish_stream(stub, seconds, rate=None),
                "end_to_end": await end_to_end(stub, seconds),
            }
    for name in ("publish", "publish_stream"):
        result = found[name]
        result["within_limits"] = (
            result["messages_per_second"] > LIMITS["messages_per_second_min"]
            and result["p50_ms"] < LIMITS["p50_ms_max"]
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    parser.add_argument("--kafka", action="store_true", help="measure a real Kafka broker too (Java and Maven)")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {
        "limits": LIMITS,
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "embedded": asyncio.run(measure(arguments.seconds, {})),
    }
    if arguments.kafka:
        with tempfile.TemporaryDirectory(prefix="esper-kafka-") as folder:
            broker = KafkaBroker(Path(folder))
            broker.start()
            try:
                overrides = {
                    "ESPER__SERVICES__OONA__BACKEND": "kafka",
                    "ESPER__SERVICES__OONA__KAFKA__BOOTSTRAP_SERVERS": json.dumps([broker.bootstrap]),
                }
                result["kafka"] = asyncio.run(measure(arguments.seconds, overrides))
            finally:
                broker.stop()
    write_atomically(arguments.out, json.dumps(result, indent=2) + "\n")
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Oona over real sockets: every rpc, the chassis's publisher and subscriber, drain and kill -9 of the real process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from esper.events.v1 import events_pb2
from esper.oona.v1 import event_service_pb2 as pb
from esper.oona.v1.event_pb2 import Event
from esper.oona.v1.event_service_pb2_grpc import EventServiceStub
from esper.oona.v1.topic_pb2 import Topic
from services.chassis import telemetry
from services.chassis.channel import Channel, ChannelFactory
from services.chassis.config.loader import load_config
from services.chassis.config.schema import EsperConfig, TelemetryConfig
from services.chassis.errors import EsperError, Reason, from_rpc_error
from services.chassis.events import EventPublisher, EventSubscriber, ReceivedEvent
from services.chassis.ids import new_id
from services.chassis.server import ServiceServer
from services.chassis.service_main import ServiceContext
from services.chassis.telemetry import Telemetry, read_traces
from services.oona.bus import Bus, Record
from services.oona.component import build
from services.oona.embedded.bus import EmbeddedBus
from services.oona.exchange import EventExchange
from tests.infrastructure.kafka import KafkaBroker

if TYPE_CHECKING:
    from esper.oona.v1.event_service_pb2_grpc import EventServiceAsyncStub

ROOT = Path(__file__).resolve().parents[2]
EPOCH = "system.events.epoch"
HEALTH = "telemetry.seed.health"

pytestmark = [pytest.mark.fast, pytest.mark.timeout(60)]


def event(number: int, *, topic: str = EPOCH, key: str = "run", payload: Message | None = None, **fields: str) -> Event:
    payload = payload or events_pb2.EpochCompleted(run="runs/r")
    made = Event(
        event_id=f"e{number}",
        type=payload.DESCRIPTOR.full_name,
        source="test",
        topic=f"topics/{topic}",
        key=key,
        schema_version=1,
    )
    made.event_time.GetCurrentTime()
    made.payload.Pack(payload)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@dataclass
class Oona:
    """A server in this process, with real sockets."""

    server: ServiceServer
    channel: Channel
    telemetry: Telemetry
    stub: EventServiceAsyncStub
    bus: Bus
    traces: Path


def config(*overrides: str) -> EsperConfig:
    return load_config(None, profile=None, overrides=list(overrides), environ={}).config


@contextlib.asynccontextmanager
async def serving(folder: Path, *overrides: str, port: int = 0) -> AsyncIterator[Oona]:
    settings = config("services.drain_seconds=1.0", *overrides)
    tracer = telemetry.setup("oona", TelemetryConfig(), folder / "run", "r1")
    server = ServiceServer(settings.services, tracer, port=port)
    channels = ChannelFactory(settings.services, tracer)
    (folder / "state").mkdir(exist_ok=True)
    context = ServiceContext("oona", settings, None, folder / "state", folder / "keys", server, channels, tracer)
    component = await build(context)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(tracer.shutdown)
        stack.push_async_callback(component.stop)
        await component.start()
        address = await server.start()
        server.ready()
        stack.push_async_callback(server.stop)
        client = ChannelFactory(
            config("services.rpc_timeout_seconds=10.0", f"services.oona.address={address}").services, tracer
        )
        stack.push_async_callback(client.close)
        channel = client.channel("oona")
        yield Oona(
            server,
            channel,
            tracer,
            EventServiceStub(channel),
            component._exchange._bus,
            folder / "run/traces",
        )


@pytest.fixture
async def oona(tmp_path: Path) -> AsyncIterator[Oona]:
    async with serving(tmp_path, "services.oona.max_delivery_attempts=2") as served:
        yield served


@contextlib.asynccontextmanager
async def refused(reason: Reason, field: str | None = None) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    error = from_rpc_error(caught.value)
    assert error.reason is reason, error
    if field is not None:
        assert field in [violation.field for violation in error.violations] or field in str(error), error


async def tail(oona: Oona, *topics: str, last: int = 1000) -> list[Event]:
    request = pb.TailRequest(topics=[f"topics/{topic}" for topic in topics], last=last, no_follow=True)
    return [response.stored_event.event async for response in oona.stub.Tail(request)]


async def test_publish_acknowledges_each_event_and_stores_an_id_once(oona: Oona) -> None:
    events = [event(n) for n in range(3)]
    first = await oona.stub.Publish(pb.PublishRequest(events=events))
    assert [(p.event_id, p.position.topic, p.position.offset, p.duplicate) for p in first.published] == [
        (f"e{n}", f"topics/{EPOCH}", n, False) for n in range(3)
    ]
    again = await oona.stub.Publish(pb.PublishRequest(events=[events[2], event(7), event(7)]))
    assert [(p.event_id, p.position.offset, p.duplicate) for p in again.published] == [
        ("e2", 2, True),
        ("e7", 3, False),
        ("e7", 3, True),
    ]
    assert [stored.event_id for stored in await tail(oona, EPOCH)] == ["e0", "e1", "e2", "e7"]


async def test_the_window_of_ids_survives_a_restart(tmp_path: Path) -> None:
    for duplicate in (False, True):
        async with serving(tmp_path) as served:
            answer = await served.stub.Publish(pb.PublishRequest(events=[event(1)]))
            assert answer.published[0].duplicate is duplicate
            assert answer.published[0].position.offset == 0


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"event_id": ""}, Reason.INVALID_FIELD, "events[1].event_id"),
        ({"event_id": "x" * 129}, Reason.INVALID_FIELD, "events[1].event_id"),
        ({"source": ""}, Reason.INVALID_FIELD, "events[1].source"),
        ({"key": "ü" * 200}, Reason.INVALID_FIELD, "events[1].key"),
        ({"schema_version": -1}, Reason.INVALID_FIELD, "events[1].schema_version"),
        ({"traceparent": "0" * 65}, Reason.INVALID_FIELD, "events[1].traceparent"),
        ({"type": "esper.events.v1.RolledBack"}, Reason.INVALID_FIELD, "events[1].type"),
        ({"topic": EPOCH}, Reason.TOPIC_NOT_FOUND, "events[1].topic"),
        ({"topic": "topics/nowhere"}, Reason.TOPIC_NOT_FOUND, "events[1].topic"),
        ({"topic": f"topics/{EPOCH}.dlq"}, Reason.TOPIC_NOT_FOUND, "events[1].topic"),
        ({"topic": f"topics/{HEALTH}"}, Reason.PAYLOAD_TYPE_NOT_ALLOWED, "events[1].type"),
    ],
)
async def test_a_bad_event_refuses_its_batch(oona: Oona, change: dict[str, object], reason: Reason, field: str) -> None:
    bad = event(2)
    for name, value in change.items():
        setattr(bad, name, value)
    async with refused(reason, field):
        await oona.stub.Publish(pb.PublishRequest(events=[event(1), bad]))
    assert await tail(oona) == []


async def test_time_size_and_number_are_checked(oona: Oona) -> None:
    timeless = event(1)
    timeless.ClearField("event_time")
    big = event(2)
    big.payload.value = b"x" * (2**20 + 1)
    for request, field in (
        ([timeless], "events[0].event_time"),
        ([big], "events[0].payload"),
        ([], "events"),
        ([event(n) for n in range(1001)], "events"),
    ):
        async with refused(Reason.INVALID_FIELD, field):
            await oona.stub.Publish(pb.PublishRequest(events=request))


async def test_publish_stream_acknowledges_in_order_and_reports_bad_events(oona: Oona) -> None:
    call = oona.stub.PublishStream()
    for sequence in range(100):
        events = [event(10 * sequence), event(10 * sequence + 1)]
        if sequence == 7:
            events[0].type = "nonsense"
        await call.write(pb.PublishStreamRequest(sequence=sequence, events=events))
    await call.done_writing()
    answers = [answer async for answer in call]
    assert [answer.sequence for answer in answers] == list(range(100))
    assert [(r.event_id, r.reason) for answer in answers for r in answer.rejected] == [("e70", "INVALID_FIELD")]
    assert sum(len(answer.published) for answer in answers) == 199
    assert len(await tail(oona, EPOCH)) == 199


async def test_publish_stream_ends_with_what_is_wrong(oona: Oona) -> None:
    call = oona.stub.PublishStream()
    await call.write(pb.PublishStreamRequest(sequence=1))
    async with refused(Reason.INVALID_FIELD, "events"):
        async for _ in call:
            pass


async def test_publish_stream_acknowledges_what_it_has_read_when_draining(oona: Oona) -> None:
    call = oona.stub.PublishStream()
    await call.write(pb.PublishStreamRequest(sequence=1, events=[event(1)]))
    assert (await anext(aiter(call))).sequence == 1
    stopping = asyncio.ensure_future(oona.server.stop())
    async with refused(Reason.DRAINING):
        async for _ in call:
            pass
    await stopping


async def test_topics_are_made_got_and_listed(oona: Oona) -> None:
    request = pb.CreateTopicRequest(
        topic_id="my.topic", topic=Topic(payload_types=["a.B", "a.A", "a.B"], partitions=2), request_id="r1"
    )
    made = (await oona.stub.CreateTopic(request)).topic
    assert made.name == "topics/my.topic"
    assert list(made.payload_types) == ["a.A", "a.B"]
    assert made.partitions == 2
    assert made.retention_bytes == 256 * 2**20
    assert made.dead_letter_topic == "topics/my.topic.dlq"
    assert made.create_time.seconds > 1_600_000_000
    request.request_id = "r2"
    assert (await oona.stub.CreateTopic(request)).topic == made
    assert (await oona.stub.GetTopic(pb.GetTopicRequest(name=made.name))).topic == made
    twin = (await oona.stub.GetTopic(pb.GetTopicRequest(name=made.dead_letter_topic))).topic
    assert twin.dead_letter_topic == ""
    request.request_id, request.topic.partitions = "r3", 3
    async with refused(Reason.TOPIC_EXISTS):
        await oona.stub.CreateTopic(request)

    names: list[str] = []
    token = ""
    while True:
        page = await oona.stub.ListTopics(pb.ListTopicsRequest(page_size=4, page_token=token))
        names += [topic.name for topic in page.topics]
        token = page.next_page_token
        if not token:
            break
    assert len(names) == 10
    assert names == sorted(names)
    every = await oona.stub.ListTopics(pb.ListTopicsRequest(include_dead_letter_topics=True))
    assert len(every.topics) == 20
    first = await oona.stub.ListTopics(pb.ListTopicsRequest(page_size=4))
    async with refused(Reason.INVALID_PAGE_TOKEN):
        await oona.stub.ListTopics(
            pb.ListTopicsRequest(page_token=first.next_page_token, include_dead_letter_topics=True)
        )


async def test_a_made_topic_takes_its_types_only(oona: Oona) -> None:
    await oona.stub.CreateTopic(
        pb.CreateTopicRequest(topic_id="mine", topic=Topic(payload_types=["google.protobuf.Duration"]), request_id="a")
    )
    await oona.stub.Publish(pb.PublishRequest(events=[event(1, topic="mine", payload=Duration(seconds=3))]))
    (stored,) = await tail(oona, "mine")
    duration = Duration()
    assert stored.payload.Unpack(duration)
    assert duration.seconds == 3
    async with refused(Reason.PAYLOAD_TYPE_NOT_ALLOWED):
        await oona.stub.Publish(pb.PublishRequest(events=[event(2, topic="mine")]))


@pytest.mark.parametrize(
    ("topic_id", "topic", "field"),
    [
        ("Upper", Topic(payload_types=["a.B"]), "topic_id"),
        ("a.dlq", Topic(payload_types=["a.B"]), "topic_id"),
        ("oona.topics", Topic(payload_types=["a.B"]), "topic_id"),
        ("fine", Topic(), "topic.payload_types"),
        ("fine", Topic(payload_types=["a.B", "a..B"]), "topic.payload_types[1]"),
        ("fine", Topic(payload_types=["a.B"], partitions=65), "topic.partitions"),
        ("fine", Topic(payload_types=["a.B"], retention_bytes=5), "topic.retention_bytes"),
    ],
)
async def test_a_bad_topic_is_refused(oona: Oona, topic_id: str, topic: Topic, field: str) -> None:
    async with refused(Reason.INVALID_FIELD, field):
        await oona.stub.CreateTopic(pb.CreateTopicRequest(topic_id=topic_id, topic=topic, request_id="r"))


async def test_tail_shows_stored_then_new_events_until_the_server_drains(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(5)]))
    await oona.stub.Publish(pb.PublishRequest(events=[event(9, topic=HEALTH, payload=events_pb2.SeedHealthReported())]))
    assert {e.event_id for e in await tail(oona)} == {"e0", "e1", "e2", "e3", "e4", "e9"}
    call = oona.stub.Tail(pb.TailRequest(topics=[f"topics/{EPOCH}"], last=2))
    stream = aiter(call)
    assert [(await anext(stream)).stored_event.event.event_id for _ in range(2)] == ["e3", "e4"]
    await oona.stub.Publish(pb.PublishRequest(events=[event(5)]))
    fresh = (await anext(stream)).stored_event
    assert fresh.event.event_id == "e5"
    assert fresh.append_time.seconds >= fresh.event.event_time.seconds
    stopping = asyncio.ensure_future(oona.server.stop())
    assert [response async for response in stream] == []
    await stopping


async def test_tail_and_names_are_checked(oona: Oona) -> None:
    for request in (pb.TailRequest(last=-1), pb.TailRequest(last=100_001)):
        async with refused(Reason.INVALID_FIELD, "last"):
            [_ async for _ in oona.stub.Tail(request)]
    async with refused(Reason.INVALID_NAME, "name"):
        await oona.stub.GetTopic(pb.GetTopicRequest(name="nowhere"))
    async with refused(Reason.TOPIC_NOT_FOUND):
        await oona.stub.GetTopic(pb.GetTopicRequest(name="topics/nowhere"))
    async with refused(Reason.INVALID_FIELD, "consumer_group"):
        await oona.stub.GetLag(pb.GetLagRequest(topic=f"topics/{EPOCH}"))
    async with refused(Reason.INVALID_FIELD, "topic"):
        await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}.dlq"))
    async with refused(Reason.INVALID_FIELD, "max_letters"):
        await oona.stub.RedriveDeadLetters(
            pb.RedriveDeadLettersRequest(topic=f"topics/{EPOCH}", max_letters=-1, request_id="x")
        )


async def test_a_bus_that_is_full_says_so_and_the_same_event_may_be_tried_again(
    oona: Oona, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("services.oona.embedded.bus.MAX_WAITING_RECORDS", 0)
        async with refused(Reason.BUS_OVERLOADED):
            await oona.stub.Publish(pb.PublishRequest(events=[event(1)]))
    (published,) = (await oona.stub.Publish(pb.PublishRequest(events=[event(1)]))).published
    assert not published.duplicate


async def test_the_window_of_ids_is_bounded(tmp_path: Path) -> None:
    bus = EmbeddedBus(tmp_path)
    exchange = EventExchange(bus, partitions=1, retention_bytes=2**20, max_attempts=2, dedup_window=3)
    await exchange.start()
    for number in range(5):
        await exchange.publish([event(number)])
    again = [(await exchange.publish([event(number)]))[0].duplicate for number in (4, 3, 2, 0)]
    assert again == [True, True, True, False]
    await exchange.stop()


async def test_numbers_of_streams_and_topics_are_bounded(oona: Oona, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_SUBSCRIPTIONS", "MAX_TAILS", "MAX_TOPICS"):
        monkeypatch.setattr(f"services.oona.exchange.{limit}", 0)
    call = oona.stub.Subscribe()
    await call.write(
        pb.SubscribeRequest(start=pb.SubscribeStart(consumer_group="g", topics=[f"topics/{EPOCH}"], credit=1))
    )
    async with refused(Reason.BUS_OVERLOADED):
        async for _ in call:
            pass
    async with refused(Reason.BUS_OVERLOADED):
        await tail(oona)
    async with refused(Reason.BUS_OVERLOADED):
        await oona.stub.CreateTopic(
            pb.CreateTopicRequest(topic_id="one.more", topic=Topic(payload_types=["a.B"]), request_id="r")
        )


async def test_dead_letters_of_dead_letters_stay_where_they_are(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(1)]))
    for topic in (EPOCH, f"{EPOCH}.dlq"):
        async with Member(oona, topics=[topic]) as member:
            for _ in range(2):
                await member.nack(await member.next(), "no")
    listed = await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))
    assert len(listed.dead_letters) == 1


class Member:
    """A subscription, spoken by hand."""

    def __init__(self, oona: Oona, *, credit: int = 100, group: str = "g", topics: Sequence[str] = (EPOCH,)) -> None:
        self.call = oona.stub.Subscribe()
        self.start = pb.SubscribeStart(consumer_group=group, topics=[f"topics/{t}" for t in topics], credit=credit)
        self.waiting: list[pb.Delivery] = []

    async def __aenter__(self) -> Self:
        await self.call.write(pb.SubscribeRequest(start=self.start))
        self.stream = aiter(self.call)
        assert (await anext(self.stream)).started.credit == self.start.credit
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.call.done_writing()
        async for _response in self.stream:
            pass
        assert await self.call.code() is grpc.StatusCode.OK

    async def next(self) -> pb.Delivery:
        if not self.waiting:
            self.waiting = list((await asyncio.wait_for(anext(self.stream), 20)).deliveries.deliveries)
        return self.waiting.pop(0)

    async def ack(self, *deliveries: pb.Delivery) -> None:
        ack = pb.SubscribeAck(delivery_ids=[delivery.delivery_id for delivery in deliveries])
        await self.call.write(pb.SubscribeRequest(ack=ack))

    async def nack(self, delivery: pb.Delivery, reason: str) -> None:
        nack = pb.SubscribeNack(delivery_id=delivery.delivery_id, reason=reason, retry_delay=Duration(nanos=1000))
        await self.call.write(pb.SubscribeRequest(nack=nack))


async def lag(oona: Oona, group: str = "g", topic: str = "") -> pb.GetLagResponse:
    answer: pb.GetLagResponse = await oona.stub.GetLag(pb.GetLagRequest(consumer_group=group, topic=topic))
    return answer


async def test_poison_goes_to_the_dead_letters_and_comes_back_by_redrive(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(3)]))
    async with Member(oona) as member:
        first, second, third = [await member.next() for _ in range(3)]
        await member.ack(first, third)
        assert [d.attempt for d in (first, second, third)] == [1, 1, 1]
        await member.nack(second, "broken")
        second = await member.next()
        assert (second.stored_event.event.event_id, second.attempt) == ("e1", 2)
        await member.nack(second, "broken again")
        again = await member.next()
        assert again.stored_event.event.event_id == "e2", "it follows the failed one once more, in order"
        await member.ack(again)
    assert (await lag(oona)).total_lag == 0
    listed = await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))
    (letter,) = listed.dead_letters
    assert letter.event.event_id == "e1"
    assert (letter.reason, letter.attempts, letter.consumer_group) == ("broken again", 2, "g")
    assert letter.origin.topic == f"topics/{EPOCH}"
    assert letter.origin.offset == 1
    assert letter.position.topic == f"topics/{EPOCH}.dlq"

    redrive = pb.RedriveDeadLettersRequest(topic=f"topics/{EPOCH}", request_id="once")
    assert (await oona.stub.RedriveDeadLetters(redrive)).redriven == 1
    assert (await oona.stub.RedriveDeadLetters(redrive)).redriven == 1, "the same request, the same answer"
    assert not (await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))).dead_letters
    async with Member(oona) as member:
        back = await member.next()
        assert back.stored_event.event.event_id == "e1"
        await member.ack(back)


async def test_dead_letters_are_paged_and_redriven_oldest_first(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n, key=f"k{n}") for n in range(12)]))
    async with Member(oona) as member:
        for _ in range(24):
            await member.nack(await member.next(), "no")
        await lag(oona)
    names: set[str] = set()
    pages = 0
    token = ""
    while True:
        page = await oona.stub.ListDeadLetters(
            pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}", page_size=5, page_token=token)
        )
        names |= {letter.event.event_id for letter in page.dead_letters}
        pages += 1
        token = page.next_page_token
        if not token:
            break
    assert len(names) == 12
    assert pages == 3
    for number, expected in ((5, 5), (4, 4), (0, 3), (0, 0)):
        request = pb.RedriveDeadLettersRequest(topic=f"topics/{EPOCH}", max_letters=number, request_id=new_id())
        assert (await oona.stub.RedriveDeadLetters(request)).redriven == expected


async def test_lag_is_counted_per_partition(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(5)]))
    answer = await lag(oona, topic=f"topics/{EPOCH}")
    assert answer.total_lag == 5
    assert len(answer.partitions) == 4
    assert not any(partition.HasField("committed_offset") for partition in answer.partitions)
    assert (await lag(oona)).partitions == []
    async with Member(oona) as member:
        await member.ack(await member.next(), await member.next())
    answer = await lag(oona)
    assert answer.total_lag == 3
    (partition,) = (
        answer.partitions[:1]
        if len(answer.partitions) == 1
        else [p for p in answer.partitions if p.HasField("committed_offset")]
    )
    assert (partition.committed_offset, partition.end_offset, partition.lag) == (2, 5, 3)


def starting(**fields: object) -> pb.SubscribeRequest:
    start = pb.SubscribeStart(consumer_group="g", topics=["topics/x"])
    for name, value in fields.items():
        if name == "topics":
            start.ClearField("topics")
        else:
            setattr(start, name, value)
    return pb.SubscribeRequest(start=start)


@pytest.mark.parametrize(
    ("first", "reason", "field"),
    [
        (pb.SubscribeRequest(ack=pb.SubscribeAck()), Reason.INVALID_FIELD, "start"),
        (starting(consumer_group=""), Reason.INVALID_FIELD, "start.consumer_group"),
        (starting(consumer_group="oona.redrive"), Reason.INVALID_FIELD, "start.consumer_group"),
        (starting(topics=[]), Reason.INVALID_FIELD, "start.topics"),
        (starting(credit=-1), Reason.INVALID_FIELD, "start.credit"),
        (starting(), Reason.TOPIC_NOT_FOUND, None),
    ],
)
async def test_a_bad_start_is_refused(
    oona: Oona, first: pb.SubscribeRequest, reason: Reason, field: str | None
) -> None:
    call = oona.stub.Subscribe()
    await call.write(first)
    async with refused(reason, field):
        async for _ in call:
            pass


@pytest.mark.parametrize(
    "request_",
    [
        pb.SubscribeRequest(),
        pb.SubscribeRequest(start=pb.SubscribeStart()),
        pb.SubscribeRequest(credit=pb.SubscribeCredit(deliveries=0)),
        pb.SubscribeRequest(nack=pb.SubscribeNack(delivery_id=1, retry_delay=Duration(seconds=61))),
    ],
)
async def test_a_bad_request_ends_the_subscription(oona: Oona, request_: pb.SubscribeRequest) -> None:
    member = Member(oona)
    await member.__aenter__()
    await member.call.write(request_)
    async with refused(Reason.INVALID_FIELD):
        async for _ in member.stream:
            pass


async def test_credit_is_kept_and_granted(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(4)]))
    async with Member(oona, credit=2) as member:
        got = [await member.next(), await member.next()]
        await member.call.write(pb.SubscribeRequest(credit=pb.SubscribeCredit(deliveries=1)))
        got.append(await member.next())
        assert [d.stored_event.event.event_id for d in got] == ["e0", "e1", "e2"]


async def test_a_subscription_without_a_word_is_refused(oona: Oona) -> None:
    call = oona.stub.Subscribe()
    await call.done_writing()
    async with refused(Reason.INVALID_FIELD, "start"):
        async for _ in call:
            pass


async def test_subscriptions_end_when_the_server_drains(oona: Oona) -> None:
    member = Member(oona)
    await member.__aenter__()
    loop = asyncio.get_running_loop()
    begin = loop.time()
    stopping = asyncio.ensure_future(oona.server.stop())
    async with refused(Reason.DRAINING):
        async for _ in member.stream:
            pass
    await stopping
    assert loop.time() - begin < 30


async def test_a_consumer_that_dies_at_an_event_counts_as_a_failure(oona: Oona) -> None:
    await oona.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(2)]))
    for attempt in (1, 2):
        member = Member(oona)
        await member.__aenter__()
        delivery = await member.next()
        assert (delivery.stored_event.event.event_id, delivery.attempt) == ("e0", attempt)
        member.call.cancel()
    async with Member(oona) as member:
        assert (await member.next()).stored_event.event.event_id == "e1"
    listed = await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))
    assert "vanished" in listed.dead_letters[0].reason


async def test_a_record_that_is_no_event_goes_to_the_dead_letters(oona: Oona) -> None:
    await oona.bus.publish([Record(EPOCH, b"run", b"\xff\xff")])  # a stranger writes to the broker
    await oona.stub.Publish(pb.PublishRequest(events=[event(1)]))
    assert [e.event_id for e in await tail(oona, EPOCH)] == ["e1"]
    async with Member(oona, credit=2) as member:
        assert (await member.next()).stored_event.event.event_id == "e1"
    (letter,) = (await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))).dead_letters
    assert letter.reason == "the record is not an event"
    assert not letter.HasField("event")


# ---- the chassis's publisher and subscriber ----


async def collect(subscriber: EventSubscriber, count: int) -> list[ReceivedEvent]:
    found: list[ReceivedEvent] = []
    async with asyncio.timeout(40):
        async for received in subscriber:
            with received.handling():
                found.append(received)
            if len(found) == count:
                subscriber.stop()
    return found


async def test_typed_events_go_from_publisher_to_subscriber_in_one_trace(oona: Oona) -> None:
    publisher = EventPublisher(oona.channel, "runs/r", oona.telemetry, 100)
    assert publisher.publish(EPOCH, "run", events_pb2.EpochCompleted(run="runs/r")), "before start it waits"
    await publisher.start()
    with oona.telemetry.span("epoch"):
        assert publisher.publish(EPOCH, "run", events_pb2.RunStateChanged(run="runs/r"))
    assert await publisher.flush(10)
    assert publisher.counts.published == 2
    first, second = await collect(EventSubscriber(oona.channel, "g", [EPOCH], oona.telemetry), 2)
    assert isinstance(first.payload, events_pb2.EpochCompleted)
    assert isinstance(second.payload, events_pb2.RunStateChanged)
    assert second.topic == EPOCH
    assert second.event.source == "runs/r"
    assert (await lag(oona)).total_lag == 0
    await publisher.stop()
    assert not publisher.publish(EPOCH, "run", events_pb2.EpochCompleted())
    assert publisher.counts.dropped == 1
    oona.telemetry.flush()
    spans = read_traces(oona.traces)
    by_id = {span["spanId"]: span for span in spans}
    processed = [span for span in spans if span["name"] == f"process {EPOCH}"]
    assert len(processed) == 2
    parents = [by_id[span["parentSpanId"]] for span in processed]
    assert {parent["name"] for parent in parents} == {f"publish {EPOCH}"}
    assert "epoch" in {by_id[p["parentSpanId"]]["name"] for p in parents if p.get("parentSpanId") in by_id}


async def test_a_failing_handler_refuses_and_goes_on(oona: Oona) -> None:
    publisher = EventPublisher(oona.channel, "s", oona.telemetry, 100)
    await publisher.start()
    for run in ("bad", "good"):
        publisher.publish(EPOCH, run, events_pb2.EpochCompleted(run=run))
    await publisher.stop()
    attempts = []
    subscriber = EventSubscriber(oona.channel, "g", [EPOCH], oona.telemetry)
    async with asyncio.timeout(40):
        async for received in subscriber:
            with received.handling():
                assert isinstance(received.payload, events_pb2.EpochCompleted)
                if received.payload.run == "bad":
                    attempts.append(received.attempt)
                    if len(attempts) == 2:
                        subscriber.stop()
                    raise ValueError("cannot")
    assert attempts == [1, 2]
    async with asyncio.timeout(20):
        while not (
            letters := (
                await oona.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=f"topics/{EPOCH}"))
            ).dead_letters
        ):
            await asyncio.sleep(0.02)
    assert letters[0].reason == "ValueError: cannot"


async def test_an_event_that_oona_refuses_does_not_hold_up_the_others(oona: Oona) -> None:
    publisher = EventPublisher(oona.channel, "s", oona.telemetry, 100)
    for payload in (events_pb2.EpochCompleted(), events_pb2.RolledBack(), events_pb2.EpochCompleted()):
        publisher.publish(EPOCH, "k", payload)
    await publisher.start()
    assert await publisher.flush(10)
    assert (publisher.counts.published, publisher.counts.rejected) == (2, 1)
    await publisher.stop()


async def test_the_queue_is_bounded_and_drops_are_counted(oona: Oona) -> None:
    publisher = EventPublisher(oona.channel, "s", oona.telemetry, 3)
    assert [publisher.publish(EPOCH, "k", events_pb2.EpochCompleted()) for _ in range(5)] == [True] * 3 + [False] * 2
    assert publisher.counts.dropped == 2
    assert publisher.counts.waiting == 3
    await publisher.stop()
    assert publisher.counts.dropped == 5, "never started: what waited is lost, and counted"


async def test_publishing_from_another_thread(oona: Oona) -> None:
    publisher = EventPublisher(oona.channel, "s", oona.telemetry, 1000)
    await publisher.start()

    def train() -> None:
        for _ in range(300):
            assert publisher.publish(EPOCH, "k", events_pb2.EpochCompleted())

    await asyncio.to_thread(train)
    assert await publisher.flush(20)
    assert publisher.counts.published == 300
    await publisher.stop()


async def test_a_subscription_that_can_never_stand_is_an_error(oona: Oona) -> None:
    with pytest.raises(EsperError) as caught:
        await collect(EventSubscriber(oona.channel, "g", ["nowhere"], oona.telemetry), 1)
    assert caught.value.reason is Reason.TOPIC_NOT_FOUND


async def test_an_unknown_payload_is_refused_without_being_shown(oona: Oona) -> None:
    types = ["no.Such", "esper.events.v1.EpochCompleted"]
    topic = Topic(payload_types=types)
    await oona.stub.CreateTopic(pb.CreateTopicRequest(topic_id="odd", topic=topic, request_id="a"))
    odd = event(1, topic="odd")
    odd.type = "no.Such"
    odd.payload.type_url = "type.googleapis.com/no.Such"
    await oona.stub.Publish(pb.PublishRequest(events=[odd, event(2, topic="odd")]))
    (received,) = await collect(EventSubscriber(oona.channel, "g", ["odd"], oona.telemetry), 1)
    assert received.event.event_id == "e2"


@pytest.mark.kafka
async def test_the_same_service_runs_on_kafka(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    async with serving(
        tmp_path,
        "services.oona.backend=kafka",
        f"services.oona.kafka.bootstrap_servers=[{kafka_broker.bootstrap}]",
        f"services.oona.kafka.topic_prefix={new_id('t')}-",
        "services.oona.max_delivery_attempts=2",
    ) as served:
        await served.stub.Publish(pb.PublishRequest(events=[event(n) for n in range(3)]))
        assert [e.event_id for e in await tail(served, EPOCH)] == ["e0", "e1", "e2"]
        async with Member(served) as member:
            first, second, third = [await member.next() for _ in range(3)]
            await member.ack(first, third)
            await member.nack(second, "no")
            await member.nack(await member.next(), "still no")
            await member.ack(await member.next())
        topic = f"topics/{EPOCH}"
        (letter,) = (await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=topic))).dead_letters
        assert (letter.event.event_id, letter.reason, letter.attempts) == ("e1", "still no", 2)
        redrive = pb.RedriveDeadLettersRequest(topic=topic, request_id="r")
        assert (await served.stub.RedriveDeadLetters(redrive)).redriven == 1
        assert not (await served.stub.ListDeadLetters(pb.ListDeadLettersRequest(topic=topic))).dead_letters
        assert (await lag(served)).total_lag == 1
        call = served.stub.Tail(pb.TailRequest(topics=[topic]))
        stream = aiter(call)
        upcoming = asyncio.ensure_future(anext(stream))
        async with asyncio.timeout(20):
            number = 10
            while not upcoming.done():
                await served.stub.Publish(pb.PublishRequest(events=[event(number)]))
                number += 1
                await asyncio.wait({upcoming}, timeout=0.1)
        assert upcoming.result().stored_event.event.event_id.startswith("e1")
        call.cancel()


# ---- the process ----


class Process:
    """``python -m services.oona`` on a state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self.child: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        address_file = self.folder / "address"
        address_file.unlink(missing_ok=True)
        self.child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.oona",
            "--run-dir",
            str(self.folder),
            "--address-file",
            str(address_file),
            "--port",
            str(self.port),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.child.stdout is not None
        line = await asyncio.wait_for(self.child.stdout.readline(), 30)
        assert b"address" in line, line
        address = address_file.read_text(encoding="utf-8").strip()
        self.port = int(address.rpartition(":")[2])
        return address

    async def end(self, number: signal.Signals) -> int:
        assert self.child is not None
        if self.child.returncode is None:
            self.child.send_signal(number)
        return await asyncio.wait_for(self.child.wait(), 20)


async def test_kill_9_loses_nothing_acknowledged_and_clients_come_back(tmp_path: Path) -> None:
    process = Process(tmp_path)
    address = await process.start()
    tracer = telemetry.setup("test", TelemetryConfig(traces="off"), None, None)
    channels = ChannelFactory(config(f"services.oona.address={address}").services, tracer)
    publisher = EventPublisher(channels.channel("oona"), "s", tracer, 10_000)
    subscriber = EventSubscriber(channels.channel("oona"), "g", [HEALTH], tracer)
    seen: list[int] = []
    total = 600

    async def consume() -> None:
        async for received in subscriber:
            with received.handling():
                assert isinstance(received.payload, events_pb2.SeedHealthReported)
                seen.append(received.payload.epoch)
            if len(set(seen)) == total:
                subscriber.stop()

    try:
        await publisher.start()
        consumer = asyncio.create_task(consume())
        for number in range(total):
            publisher.publish(HEALTH, "one", events_pb2.SeedHealthReported(epoch=number))
            await asyncio.sleep(0.001)
            if number in {200, 400}:
                await process.end(signal.SIGKILL)
                await process.start()
        assert await publisher.flush(30)
        await asyncio.wait_for(consumer, 30)
        assert publisher.counts.published == total
        assert publisher.counts.dropped == publisher.counts.rejected == 0
        assert subscriber.reconnects >= 1
        first_sights = list(dict.fromkeys(seen))
        assert first_sights == list(range(total)), "in order, none lost"
        await publisher.stop()
        await channels.close()
        assert await process.end(signal.SIGTERM) == 0
    finally:
        await process.end(signal.SIGKILL)
        tracer.shutdown()

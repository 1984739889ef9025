"""Translates between the contract ``esper.oona.v1.EventService`` and the core."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from esper.oona.v1 import event_pb2, event_service_pb2, event_service_pb2_grpc, topic_pb2
from services.chassis.errors import FieldViolation
from services.chassis.idempotency import RequestCache
from services.chassis.pagination import decode_token, encode_token, page_size_of
from services.oona.bus import Position, StoredRecord
from services.oona.errors import draining, invalid_fields
from services.oona.exchange import DeadLetterRecord, EventExchange, Published, Rejected, to_event
from services.oona.subscription import MAX_RETRY_DELAY, Delivered, Subscription
from services.oona.topics import TopicSpec

SERVICE_NAME: Final = "esper.oona.v1.EventService"

#: Batches of one PublishStream that are on their way to the disk; reading stops there.
MAX_STREAM_BATCHES: Final = 64

_Context = grpc.aio.ServicerContext[Any, Any]


class EventServicer(event_service_pb2_grpc.EventServiceServicer):
    """See ``proto/esper/oona/v1/event_service.proto``.

    Args:
        stopping: set when the server drains; streams then end by themselves.
    """

    def __init__(self, exchange: EventExchange, stopping: asyncio.Event) -> None:
        self._exchange = exchange
        self._stopping = stopping
        self._requests = RequestCache()

    async def Publish(  # name of the contract
        self, request: event_service_pb2.PublishRequest, context: _Context
    ) -> event_service_pb2.PublishResponse:
        """Publishes a batch."""
        published = await self._exchange.publish(request.events)
        return event_service_pb2.PublishResponse(published=map(_published, published))

    async def PublishStream(  # name of the contract
        self, request_iterator: AsyncIterator[event_service_pb2.PublishStreamRequest], context: _Context
    ) -> AsyncIterator[event_service_pb2.PublishStreamResponse]:
        """Publishes batches, many on their way at once, acknowledged in order."""
        under_way: deque[tuple[int, asyncio.Task[tuple[list[Published], list[Rejected]]]]] = deque()
        changed = asyncio.Event()
        room = asyncio.Event()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    task = asyncio.create_task(self._exchange.publish_valid(list(request.events)))
                    task.add_done_callback(lambda _: changed.set())
                    under_way.append((request.sequence, task))
                    while len(under_way) >= MAX_STREAM_BATCHES:
                        room.clear()
                        await room.wait()
            finally:
                changed.set()

        reader = asyncio.create_task(read())
        stop = asyncio.create_task(self._stopping.wait())
        stop.add_done_callback(lambda _: reader.cancel())
        try:
            while under_way or not (reader.done() or self._stopping.is_set()):
                changed.clear()
                while under_way and under_way[0][1].done():
                    sequence, task = under_way.popleft()
                    room.set()
                    published, rejected = task.result()
                    yield event_service_pb2.PublishStreamResponse(
                        sequence=sequence, published=map(_published, published), rejected=map(_rejected, rejected)
                    )
                if under_way or not reader.done():
                    await changed.wait()
            if self._stopping.is_set():
                raise draining()
            await reader
        finally:
            pending = (reader, stop, *(task for _, task in under_way))
            for task_left in pending:
                task_left.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def Subscribe(  # name of the contract
        self, request_iterator: AsyncIterator[event_service_pb2.SubscribeRequest], context: _Context
    ) -> AsyncIterator[event_service_pb2.SubscribeResponse]:
        """Delivers to a member of a group."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("request") != "start":
            raise invalid_fields([FieldViolation("start", "the first request of a subscription must be start")])
        start = first.start
        subscription = await self._exchange.subscribe(
            start.consumer_group,
            list(start.topics),
            credit=start.credit,
            latest=start.start_from == event_service_pb2.START_FROM_LATEST,
        )
        reader = asyncio.create_task(self._hear(requests, subscription))
        stop = asyncio.create_task(self._stopping.wait())
        deliveries = subscription.deliveries()
        upcoming = asyncio.ensure_future(anext(deliveries))
        vanished = True
        try:
            yield event_service_pb2.SubscribeResponse(
                started=event_service_pb2.SubscribeStarted(credit=subscription.credit)
            )
            while True:
                await asyncio.wait({upcoming, reader, stop}, return_when=asyncio.FIRST_COMPLETED)
                if stop.done():
                    vanished = False
                    raise draining()
                if reader.done():
                    vanished = False
                    await reader
                    return
                batch = await _to_deliveries(upcoming.result(), subscription)
                if batch:
                    yield event_service_pb2.SubscribeResponse(
                        deliveries=event_service_pb2.SubscribeDeliveries(deliveries=batch)
                    )
                upcoming = asyncio.ensure_future(anext(deliveries))
        finally:
            for task in (reader, stop, upcoming):
                task.cancel()
            await asyncio.gather(reader, stop, upcoming, return_exceptions=True)
            await self._exchange.unsubscribe(subscription, vanished=vanished)

    async def _hear(
        self, requests: AsyncIterator[event_service_pb2.SubscribeRequest], subscription: Subscription
    ) -> None:
        async for request in requests:
            match request.WhichOneof("request"):
                case "ack":
                    subscription.ack(request.ack.delivery_ids)
                case "nack":
                    nack = request.nack
                    delay = nack.retry_delay.ToTimedelta().total_seconds() if nack.HasField("retry_delay") else None
                    if delay is not None and not 0 <= delay <= MAX_RETRY_DELAY:
                        why = f"must be 0 to {MAX_RETRY_DELAY:g} seconds"
                        raise invalid_fields([FieldViolation("nack.retry_delay", why)])
                    await subscription.nack(nack.delivery_id, nack.reason, delay)
                case "credit" if request.credit.deliveries > 0:
                    subscription.grant(request.credit.deliveries)
                case "credit":
                    raise invalid_fields([FieldViolation("credit.deliveries", "must be 1 or more")])
                case _:
                    raise invalid_fields([FieldViolation("start", "comes first and only once")])

    async def Tail(  # name of the contract
        self, request: event_service_pb2.TailRequest, context: _Context
    ) -> AsyncIterator[event_service_pb2.TailResponse]:
        """Shows events."""
        batches = self._exchange.tail(
            list(request.topics), last=request.last, follow=not request.no_follow, stopping=self._stopping
        )
        async with contextlib.aclosing(batches):
            async for records in batches:
                for record in records:
                    stored = _stored(record)
                    if stored is None:
                        self._exchange.counters.tail_skipped += 1
                    else:
                        yield event_service_pb2.TailResponse(stored_event=stored)

    async def GetTopic(  # name of the contract
        self, request: event_service_pb2.GetTopicRequest, context: _Context
    ) -> event_service_pb2.GetTopicResponse:
        """Returns one topic."""
        return event_service_pb2.GetTopicResponse(topic=await self._topic(self._exchange.topic(request.name)))

    async def ListTopics(  # name of the contract
        self, request: event_service_pb2.ListTopicsRequest, context: _Context
    ) -> event_service_pb2.ListTopicsResponse:
        """Lists topics by name."""
        fields = {"list": "topics", "include_dead_letter_topics": request.include_dead_letter_topics}
        size = page_size_of(request.page_size)
        after = decode_token(fields, request.page_token) if request.page_token else ""
        specs = [
            spec for spec in self._exchange.topics(dead_letters=request.include_dead_letter_topics) if spec.name > after
        ]
        page = specs[:size]
        return event_service_pb2.ListTopicsResponse(
            topics=[await self._topic(spec) for spec in page],
            next_page_token=encode_token(fields, page[-1].name) if len(specs) > size else "",
        )

    async def CreateTopic(  # name of the contract
        self, request: event_service_pb2.CreateTopicRequest, context: _Context
    ) -> event_service_pb2.CreateTopicResponse:
        """Makes a topic."""

        async def create() -> event_service_pb2.CreateTopicResponse:
            spec = await self._exchange.create_topic(
                request.topic_id,
                list(request.topic.payload_types),
                partitions=request.topic.partitions,
                retention_bytes=request.topic.retention_bytes,
            )
            return event_service_pb2.CreateTopicResponse(topic=await self._topic(spec))

        return await self._requests.once("CreateTopic", request, create)

    async def GetLag(  # name of the contract
        self, request: event_service_pb2.GetLagRequest, context: _Context
    ) -> event_service_pb2.GetLagResponse:
        """Says how far a group is behind."""
        lags = await self._exchange.lag(request.consumer_group, request.topic)
        return event_service_pb2.GetLagResponse(
            partitions=[
                topic_pb2.PartitionLag(
                    topic=f"topics/{lag.source.topic}",
                    partition=lag.source.partition,
                    committed_offset=lag.committed,
                    end_offset=lag.end,
                    lag=lag.lag,
                )
                for lag in lags
            ],
            total_lag=sum(lag.lag for lag in lags),
        )

    async def ListDeadLetters(  # name of the contract
        self, request: event_service_pb2.ListDeadLettersRequest, context: _Context
    ) -> event_service_pb2.ListDeadLettersResponse:
        """Lists dead letters."""
        fields = {"list": "dead_letters", "topic": request.topic}
        cursor = None
        if request.page_token:
            partition, _, offset = decode_token(fields, request.page_token).partition(":")
            cursor = (int(partition), int(offset))
        letters, following = await self._exchange.dead_letters(
            request.topic, cursor=cursor, limit=page_size_of(request.page_size)
        )
        return event_service_pb2.ListDeadLettersResponse(
            dead_letters=[_dead_letter(letter) for letter in letters],
            next_page_token=encode_token(fields, f"{following[0]}:{following[1]}") if following else "",
        )

    async def RedriveDeadLetters(  # name of the contract
        self, request: event_service_pb2.RedriveDeadLettersRequest, context: _Context
    ) -> event_service_pb2.RedriveDeadLettersResponse:
        """Publishes dead letters again."""

        async def redrive() -> event_service_pb2.RedriveDeadLettersResponse:
            redriven = await self._exchange.redrive(request.topic, limit=request.max_letters)
            return event_service_pb2.RedriveDeadLettersResponse(redriven=redriven)

        return await self._requests.once("RedriveDeadLetters", request, redrive)

    async def _topic(self, spec: TopicSpec) -> topic_pb2.Topic:
        return topic_pb2.Topic(
            name=f"topics/{spec.name}",
            payload_types=spec.payload_types,
            partitions=spec.partitions,
            retention_bytes=spec.retention_bytes,
            dead_letter_topic="" if spec.is_dead_letter else f"topics/{spec.dead_letter_name}",
            ranges=[
                topic_pb2.PartitionRange(partition=number, start_offset=start, end_offset=end)
                for number, (start, end) in enumerate(await self._exchange.ranges(spec))
            ],
            create_time=None if spec.created_ns is None else _timestamp(spec.created_ns),
        )


async def _to_deliveries(
    delivered: Sequence[Delivered], subscription: Subscription
) -> list[event_service_pb2.Delivery]:
    batch = []
    for delivery in delivered:
        stored = _stored(delivery.record)
        if stored is None:
            await subscription.give_up(delivery.delivery_id, "the record is not an event")
            subscription.grant(1)  # the member never saw it and cannot give its credit back
        else:
            batch.append(
                event_service_pb2.Delivery(
                    delivery_id=delivery.delivery_id, stored_event=stored, attempt=delivery.attempt
                )
            )
    return batch


def _stored(record: StoredRecord) -> event_pb2.StoredEvent | None:
    event = to_event(record)
    if event is None:
        return None
    return event_pb2.StoredEvent(
        event=event,
        position=_position(Position(record.source.topic, record.source.partition, record.offset)),
        append_time=_timestamp(record.append_ns),
    )


def _dead_letter(letter: DeadLetterRecord) -> event_pb2.DeadLetter:
    record = letter.record
    return event_pb2.DeadLetter(
        event=to_event(record),
        position=_position(Position(record.source.topic, record.source.partition, record.offset)),
        origin=_position(letter.origin),
        consumer_group=letter.group,
        reason=letter.reason,
        attempts=letter.attempts,
        dead_letter_time=_timestamp(record.append_ns),
    )


def _published(published: Published) -> event_service_pb2.PublishedEvent:
    return event_service_pb2.PublishedEvent(
        event_id=published.event_id, position=_position(published.position), duplicate=published.duplicate
    )


def _rejected(rejected: Rejected) -> event_service_pb2.RejectedEvent:
    return event_service_pb2.RejectedEvent(
        event_id=rejected.event_id, reason=rejected.reason.value, message=rejected.message
    )


def _position(position: Position) -> event_pb2.Position:
    return event_pb2.Position(topic=f"topics/{position.topic}", partition=position.partition, offset=position.offset)


def _timestamp(nanoseconds: int) -> Timestamp:
    seconds, nanos = divmod(nanoseconds, 1_000_000_000)
    return Timestamp(seconds=seconds, nanos=nanos)

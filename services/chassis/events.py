"""Events for programs: publish without waiting, subscribe with acknowledgement, over Oona's contract.

:class:`EventPublisher` takes events from any thread at once and sends them in batches from its event loop;
:class:`EventSubscriber` iterates over the typed events of topics as a member of a consumer group. Both connect
again for as long as it takes. Neither knows how Oona stores events.

Spans follow the OpenTelemetry semantic conventions for messaging: ``publish <topic>`` (PRODUCER) in the trace of the
publisher, ``process <topic>`` (CONSUMER) as its child, in whichever process handles the event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from esper.events.v1 import events_pb2
from esper.oona.v1 import event_service_pb2
from esper.oona.v1.event_pb2 import Event, Position
from esper.oona.v1.event_service_pb2_grpc import EventServiceStub
from services.chassis.errors import from_rpc_error
from services.chassis.ids import new_id
from services.chassis.telemetry import Telemetry, context_from, mark_failed, traceparent_of

_LOG: Final = logging.getLogger(__name__)

#: Imported so that this process can unpack every payload of the platform.
PAYLOADS: Final = events_pb2.DESCRIPTOR

_SYSTEM: Final = "oona"
_BATCH_EVENTS: Final = 256
_BATCH_BYTES: Final = 2 * 2**20
_PUBLISH_SECONDS: Final = 10.0
_BACKOFF_SECONDS: Final = (0.1, 2.0)
#: Statuses that say that the request is wrong, not the moment.
_PERMANENT: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)


class _Backoff:
    """Pauses between tries: doubling, with jitter."""

    def __init__(self) -> None:
        self._pause = _BACKOFF_SECONDS[0]

    def reset(self) -> None:
        self._pause = _BACKOFF_SECONDS[0]

    def next(self) -> float:
        pause, self._pause = self._pause, min(_BACKOFF_SECONDS[1], self._pause * 2)
        return pause * random.uniform(0.7, 1.3)  # jitter, no secret


@dataclass(frozen=True, slots=True)
class PublisherCounts:
    """What became of the events of a publisher; rises only, but for ``waiting``."""

    #: Acknowledged by Oona: durable.
    published: int
    #: Refused here: the queue was full, or the publisher had stopped.
    dropped: int
    #: Refused by Oona: not an event of their topic.
    rejected: int
    #: In the queue or on their way.
    waiting: int


class EventPublisher:
    """Publishes events in the order of the calls, at least once; Oona drops what it has already by its event id.

    Args:
        channel: to Oona; any grpc.aio channel.
        source: who says so: the ``source`` of every event.
        telemetry: for the spans.
        queue_size: events that may wait for Oona; more are dropped and counted.
    """

    def __init__(self, channel: grpc.aio.Channel, source: str, telemetry: Telemetry, queue_size: int) -> None:
        self._stub = EventServiceStub(channel)
        self._source = source
        self._telemetry = telemetry
        self._queue_size = queue_size
        self._lock = threading.Lock()  # over what follows; held for a few instructions
        self._queue: deque[tuple[Event, Span]] = deque()
        self._under_way = 0
        self._dropped = 0
        self._accepting = True
        self._signalled = False
        self._published = 0
        self._rejected = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    @property
    def counts(self) -> PublisherCounts:
        """What became of the events so far; any thread."""
        with self._lock:
            waiting = len(self._queue) + self._under_way
            return PublisherCounts(self._published, self._dropped, self._rejected, waiting)

    async def start(self) -> None:
        """Begins to send, from the running event loop. Events published before wait."""
        with self._lock:
            self._loop = asyncio.get_running_loop()
        self._arrived.set()
        self._pump = asyncio.create_task(self._run(), name="event-publisher")

    def publish(self, topic: str, key: str, payload: Message, *, parent: Context | None = None) -> bool:
        """Queues an event and returns at once; any thread.

        Args:
            topic: bare name, e.g. ``system.events.epoch``.
            key: events of a topic with equal keys keep their order; "" asks for none.
            payload: a message that the topic accepts.
            parent: context of what caused it; None: the current span.

        Returns:
            False if it was dropped (and counted): the queue is full, or the publisher has stopped.
        """
        with self._lock:
            if not self._accepting or len(self._queue) + self._under_way >= self._queue_size:
                self._dropped += 1
                return False
        event_id = new_id()
        span = self._telemetry.start(
            f"publish {topic}",
            {
                "messaging.system": _SYSTEM,
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
                "messaging.message.id": event_id,
                "messaging.client.id": self._source,
            },
            kind=SpanKind.PRODUCER,
            parent=parent,
        )
        packed = AnyMessage()
        packed.Pack(payload)
        seconds, nanos = divmod(time.time_ns(), 1_000_000_000)
        event = Event(
            event_id=event_id,
            type=payload.DESCRIPTOR.full_name,
            source=self._source,
            topic=f"topics/{topic}",
            key=key,
            event_time=Timestamp(seconds=seconds, nanos=nanos),
            schema_version=1,
            traceparent=traceparent_of(span) or "",
            payload=packed,
        )
        span.end()
        with self._lock:
            self._queue.append((event, span))
            wake = self._loop is not None and not self._signalled
            self._signalled = self._signalled or wake
            loop = self._loop
        if wake and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: stop() has counted, or will count, the rest
                loop.call_soon_threadsafe(self._arrived.set)
        return True

    async def flush(self, timeout: float) -> bool:
        """Waits until all that was published is acknowledged; False if that takes longer than ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while self.counts.waiting:
                    self._idle.clear()
                    self._arrived.set()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, timeout: float = 5.0) -> None:
        """Refuses further events, sends what waits for at most ``timeout`` seconds; what is left counts as dropped."""
        with self._lock:
            self._accepting = False
        if self._pump is None:
            self._drop_rest()
            return
        await self.flush(timeout)
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._drop_rest()

    def _drop_rest(self) -> None:
        with self._lock:
            self._dropped += len(self._queue) + self._under_way
            self._queue.clear()
            self._under_way = 0

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._send(batch)
            self._idle.set()

    def _take(self) -> list[tuple[Event, Span]]:
        batch: list[tuple[Event, Span]] = []
        size = 0
        with self._lock:
            self._signalled = False
            while self._queue and len(batch) < _BATCH_EVENTS and size < _BATCH_BYTES:
                item = self._queue.popleft()
                size += item[0].ByteSize()
                batch.append(item)
            self._under_way = len(batch)
        return batch

    async def _send(self, batch: Sequence[tuple[Event, Span]]) -> None:
        backoff = _Backoff()
        request = event_service_pb2.PublishRequest(events=[event for event, _ in batch])
        while True:
            try:
                # The call belongs to the trace of the first event; a batch has no better place.
                with self._telemetry.activate(batch[0][1]):
                    call = self._stub.Publish(request, timeout=_PUBLISH_SECONDS)
                await call
            except grpc.aio.AioRpcError as error:
                if error.code() in _PERMANENT:
                    if len(batch) > 1:  # one bad event refuses all: find it
                        for item in batch:
                            await self._send([item])
                        return
                    _LOG.error("event of type %s was rejected: %s", batch[0][0].type, error.details())
                    self._settle(rejected=1)
                    return
                _LOG.warning("events wait for Oona: %s %s", error.code().name, error.details())
                await asyncio.sleep(backoff.next())
            else:
                self._settle(published=len(batch))
                return

    def _settle(self, *, published: int = 0, rejected: int = 0) -> None:
        with self._lock:
            self._published += published
            self._rejected += rejected
            self._under_way -= published + rejected


@dataclass(slots=True, eq=False)
class ReceivedEvent:
    """An event to handle: settle it with :meth:`ack` or :meth:`nack`, or handle it within :meth:`handling`."""

    event: Event
    payload: Message
    position: Position
    #: 1 for the first delivery.
    attempt: int
    _delivery_id: int
    _session: _Session
    _telemetry: Telemetry
    _group: str
    _settled: bool = field(default=False)

    @property
    def topic(self) -> str:
        """Bare name of the topic."""
        return self.event.topic.removeprefix("topics/")

    def ack(self) -> None:
        """Handled: it will not come again. Safe to repeat; void when the connection it came over is gone."""
        if not self._settled:
            self._settled = True
            self._session.acknowledge(self._delivery_id)

    def nack(self, reason: str) -> None:
        """Failed: it comes again after a pause, or goes to the dead letters. Safe to repeat."""
        if not self._settled:
            self._settled = True
            self._session.refuse(self._delivery_id, reason)

    @contextlib.contextmanager
    def handling(self) -> Iterator[Span]:
        """A span around the handler; acknowledges at its end.

        An exception of the handler is logged, recorded in the span and reported to Oona, which delivers the event
        again or gives it up: the loop over the subscriber goes on. Cancellation passes and settles nothing.
        """
        with self._telemetry.span(
            f"process {self.topic}",
            {
                "messaging.system": _SYSTEM,
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": self.topic,
                "messaging.destination.partition.id": str(self.position.partition),
                "messaging.message.id": self.event.event_id,
                "messaging.consumer.group.name": self._group,
            },
            kind=SpanKind.CONSUMER,
            parent=context_from(self.event.traceparent or None),
        ) as span:
            try:
                yield span
            except Exception as error:  # noqa: BLE001  # the bus is what handles a handler's failure
                mark_failed(span, error)
                _LOG.warning("event %s was not handled", self.event.event_id, exc_info=error)
                self.nack(f"{type(error).__name__}: {error}")
            else:
                self.ack()


class _Session:
    """One stream's outgoing half: collects what the handler settles and writes it in few messages."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._acks: list[int] = []
        self._nacks: list[tuple[int, str]] = []
        self._credit = 0
        self._closing = False
        self._changed = asyncio.Event()

    def acknowledge(self, delivery_id: int) -> None:
        self._acks.append(delivery_id)
        self._credit += 1
        self._changed.set()

    def refuse(self, delivery_id: int, reason: str) -> None:
        self._nacks.append((delivery_id, reason))
        self._credit += 1
        self._changed.set()

    def finish(self) -> None:
        """Writes what is left and ends the outgoing half."""
        self._closing = True
        self._changed.set()

    async def write(self) -> None:
        """Runs until :meth:`finish`, or until the stream breaks."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            acks, self._acks = self._acks, []
            nacks, self._nacks = self._nacks, []
            credit, self._credit = self._credit, 0
            if acks:
                await self._call.write(
                    event_service_pb2.SubscribeRequest(ack=event_service_pb2.SubscribeAck(delivery_ids=acks))
                )
            for delivery_id, reason in nacks:
                nack = event_service_pb2.SubscribeNack(delivery_id=delivery_id, reason=reason)
                await self._call.write(event_service_pb2.SubscribeRequest(nack=nack))
            if credit and not self._closing:
                grant = event_service_pb2.SubscribeCredit(deliveries=credit)
                await self._call.write(event_service_pb2.SubscribeRequest(credit=grant))
            if self._closing and not (self._acks or self._nacks):
                await self._call.done_writing()
                return


class EventSubscriber:
    """A member of a consumer group: ``async for received in subscriber``.

    Every event comes at least once, in order per key; handlers key their idempotence by ``event.event_id``. An event
    whose payload this process does not know is refused without being shown. Iterate in one task only.

    Args:
        channel: to Oona; any grpc.aio channel.
        group: name of the consumer group.
        topics: bare names.
        telemetry: for the spans of :meth:`ReceivedEvent.handling`.
        credit: events that may be here unsettled, up to 10,000.
        latest: a group that has committed nothing begins with new events instead of the oldest.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        group: str,
        topics: Sequence[str],
        telemetry: Telemetry,
        *,
        credit: int = 64,
        latest: bool = False,
    ) -> None:
        self._stub = EventServiceStub(channel)
        self._group = group
        self._telemetry = telemetry
        self._start = event_service_pb2.SubscribeStart(
            consumer_group=group,
            topics=[f"topics/{topic}" for topic in topics],
            credit=credit,
            start_from=event_service_pb2.START_FROM_LATEST if latest else event_service_pb2.START_FROM_EARLIEST,
        )
        self._stopping = asyncio.Event()
        self._session: _Session | None = None
        #: Set while the subscription stands.
        self.connected: Final = asyncio.Event()
        #: How often the stream had to be opened again.
        self.reconnects = 0

    def stop(self) -> None:
        """Ends the iteration after the acknowledgements made so far are sent; safe to repeat."""
        self._stopping.set()
        if self._session is not None:
            self._session.finish()

    async def __aiter__(self) -> AsyncGenerator[ReceivedEvent, None]:
        """Yields events until :meth:`stop`.

        Raises:
            EsperError: Oona refuses the subscription for good, e.g. because there is no such topic.
        """
        backoff = _Backoff()
        while not self._stopping.is_set():
            try:
                async with contextlib.aclosing(self._stream()) as events:
                    async for received in events:
                        backoff.reset()
                        yield received
                        if self._stopping.is_set():
                            break
            except grpc.aio.AioRpcError as error:
                if error.code() in _PERMANENT:
                    raise from_rpc_error(error) from error
                _LOG.warning("subscription %s was cut: %s %s", self._group, error.code().name, error.details())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), backoff.next())
            self.reconnects += not self._stopping.is_set()

    async def _stream(self) -> AsyncGenerator[ReceivedEvent, None]:
        call = self._stub.Subscribe()
        session = _Session(call)
        writer: asyncio.Task[None] | None = None
        graceful = False
        try:
            await call.write(event_service_pb2.SubscribeRequest(start=self._start))
            self._session = session
            writer = asyncio.create_task(session.write(), name=f"event-subscriber-{self._group}")
            if self._stopping.is_set():
                session.finish()
            async for response in call:
                self.connected.set()
                for delivery in response.deliveries.deliveries:
                    received = self._receive(delivery, session)
                    if received is None:
                        continue
                    graceful = True  # if the consumer leaves here, it does so on purpose
                    yield received
                    graceful = False
        except asyncio.InvalidStateError as error:  # grpc.aio: the call ended while it was written to
            raise await _failure(call) from error
        finally:
            self.connected.clear()
            self._session = None
            if writer is not None:
                if graceful:
                    session.finish()
                    with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        await asyncio.wait_for(writer, 2.0)
                        await asyncio.wait_for(call.code(), 2.0)
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    def _receive(self, delivery: event_service_pb2.Delivery, session: _Session) -> ReceivedEvent | None:
        event = delivery.stored_event.event
        payload = _unpack(event)
        if payload is None:
            session.refuse(delivery.delivery_id, f"group {self._group} does not know the payload type {event.type}")
            return None
        return ReceivedEvent(
            event,
            payload,
            delivery.stored_event.position,
            delivery.attempt,
            delivery.delivery_id,
            session,
            self._telemetry,
            self._group,
        )


def _unpack(event: Event) -> Message | None:
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(event.type)
    except KeyError:
        return None
    payload: Message = message_factory.GetMessageClass(descriptor)()
    return payload if event.payload.Unpack(payload) else None


async def _failure(call: Any) -> grpc.aio.AioRpcError:
    code = await call.code()
    return grpc.aio.AioRpcError(
        code, await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )

"""The server bootstrap and its interceptors, over real sockets: all four kinds of calls."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2  # noqa: F401  # registers the type inside RetryInfo
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from services.chassis import telemetry
from services.chassis.config.schema import ServicesConfig, TelemetryConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.interceptors.calls import status_code
from services.chassis.interceptors.ids import REQUEST_ID, RUN_ID
from services.chassis.server import ServiceServer
from tests.support.echo import NAME, EchoServicer, Running, pb, running, stub


async def _requests(*texts: str) -> Any:
    for text in texts:
        yield pb.EchoRequest(text=text)


async def _call(kind: str, peer: Any, text: str, times: int = 0, **options: Any) -> list[str]:
    """Texts answered by a call of the given kind."""
    if kind == "unary_unary":
        return [(await peer.Echo(pb.EchoRequest(text=text), **options)).text]
    if kind == "stream_unary":
        return [(await peer.Collect(_requests(text), **options)).text]
    if kind == "unary_stream":
        return [answer.text async for answer in peer.Repeat(pb.EchoRequest(text=text, times=times), **options)]
    return [answer.text async for answer in peer.Converse(_requests(text), **options)]


KINDS = ["unary_unary", "stream_unary", "unary_stream", "stream_stream"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def _plain(run: Running) -> grpc.aio.Channel:
    """A channel that adds nothing."""
    return grpc.aio.insecure_channel(run.address)


def _details(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.code == error.code().value[0]
    found = {}
    for detail in status.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                message = kind()
                detail.Unpack(message)
                found[kind.DESCRIPTOR.name] = message
    return found


@every_kind
async def test_an_error_of_ours_arrives_as_rich_status(kind: str) -> None:
    async with running() as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(kind, stub(channel), "esper", times=2)
        info = _details(caught.value)["ErrorInfo"]
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert info.reason == "NOT_FOUND"
        assert info.domain == "esper"
        assert info.metadata["resource"] == "things/1"
        assert caught.value.trailing_metadata().get(REQUEST_ID)


@every_kind
async def test_a_bug_arrives_as_internal_and_keeps_its_secret(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running() as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(kind, stub(channel), "bug", times=2)
        error_id = _details(caught.value)["ErrorInfo"].metadata["error_id"]
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(caught.value)
        assert error_id in (caught.value.details() or "")
    (logged,) = [record for record in caplog.records if record.name == "esper.errors"]
    assert logged.__dict__["fields"]["error_id"] == error_id
    assert "secret" in str(logged.exc_info)


@every_kind
async def test_an_abort_by_the_handler_is_left_as_it_is(kind: str) -> None:
    async with running() as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(kind, stub(channel), "abort")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_what_was_streamed_before_an_error_arrives() -> None:
    async with running() as run, _plain(run) as channel:
        answers = stub(channel).Repeat(pb.EchoRequest(text="esper", times=3))
        got = []
        with pytest.raises(grpc.aio.AioRpcError):
            async for answer in answers:
                got.append(answer.text)  # noqa: PERF401  # the list must survive the error
        assert got == ["esper"] * 3


@every_kind
async def test_a_handler_is_cancelled_when_its_client_leaves(kind: str, tmp_path: Path) -> None:
    async with running(run_dir=tmp_path) as run, _plain(run) as channel:
        task = asyncio.create_task(_call(kind, stub(channel), "wait"))
        await asyncio.wait_for(run.servicer.started.wait(), 10)
        task.cancel()
        await asyncio.wait_for(run.servicer.cancelled.wait(), 10)
        with pytest.raises(asyncio.CancelledError):
            await task
    (span,) = telemetry.read_traces(tmp_path / "traces")
    assert telemetry.plain_attributes(span["attributes"])["rpc.response.status_code"] == "CANCELLED"


async def test_a_generator_is_closed_when_its_client_leaves_in_the_middle() -> None:
    async with running() as run, _plain(run) as channel:
        answers = stub(channel).Repeat(pb.EchoRequest(text="x" * 100_000, times=1_000_000))
        await answers.read()
        answers.cancel()
        await asyncio.wait_for(run.servicer.closed.wait(), 10)


@every_kind
async def test_a_clients_deadline_ends_the_handler(kind: str, tmp_path: Path) -> None:
    async with running(run_dir=tmp_path) as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(kind, stub(channel), "wait", timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(run.servicer.cancelled.wait(), 10)
    (span,) = telemetry.read_traces(tmp_path / "traces")
    assert telemetry.plain_attributes(span["attributes"])["rpc.response.status_code"] == "DEADLINE_EXCEEDED"
    assert span["status"]["code"] == 2


async def test_the_server_cuts_deadlines_that_are_too_long() -> None:
    async with running(ServicesConfig(max_deadline_seconds=0.3)) as run, _plain(run) as channel:
        for options in ({"timeout": 60}, {}):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _call("unary_unary", stub(channel), "wait", **options)
            assert _details(caught.value)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call("unary_stream", stub(channel), "wait", timeout=60)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call("unary_unary", stub(channel), "own-timeout")
        assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_too_many_calls_are_refused_with_a_time_to_come_back() -> None:
    async with running(ServicesConfig(max_concurrent_rpcs=1)) as run, _plain(run) as channel:
        held = stub(channel).WatchEcho(pb.EchoRequest())
        await asyncio.wait_for(run.servicer.started.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call("unary_unary", stub(channel), "hello")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _details(caught.value)["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == 0.5
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING  # a busy server is not a dead one
        held.cancel()
        await asyncio.wait_for(_until_answered(stub(channel)), 10)


async def _until_answered(peer: Any) -> None:
    while True:
        try:
            await _call("unary_unary", peer, "hello")
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            await asyncio.sleep(0.01)


@every_kind
async def test_one_span_and_one_log_line_per_call(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("traceparent", traceparent), (REQUEST_ID, "req-7"), (RUN_ID, "run-9"))
    async with running(run_dir=tmp_path) as run, _plain(run) as channel:
        await _call(kind, stub(channel), "hello", times=5, metadata=metadata)
    (span,) = telemetry.read_traces(tmp_path / "traces")
    attributes = telemetry.plain_attributes(span["attributes"])
    assert span["traceId"] == "0af7651916cd43dd8448eb211c80319c"
    assert span["parentSpanId"] == "b7ad6b7169203331"
    assert span["kind"] == 2
    assert span["name"].startswith("esper.test.v1.EchoService/")
    assert attributes["rpc.method"] == span["name"]
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["esper.request_id"] == "req-7"
    assert attributes["esper.run"] == "run-9"
    assert span["status"]["code"] == 0
    if kind == "unary_stream":
        assert attributes["esper.rpc.responses"] == 6
        assert [event["name"] for event in span["events"]] == ["first message sent"]
    (line,) = [record for record in caplog.records if record.name == "esper.access"]
    assert line.__dict__["fields"]["code"] == "OK"
    assert line.__dict__["fields"]["method"] == f"/{span['name']}"


async def test_a_refused_call_is_in_span_and_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running(run_dir=tmp_path) as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await _call("unary_unary", stub(channel), "esper")
    (span,) = telemetry.read_traces(tmp_path / "traces")
    attributes = telemetry.plain_attributes(span["attributes"])
    assert attributes["error.type"] == "NOT_FOUND"
    assert span["status"]["code"] == 0  # the client's mistake, by the convention not the server's
    (line,) = [record for record in caplog.records if record.name == "esper.access"]
    assert line.__dict__["fields"]["reason"] == "NOT_FOUND"
    assert json.dumps(line.__dict__["fields"])


async def test_ids_that_would_spoil_a_log_are_replaced() -> None:
    async with running() as run, _plain(run) as channel:
        call = stub(channel).Echo(pb.EchoRequest(), metadata=((REQUEST_ID, "x" * 500),))
        await call
        given = (await call.trailing_metadata()).get(REQUEST_ID)
        assert given
        assert given != "x" * 500


async def test_an_unknown_method_is_unimplemented() -> None:
    async with running() as run, _plain(run) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{NAME}/Nothing", pb.EchoRequest.SerializeToString)(pb.EchoRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_lists_the_service_and_is_not_traced(tmp_path: Path) -> None:
    async def ask() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with running(run_dir=tmp_path) as run, _plain(run) as channel:
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask())
        names = {service.name async for answer in answers for service in answer.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names
    assert not (tmp_path / "traces").exists()


async def _rest(stream: Any) -> list[Any]:
    """What a stream that has been read from still brings."""
    found = []
    while (answer := await stream.read()) is not grpc.aio.EOF:
        found.append(answer)  # grpc forbids to iterate after a read
    return found


async def test_health_check_and_watch_follow_the_server_until_it_drains() -> None:
    status = health_pb2.HealthCheckResponse
    async with running() as run, _plain(run) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        first = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        second = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="late"))
        assert (await first.read()).status == (await second.read()).status == status.SERVING
        assert (await unknown.read()).status == status.SERVICE_UNKNOWN
        first.cancel()  # and the second still hears
        run.server.health.set(NAME, serving=False)
        assert (await second.read()).status == status.NOT_SERVING
        checked = await health.Check(health_pb2.HealthCheckRequest(service=NAME))
        assert checked.status == status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        run.server.health.set(NAME, serving=True)
        assert (await second.read()).status == status.SERVING

        await run.server.stop()

        assert [answer.status for answer in await _rest(second)] == [status.NOT_SERVING]
        run.server.health.set(NAME, serving=True)  # too late: a draining server stays NOT_SERVING
        assert run.server.health._statuses[NAME] == status.NOT_SERVING


async def test_a_drain_lets_streams_end_themselves() -> None:
    async with running(ServicesConfig(drain_seconds=60)) as run, _plain(run) as channel:
        answers = stub(channel).WatchEcho(pb.EchoRequest())
        assert (await answers.read()).text == "first"
        await asyncio.wait_for(run.server.stop(), 10)
        assert [answer.text for answer in await _rest(answers)] == ["last"]
        assert await answers.code() is grpc.StatusCode.OK


async def test_a_call_that_will_not_end_is_cut_after_the_grace() -> None:
    async with running(ServicesConfig(drain_seconds=0.2)) as run, _plain(run) as channel:
        call = asyncio.create_task(_call("unary_unary", stub(channel), "wait"))
        await asyncio.wait_for(run.servicer.started.wait(), 10)
        await asyncio.wait_for(run.server.stop(), 10)
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        assert run.servicer.cancelled.is_set()


async def test_a_port_in_use_is_said_and_not_shared() -> None:
    async with running() as run:
        port = int(run.address.rpartition(":")[2])
        second = ServiceServer(ServicesConfig(), run.telemetry, port=port)
        with pytest.raises(EsperError) as caught:
            await second.start()
        assert caught.value.reason is Reason.PORT_IN_USE
        assert str(port) in caught.value.message


async def test_an_open_interface_is_served_where_it_was_allowed() -> None:
    tracer = telemetry.setup("echo", TelemetryConfig(), None, None)
    server = ServiceServer(ServicesConfig(host="0.0.0.0", insecure=True), tracer)
    await server.start()
    assert server.address.startswith("0.0.0.0:")
    await server.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_an_ipv6_address_is_bracketed() -> None:
    tracer = telemetry.setup("echo", TelemetryConfig(), None, None)
    server = ServiceServer(ServicesConfig(host="::1"), tracer)
    try:
        address = await server.start()
    except EsperError:
        pytest.skip("IPv6 is switched off here")
    assert address.startswith("[::1]:")
    await server.stop()


def test_status_codes_come_in_several_spellings() -> None:
    assert status_code(None) is grpc.StatusCode.OK
    assert status_code(5) is grpc.StatusCode.NOT_FOUND
    assert status_code(grpc.StatusCode.ABORTED) is grpc.StatusCode.ABORTED
    assert status_code(99) is grpc.StatusCode.UNKNOWN


def test_the_servicer_covers_every_method_of_its_contract() -> None:
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["EchoService"].methods} <= set(dir(EchoServicer))

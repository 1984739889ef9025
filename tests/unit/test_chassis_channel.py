"""Channels: deadlines, retries by contract, health checking, trace context, address resolution."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2

from services.chassis import logs, telemetry
from services.chassis.channel import (
    ADDRESSES_DIR,
    MAX_ATTEMPTS,
    NO_DEADLINE,
    Channel,
    ChannelFactory,
    contract_services,
    is_retryable,
    service_config,
    wait_until_serving,
)
from services.chassis.config.schema import ServicesConfig, TelemetryConfig, TlsConfig, UrzaConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.interceptors.ids import REQUEST_ID, RUN_ID
from tests.support.echo import SERVICE, EchoServicer, pb, pb_grpc, running, stub


def test_retries_follow_from_the_contract() -> None:
    retryable = {method.name for method in SERVICE.methods if is_retryable(method)}
    assert retryable == {"Echo", "Create"}
    config = service_config([SERVICE])
    (methods,) = config["methodConfig"]
    assert {name["method"] for name in methods["name"]} == retryable
    assert methods["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert "methodConfig" not in service_config([])


class _Unavailable(EchoServicer):
    """Turns every call away."""

    async def _do(self, text: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        self.calls += 1
        await context.abort(grpc.StatusCode[text], "not now")

    async def Create(self, request: Any, context: Any) -> Any:  # the contract's name
        await self._do("UNAVAILABLE", context)


@pytest.mark.parametrize(
    ("method", "request_", "tries"),
    [
        ("Echo", pb.EchoRequest(text="UNAVAILABLE"), MAX_ATTEMPTS),
        ("Create", pb.CreateRequest(request_id="a"), MAX_ATTEMPTS),
        ("Change", pb.EchoRequest(text="UNAVAILABLE"), 1),
        ("Echo", pb.EchoRequest(text="INTERNAL"), 1),
        ("Echo", pb.EchoRequest(text="RESOURCE_EXHAUSTED"), 1),
    ],
)
async def test_only_unavailable_and_only_idempotent_calls_are_tried_again(
    method: str, request_: Any, tries: int
) -> None:
    async with running(make=_Unavailable) as run, run.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await getattr(stub(channel), method)(request_)
        assert run.servicer.calls == tries


async def test_a_call_without_deadline_gets_the_configured_one() -> None:
    async with running() as run, run.channel(timeout=20) as channel:
        for timeout, least, most in ((None, 10, 21), (50, 40, 51)):
            await stub(channel).Echo(pb.EchoRequest(), timeout=timeout)
            remaining = run.servicer.seen[-1].time_remaining()
            assert remaining is not None
            assert least < remaining <= most
        await stub(channel).Echo(pb.EchoRequest(), timeout=NO_DEADLINE)
        assert run.servicer.seen[-1].time_remaining() in (None, math.inf)
        [answer async for answer in stub(channel).Repeat(pb.EchoRequest(text="x"))]
        assert run.servicer.seen[-1].time_remaining() is not None


async def test_a_default_deadline_ends_a_call_that_hangs() -> None:
    async with running() as run, run.channel(timeout=0.3) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).Echo(pb.EchoRequest(text="wait"))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_watch_has_no_deadline_of_its_own() -> None:
    async with running() as run, run.channel(timeout=0.2) as channel:
        watch = stub(channel).WatchEcho(pb.EchoRequest())
        await watch.read()
        await run.servicer.started.wait()
        assert run.servicer.seen[-1].time_remaining() in (None, math.inf)


async def _all_kinds(peer: Any) -> None:
    async def requests() -> Any:
        yield pb.EchoRequest(text="x")

    await peer.Echo(pb.EchoRequest(text="x"))
    await peer.Collect(requests())
    [answer async for answer in peer.Repeat(pb.EchoRequest(text="x"))]
    [answer async for answer in peer.Converse(requests())]


async def test_a_server_span_of_every_kind_hangs_under_its_client_span(tmp_path: Path) -> None:
    async with running(run_dir=tmp_path) as run, run.channel(run_id="run-5") as channel:
        with run.telemetry.span("root") as root:
            await _all_kinds(stub(channel))
        with pytest.raises(grpc.aio.AioRpcError):
            await stub(channel).Echo(pb.EchoRequest(text="esper"))
        waiting = asyncio.ensure_future(stub(channel).Echo(pb.EchoRequest(text="wait")))
        await run.servicer.started.wait()
        waiting.cancel()
    spans = telemetry.read_traces(tmp_path / "traces")
    by_id = {span["spanId"]: span for span in spans}
    clients = [span for span in spans if span["kind"] == 3]
    servers = [span for span in spans if span["kind"] == 2]
    assert len(clients) == len(servers) == 6
    for server in servers:
        client = by_id[server["parentSpanId"]]
        assert client["name"] == server["name"]
        assert telemetry.plain_attributes(server["attributes"])["esper.run"] == "run-5"
    under_root = [span for span in clients if span.get("parentSpanId") == f"{root.get_span_context().span_id:016x}"]
    assert len(under_root) == 4
    codes = [telemetry.plain_attributes(span["attributes"])["rpc.response.status_code"] for span in clients]
    assert sorted(codes) == ["CANCELLED", "NOT_FOUND", "OK", "OK", "OK", "OK"]
    failed = next(span for span in clients if span["status"]["code"] == 2 and span["status"].get("message"))
    assert failed["status"]["message"]


async def test_the_ids_of_the_work_go_along_with_its_calls() -> None:
    async with running() as run, run.channel(run_id="of the factory") as channel:
        request, of_run = logs.request_id.set("req-1"), logs.run_id.set("run-1")
        try:
            await stub(channel).Echo(pb.EchoRequest(), metadata=(("x-mine", "1"),))
        finally:
            logs.request_id.reset(request)
            logs.run_id.reset(of_run)
        metadata = dict(run.servicer.seen[-1].invocation_metadata() or ())
        assert metadata[REQUEST_ID] == "req-1"
        assert metadata[RUN_ID] == "run-1"
        assert metadata["x-mine"] == "1"
        assert str(metadata["traceparent"]).startswith("00-")


async def test_a_server_that_says_not_serving_gets_no_calls() -> None:
    async with running() as run, run.channel() as channel:
        await stub(channel).Change(pb.EchoRequest())
        run.server.health.set("", serving=False)
        async with asyncio.timeout(10):
            while channel.get_state() is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        calls = run.servicer.calls
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).Change(pb.EchoRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert run.servicer.calls == calls
        run.server.health.set("", serving=True)
        await asyncio.wait_for(channel.channel_ready(), 10)
        await stub(channel).Change(pb.EchoRequest())


@pytest.mark.slow
async def test_pings_more_often_than_grpc_likes_are_allowed() -> None:
    """With grpc's own policy the third ping within five minutes ends the connection: the control shows it."""
    options = (("grpc.keepalive_time_ms", 1_000), ("grpc.http2.max_pings_without_data", 0))
    default = grpc.aio.server()
    servicer = EchoServicer(asyncio.Event())
    pb_grpc.add_EchoServiceServicer_to_server(servicer, default)
    port = default.add_insecure_port("127.0.0.1:0")
    await default.start()
    async with (
        running() as run,
        grpc.aio.insecure_channel(run.address, options=options) as ours,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as theirs,
    ):
        allowed, refused = stub(ours).WatchEcho(pb.EchoRequest()), stub(theirs).WatchEcho(pb.EchoRequest())
        await asyncio.gather(allowed.read(), refused.read())
        try:
            async with asyncio.timeout(60):
                assert await refused.code() is grpc.StatusCode.UNAVAILABLE
            assert "ping" in (await refused.details()).lower()
            assert not allowed.done()
        finally:
            await default.stop(0)  # a server that is never stopped keeps the whole process from ending


async def test_wait_until_serving_waits_and_gives_up_by_name() -> None:
    async with running() as run:
        run.server.health.set("", serving=False)
        waiting = asyncio.create_task(wait_until_serving("urza", run.address, tls_config=TlsConfig(), timeout=10))
        with pytest.raises(EsperError) as caught:
            await wait_until_serving("urza", run.address, tls_config=TlsConfig(), timeout=0.3)
        assert caught.value.reason is Reason.SERVICE_UNREACHABLE
        assert "urza" in caught.value.message
        assert run.address in caught.value.message
        assert health_pb2.HealthCheckResponse.ServingStatus.Name(health_pb2.HealthCheckResponse.NOT_SERVING) in str(
            caught.value
        )
        assert not waiting.done()
        run.server.health.set("", serving=True)
        await waiting


async def test_wait_until_serving_survives_a_server_that_goes_away() -> None:
    async with running() as run:
        run.server.health.set("", serving=False)
        waiting = asyncio.create_task(wait_until_serving("urza", run.address, tls_config=TlsConfig(), timeout=0.5))
        await run.server.stop()
        with pytest.raises(EsperError):
            await waiting


async def test_a_server_without_health_is_unreachable_and_says_why() -> None:
    bare = grpc.aio.server()
    port = bare.add_insecure_port("127.0.0.1:0")
    await bare.start()
    with pytest.raises(EsperError, match="UNIMPLEMENTED"):
        await wait_until_serving("urza", f"127.0.0.1:{port}", tls_config=TlsConfig(), timeout=0.3)
    await bare.stop(0)


async def test_the_factory_finds_services_by_configuration_or_run_folder(tmp_path: Path) -> None:
    tracer = telemetry.setup("x", TelemetryConfig(), None, None)
    config = ServicesConfig(urza=UrzaConfig(address="urza.example:443"))
    factory = ChannelFactory(config, tracer, run_dir=tmp_path)
    assert factory.address("urza") == "urza.example:443"
    with pytest.raises(EsperError) as caught:
        factory.address("oona")
    assert caught.value.reason is Reason.ADDRESS_UNKNOWN
    (tmp_path / ADDRESSES_DIR).mkdir()
    (tmp_path / ADDRESSES_DIR / "oona").write_text("127.0.0.1:1234\n")
    assert factory.address("oona") == "127.0.0.1:1234"
    with pytest.raises(EsperError):
        ChannelFactory(config, tracer).address("oona")


async def test_the_factory_keeps_one_channel_per_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.chassis.channel.contract_services", lambda _: [SERVICE])
    async with running() as run:
        config = ServicesConfig(urza=UrzaConfig(address=run.address))
        factory = ChannelFactory(config, run.telemetry, run_dir=tmp_path)
        channel = factory.channel("urza")
        assert isinstance(channel, Channel)
        assert factory.channel("urza") is channel
        assert (await stub(channel).Echo(pb.EchoRequest(text="x"))).text == "x"
        await factory.close()
        assert factory.channel("urza") is not channel
        await factory.close()


def test_the_contracts_of_a_component_are_found_by_its_name() -> None:
    for component in ("urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria"):
        services = contract_services(component)
        assert services, component
        assert all(service.full_name.startswith(f"esper.{component}.v1.") for service in services)
    with pytest.raises(ModuleNotFoundError):
        contract_services("nobody")

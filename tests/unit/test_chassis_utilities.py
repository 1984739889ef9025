"""The chassis' small parts: errors on the wire, names, pages, files, repeated requests, watches, links."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from esper.common.v1.common_pb2 import ChangeType
from esper.tamiyo.v1.policy_service_pb2 import PauseRequest
from services.chassis.errors import (
    DOMAIN,
    EsperError,
    FieldViolation,
    Reason,
    Resource,
    from_rpc_error,
    invalid,
    not_found,
    reason_named,
    required,
    to_rpc_status,
)
from services.chassis.files import append_line, write_atomically
from services.chassis.idempotency import RequestCache
from services.chassis.ids import new_id, parse_name
from services.chassis.link import Link, LinkRegistry, serve_link
from services.chassis.pagination import decode_token, encode_token, page_size_of
from services.chassis.watch import WatchHub, WatchItem


class Answer(grpc.RpcError):
    """What a client's call raises."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: object = ()) -> None:
        super().__init__()
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailers


def over_the_wire(error: EsperError) -> EsperError:
    status = to_rpc_status(error)
    return from_rpc_error(Answer(status.code, status.details, status.trailing_metadata))


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_crosses_the_wire_and_says_its_way_out(reason: Reason) -> None:
    sent = EsperError("what and how", reason=reason, metadata={"a": "b"})
    found = over_the_wire(sent)
    assert (found.reason, found.code, found.message, found.metadata) == (
        reason,
        reason.code,
        "what and how",
        {"a": "b"},
    )
    assert reason.meaning
    assert reason.way_out
    assert reason_named(str(reason)) is reason


def test_all_details_cross_the_wire() -> None:
    violations = [FieldViolation("a.b[0]", "is bad")]
    resource_ = Resource("run", "runs/x")
    sent = EsperError("no", reason=Reason.NOT_FOUND, violations=violations, retry_after=1.5, resource=resource_)
    found = over_the_wire(sent)
    assert found.violations == tuple(violations)
    assert found.retry_after == 1.5
    assert found.resource == resource_


def test_errors_of_strangers_keep_code_and_message() -> None:
    bare = from_rpc_error(Answer(grpc.StatusCode.UNAVAILABLE, "down", None))
    assert (bare.reason, bare.code, bare.message) == (Reason.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "down")
    odd = from_rpc_error(Answer(grpc.StatusCode.DATA_LOSS, "odd", [("grpc-status-details-bin", b"\xff\xff")]))
    assert (odd.reason, odd.code) == (Reason.INTERNAL, grpc.StatusCode.DATA_LOSS)
    box = AnyMessage()
    box.Pack(StringValue(value="other"))
    foreign = status_pb2.Status(code=5, message="m", details=[box]).SerializeToString()
    assert (
        from_rpc_error(Answer(grpc.StatusCode.NOT_FOUND, "m", [("grpc-status-details-bin", foreign)])).violations == ()
    )
    naked = from_rpc_error(grpc.RpcError("nothing known"))
    assert (naked.code, naked.message) == (grpc.StatusCode.UNKNOWN, "nothing known")
    assert reason_named("OF_A_LATER_VERSION") is Reason.INTERNAL
    assert DOMAIN == "esper"


def test_the_common_errors_name_field_reason_and_way_out() -> None:
    wrong, empty, missing = invalid("a.b", "is odd", "make it even"), required("c"), not_found("run", "runs/x")
    assert wrong.violations[0].field == "a.b"
    assert "make it even" in wrong.message
    assert empty.reason is Reason.REQUIRED_FIELD
    assert missing.resource == Resource("run", "runs/x")
    assert not_found("run", "r", reason=Reason.RUN_NOT_FOUND, hint="look").message.endswith("look")


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    made = [new_id("x-") for _ in range(500)]
    assert len(set(made)) == 500
    assert [one[:12] for one in made] == sorted(one[:12] for one in made)
    assert all(one == one.lower() for one in made)


def test_names_are_taken_apart_or_refused_with_their_form() -> None:
    assert parse_name("runs/{r}/seeds/{s}", "runs/a/seeds/span:b.c") == ("a", "span:b.c")
    for name, reason in (
        ("", Reason.REQUIRED_FIELD),
        ("runs/a", Reason.INVALID_NAME),
        ("runs/a b", Reason.INVALID_NAME),
    ):
        with pytest.raises(EsperError) as caught:
            parse_name("runs/{r}/seeds/{s}", name, field="f")
        assert caught.value.reason is reason
        assert caught.value.metadata["field"] == "f"


@given(st.dictionaries(st.text(max_size=5), st.integers()), st.text(max_size=30), st.text(max_size=30))
def test_a_page_token_is_bound_to_its_filter(scope: dict[str, int], cursor: str, noise: str) -> None:
    token = encode_token(scope, cursor)
    assert decode_token(scope, token) == cursor
    for bad in (encode_token({**scope, "other": 1}, cursor), noise):
        if bad != token:
            with pytest.raises(EsperError) as caught:
                decode_token(scope, bad)
            assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


def test_page_sizes_have_a_default_and_a_bound() -> None:
    assert [page_size_of(size) for size in (0, 7, 5000)] == [50, 7, 1000]
    with pytest.raises(EsperError, match="negative"):
        page_size_of(-1)


def test_files_are_written_whole_with_their_rights(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, "one")
    write_atomically(path, b"two", fsync=False, mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    append_line(tmp_path / "l", {"a": 1})
    append_line(tmp_path / "l", [2], fsync=True)
    assert (tmp_path / "l").read_text() == '{"a":1}\n[2]\n'
    with pytest.raises(EsperError) as caught:
        write_atomically(tmp_path / "no" / "f", "")
    assert caught.value.reason is Reason.STORAGE_FAILED
    with pytest.raises(EsperError) as caught:
        append_line(tmp_path, {})
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["f", "l"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, "old")
    with _small_files(16), pytest.raises(EsperError) as caught:
        write_atomically(path, "x" * 64)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def _small_files(limit: int) -> Iterator[None]:
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


async def test_a_request_runs_once_however_often_it_comes() -> None:
    cache, ran = RequestCache(entries=2), 0

    async def work() -> int:
        nonlocal ran
        ran += 1
        await asyncio.sleep(0)
        return ran

    request = PauseRequest(request_id="a", reason="r")
    both = await asyncio.gather(cache.once("m", request, work), cache.once("m", request, work))
    assert list(both) == [1, 1]
    assert await cache.once("other", request, work) == 2
    with pytest.raises(EsperError) as caught:
        await cache.once("m", PauseRequest(request_id="a", reason="other"), work)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    with pytest.raises(EsperError) as caught:
        await cache.once("m", PauseRequest(), work)
    assert caught.value.reason is Reason.REQUIRED_FIELD
    await cache.once("m", PauseRequest(request_id="b"), work)  # the oldest goes
    assert await cache.once("m", request, work) == 4


async def test_a_failure_is_not_kept() -> None:
    cache, request, fail = RequestCache(), PauseRequest(request_id="a"), True

    async def work() -> str:
        if fail:
            raise ValueError("no")
        return "yes"

    with pytest.raises(ValueError, match="no"):
        await cache.once("m", request, work)
    await asyncio.sleep(0)
    fail = False
    assert await cache.once("m", request, work) == "yes"


async def take(stream: AsyncIterator[WatchItem[str]], count: int) -> list[tuple[str, str | None]]:
    found = []
    async with asyncio.timeout(5):
        for _ in range(count):
            item = await anext(stream)
            found.append((ChangeType.Name(item.change).removeprefix("CHANGE_TYPE_"), item.item))
    return found


async def test_a_watch_is_a_snapshot_a_bookmark_and_changes_until_draining() -> None:
    hub: WatchHub[str] = WatchHub()
    draining = asyncio.Event()
    stream = hub.watch(snapshot=lambda: ["a1", "b1"], draining=draining, match=lambda item: item.startswith("a"))
    assert await take(stream, 2) == [("SNAPSHOT", "a1"), ("BOOKMARK", None)]
    hub.publish("b2", ChangeType.CHANGE_TYPE_ADDED)
    hub.publish("a2", ChangeType.CHANGE_TYPE_MODIFIED)
    assert await take(stream, 1) == [("MODIFIED", "a2")]
    assert (hub.revision, hub.watchers) == (2, 1)
    draining.set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert hub.watchers == 0


async def test_a_watch_resumes_and_an_old_token_expires() -> None:
    hub: WatchHub[str] = WatchHub(history=2)
    draining = asyncio.Event()
    stream = hub.watch(snapshot=list, draining=draining)
    start = await anext(stream)
    for text in ("a", "b"):
        hub.publish(text, ChangeType.CHANGE_TYPE_ADDED)
    resumed = hub.watch(snapshot=lambda: ["never asked"], draining=draining, resume_token=start.token)
    assert await take(resumed, 2) == [("ADDED", "a"), ("ADDED", "b")]
    hub.publish("c", ChangeType.CHANGE_TYPE_ADDED)
    filtered = hub.watch(
        snapshot=list, draining=draining, resume_token=(await anext(resumed)).token, match=lambda item: False
    )
    waiting = asyncio.ensure_future(anext(filtered))
    await asyncio.sleep(0)
    draining.set()
    with pytest.raises(StopAsyncIteration):
        await waiting
    for token in (start.token, "noise", encode_token({"hub": "of another process"}, "1")):
        with pytest.raises(EsperError) as caught:
            await anext(hub.watch(snapshot=list, draining=draining, resume_token=token))
        assert caught.value.reason is Reason.RESUME_TOKEN_EXPIRED


async def test_bookmarks_are_the_heartbeat_and_a_slow_watcher_is_dropped() -> None:
    hub: WatchHub[str] = WatchHub(queue=2, heartbeat_seconds=0.01)
    stream = hub.watch(snapshot=list, draining=asyncio.Event())
    assert await take(stream, 3) == [("BOOKMARK", None)] * 3
    for text in "abc":
        hub.publish(text, ChangeType.CHANGE_TYPE_ADDED)
    with pytest.raises(EsperError) as caught:
        await take(stream, 3)
    assert caught.value.reason is Reason.WATCHER_TOO_SLOW
    assert hub.watchers == 0


async def commands_of(link: Link[str], registry: LinkRegistry[str], draining: asyncio.Event) -> list[str]:
    """Commands that a link's stream gives until it ends."""

    async def silent() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    def ignore(message: str) -> None:
        raise AssertionError(message)

    return [command async for command in serve_link(silent(), link, registry, ignore, draining)]


async def test_unanswered_commands_are_sent_again_to_a_newer_process() -> None:
    registry: LinkRegistry[str] = LinkRegistry(limit=2)
    first = registry.attach("r", 1)
    registry.send("r", "c1", "one")
    registry.send("r", "c2", "two")
    with pytest.raises(EsperError) as caught:
        registry.send("r", "c3", "three")
    assert caught.value.reason is Reason.COMMAND_QUEUE_FULL
    registry.answered("r", "c1")
    second = registry.attach("r", 2)
    with pytest.raises(EsperError) as caught:
        registry.attach("r", 1)
    assert caught.value.reason is Reason.RUN_ALREADY_ATTACHED
    draining = asyncio.Event()
    assert await commands_of(first, registry, draining) == []  # it was replaced
    assert registry.attached("r")
    streaming = asyncio.ensure_future(commands_of(second, registry, draining))
    await asyncio.sleep(0.01)
    draining.set()
    assert await streaming == ["two"]
    assert not registry.attached("r")
    registry.send("r", "c4", "while away")
    registry.answered("unknown", "c")
    assert not registry.detach(second)


async def test_a_link_ends_with_its_reader_and_with_what_its_handler_says() -> None:
    async def requests() -> AsyncIterator[str]:
        yield "bad"

    def handle(message: str) -> None:
        if message == "bad":
            raise EsperError("refused", reason=Reason.INVALID_FIELD)

    for source, error in ((requests(), EsperError), (aiter_of([]), None)):
        registry: LinkRegistry[str] = LinkRegistry(limit=1)
        stream = serve_link(source, registry.attach("r", 1), registry, handle, asyncio.Event())
        if error is None:
            assert [command async for command in stream] == []
        else:
            with pytest.raises(error, match="refused"):
                await anext(stream)
        assert not registry.attached("r")


async def aiter_of(items: list[str]) -> AsyncIterator[str]:
    for item in items:
        yield item

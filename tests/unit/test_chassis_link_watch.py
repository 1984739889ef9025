"""What a link and a watch do at their edges: old processes, ends in the middle, watchers that nothing concerns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from esper.common.v1.common_pb2 import ChangeType
from services.chassis.errors import EsperError, Reason
from services.chassis.link import LinkRegistry, first_message, serve_link
from services.chassis.watch import WatchHub

_ADDED, _BOOKMARK = ChangeType.CHANGE_TYPE_ADDED, ChangeType.CHANGE_TYPE_BOOKMARK
_SECONDS = 10.0


async def of(queue: asyncio.Queue[str | None]) -> AsyncIterator[str]:
    """What is put into a queue, until None."""
    while (item := await queue.get()) is not None:
        yield item


async def test_what_an_older_process_still_says_is_dropped() -> None:
    registry: LinkRegistry[str] = LinkRegistry(limit=2)
    heard: list[str] = []
    says: asyncio.Queue[str | None] = asyncio.Queue()
    older = registry.attach("r", 1)
    stream = serve_link(of(says), older, registry, heard.append, asyncio.Event())
    commands = asyncio.ensure_future(anext(stream, "over"))
    says.put_nowait("first")
    while not heard:
        await asyncio.sleep(0)
    newer = registry.attach("r", 2)
    says.put_nowait("late")
    async with asyncio.timeout(_SECONDS):
        assert await commands == "over"
    assert heard == ["first"]
    assert older.replaced
    assert not newer.replaced
    assert registry.attached("r"), "the end of the older link must not detach the newer one"
    assert registry.detach(newer)
    assert not registry.attached("r")


async def test_a_client_that_goes_away_during_a_command_leaves_nothing_running() -> None:
    registry: LinkRegistry[str] = LinkRegistry(limit=2)
    link = registry.attach("r", 1)
    registry.send("r", "c1", "first")
    before = asyncio.all_tasks()
    async with contextlib.aclosing(
        serve_link(of(asyncio.Queue()), link, registry, lambda message: None, asyncio.Event())
    ) as stream:
        assert await anext(stream) == "first"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before
    assert not registry.attached("r")
    # Unanswered, so it is sent again.
    registry.attach("r", 1)
    assert registry.attach("r", 1).waiting == 1


async def test_a_stream_that_begins_with_nothing() -> None:
    draining = asyncio.Event()
    ended: asyncio.Queue[str | None] = asyncio.Queue()
    ended.put_nowait(None)
    assert await first_message(of(ended), draining) is None
    spoken: asyncio.Queue[str | None] = asyncio.Queue()
    spoken.put_nowait("hello")
    assert await first_message(of(spoken), draining) == "hello"
    waiting = asyncio.ensure_future(first_message(of(asyncio.Queue()), draining))
    await asyncio.sleep(0)
    draining.set()
    with pytest.raises(EsperError) as caught:
        await waiting
    assert caught.value.reason is Reason.DRAINING


async def test_a_watcher_that_nothing_concerns_still_gets_bookmarks() -> None:
    hub: WatchHub[str] = WatchHub(history=2, queue=1000, heartbeat_seconds=0.05)
    watch = hub.watch(snapshot=list, draining=asyncio.Event(), match=lambda item: item == "mine")
    start = await anext(watch)
    coming = asyncio.ensure_future(anext(watch))
    async with asyncio.timeout(_SECONDS):
        while not coming.done():  # others change all the time: silence would let the token grow too old to resume
            hub.publish("theirs", _ADDED)
            await asyncio.sleep(0.005)
    bookmark = await coming
    assert (bookmark.change, bookmark.item) == (_BOOKMARK, None)
    assert bookmark.revision > start.revision
    await watch.aclose()
    assert hub.watchers == 0
    hub.publish("theirs", _ADDED)
    hub.publish("mine", _ADDED)
    fresh = (await anext(hub.watch(snapshot=list, draining=asyncio.Event()))).token
    hub.publish("theirs", _ADDED)
    resumed = hub.watch(snapshot=list, draining=asyncio.Event(), match=lambda item: item == "mine", resume_token=fresh)
    hub.publish("mine", _ADDED)
    assert (await anext(resumed)).item == "mine"


async def test_what_was_published_before_a_drain_is_still_told() -> None:
    hub: WatchHub[str] = WatchHub()
    draining = asyncio.Event()
    watch = hub.watch(snapshot=lambda: ["old"], draining=draining)
    snapshot = await anext(watch)
    assert (snapshot.item, snapshot.token) == ("old", "")
    await anext(watch)
    hub.publish("last words", _ADDED)
    draining.set()
    assert [item.item async for item in watch] == ["last words"]

"""Repeated requests: which answers are kept, and that work under way is never done a second time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from esper.tamiyo.v1.policy_service_pb2 import PauseRequest
from services.chassis.idempotency import RequestCache


def request(name: str) -> PauseRequest:
    return PauseRequest(request_id=name)


class Work:
    """Counts its runs; each ends when it is let go."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        await self.go.wait()
        return run


def answered(text: str) -> Callable[[], Awaitable[str]]:
    async def work() -> str:
        return text

    return work


async def test_work_under_way_is_not_forgotten_however_many_others_come() -> None:
    cache, work = RequestCache(entries=1), Work()
    first = asyncio.ensure_future(cache.once("m", request("slow"), work))
    await asyncio.sleep(0)
    for number in range(5):
        assert await cache.once("m", request(f"other-{number}"), answered("x")) == "x"
    again = asyncio.ensure_future(cache.once("m", request("slow"), work))
    await asyncio.sleep(0)
    work.go.set()
    assert (await first, await again, work.runs) == (1, 1, 1)


async def test_the_answer_that_was_not_asked_for_longest_goes_first() -> None:
    cache = RequestCache(entries=2)
    await cache.once("m", request("a"), answered("first a"))
    await cache.once("m", request("b"), answered("first b"))
    assert await cache.once("m", request("a"), answered("second a")) == "first a"
    await cache.once("m", request("c"), answered("c"))
    assert await cache.once("m", request("a"), answered("second a")) == "first a"
    assert await cache.once("m", request("b"), answered("second b")) == "second b"


async def test_a_caller_that_hangs_up_leaves_the_answer_to_the_next() -> None:
    cache, work = RequestCache(), Work()
    gone = asyncio.ensure_future(cache.once("m", request("a"), work))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    work.go.set()
    assert (await cache.once("m", request("a"), work), work.runs) == (1, 1)


async def test_a_failure_may_be_repeated_at_once_by_everybody_who_waited() -> None:
    cache, go = RequestCache(), asyncio.Event()

    async def fails() -> str:
        await go.wait()
        raise ValueError("no")

    both = [asyncio.ensure_future(cache.once("m", request("a"), fails)) for _ in range(2)]
    await asyncio.sleep(0)
    go.set()
    assert [type(one) for one in await asyncio.gather(*both, return_exceptions=True)] == [ValueError, ValueError]
    assert await cache.once("m", request("a"), answered("yes")) == "yes"

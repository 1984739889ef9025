"""The link between a gateway and a training process, the gateway's side.

A training process dials in and stays; commands travel down, state travels up. What a gateway was told to pass on
stays in a bounded ledger until it is answered, and is sent again after a reconnect, so that a command survives the
death of either side of the stream (the receiver drops repeats by command id). A gateway's own death empties its
ledger: its caller asks again with the same id.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final, Generic, TypeVar

from services.chassis.errors import EsperError, Reason

_C = TypeVar("_C")
_M = TypeVar("_M")
_RETRY_SECONDS: Final = 0.5


class Link(Generic[_C]):
    """One attached training process and the commands on their way to it."""

    def __init__(self, run: str, incarnation: int) -> None:
        self.run = run
        self.incarnation = incarnation
        self._outbox: asyncio.Queue[_C] = asyncio.Queue()
        self._replaced = asyncio.Event()

    def put(self, command: _C) -> None:
        """Send a command; the ledger that holds it is what bounds this queue."""
        self._outbox.put_nowait(command)

    @property
    def waiting(self) -> int:
        """Commands put and not taken yet."""
        return self._outbox.qsize()

    @property
    def replaced(self) -> bool:
        """Whether a newer process of its run has attached."""
        return self._replaced.is_set()

    def replace(self) -> None:
        """End this link: a newer process of its run has attached."""
        self._replaced.set()

    async def commands(self, draining: asyncio.Event, ended: asyncio.Future[None]) -> AsyncGenerator[_C, None]:
        """Commands as they come, until the link is replaced, the server drains or the reading side has ended."""
        stops: list[asyncio.Future[Any]] = [asyncio.ensure_future(event.wait()) for event in (draining, self._replaced)]
        coming = asyncio.ensure_future(self._outbox.get())
        try:
            while True:
                events: list[asyncio.Future[Any]] = [coming, ended, *stops]
                done, _ = await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
                if done - {coming}:  # what was on its way is in the ledger, for whoever attaches next
                    return
                yield coming.result()
                coming = asyncio.ensure_future(self._outbox.get())
        finally:
            for pending in (*stops, coming):
                pending.cancel()


class LinkRegistry(Generic[_C]):
    """Which runs are attached, and the commands each has not answered yet. For one event loop.

    Args:
        limit: commands of a run that may wait for their answer; one more is COMMAND_QUEUE_FULL.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._links: dict[str, Link[_C]] = {}
        self._unanswered: dict[str, dict[str, _C]] = {}
        self._withdrawn: dict[str, dict[str, _C]] = {}
        self._incarnations: dict[str, int] = {}

    def attached(self, run: str) -> bool:
        """Whether a training process of the run is attached now."""
        return run in self._links

    def attach(self, run: str, incarnation: int) -> Link[_C]:
        """A link for a process that dialled in; an older one of the run is ended.

        Raises:
            EsperError: RUN_ALREADY_ATTACHED when a newer process of the run has attached before.
        """
        newest = self._incarnations.get(run)
        if newest is not None and incarnation < newest:
            raise EsperError(
                f"{run}: process {newest} of this run has attached, this is the older {incarnation}",
                reason=Reason.RUN_ALREADY_ATTACHED,
                metadata={"run": run, "incarnation": str(newest)},
            )
        if (older := self._links.get(run)) is not None:
            older.replace()
        link: Link[_C] = Link(run, incarnation)
        self._links[run] = link
        self._incarnations[run] = incarnation
        for command in (*self._unanswered.get(run, {}).values(), *self._withdrawn.get(run, {}).values()):
            link.put(command)
        return link

    def detach(self, link: Link[_C]) -> bool:
        """The stream of ``link`` is over; whether its run is unattached now."""
        if self._links.get(link.run) is not link:
            return False
        del self._links[link.run]
        return True

    def send(self, run: str, command_id: str, command: _C) -> None:
        """Pass a command on, now or when the run attaches again.

        Raises:
            EsperError: COMMAND_QUEUE_FULL.
        """
        waiting = self._unanswered.setdefault(run, {})
        if len(waiting) >= self._limit:
            raise self._full(run)
        waiting[command_id] = command
        if (link := self._links.get(run)) is not None:
            link.put(command)

    def hint(self, run: str, command: _C) -> bool:
        """Pass on what need not arrive: it is not kept, and False when the run is not attached now.

        Raises:
            EsperError: COMMAND_QUEUE_FULL when the process is so far behind that as much as may wait already does.
        """
        link = self._links.get(run)
        if link is None:
            return False
        if link.waiting >= self._limit:
            raise self._full(run)
        link.put(command)
        return True

    def withdraw(self, run: str, command_id: str, withdrawal: _C) -> None:
        """Pass on ``withdrawal`` in place of the command that waits under ``command_id``, which is not sent again.

        It takes no room from commands and is repeated after a reconnect while that command is unanswered; of those that
        nobody answers (the process never got the command) as many are kept as commands may wait.
        """
        self._unanswered.get(run, {}).pop(command_id, None)
        withdrawn = self._withdrawn.setdefault(run, {})
        withdrawn[command_id] = withdrawal
        if len(withdrawn) > self._limit:
            del withdrawn[next(iter(withdrawn))]
        if (link := self._links.get(run)) is not None:
            link.put(withdrawal)

    def answered(self, run: str, command_id: str) -> None:
        """The training process answered a command: it need not be sent again."""
        for ledger in (self._unanswered, self._withdrawn):
            ledger.get(run, {}).pop(command_id, None)

    def _full(self, run: str) -> EsperError:
        return EsperError(
            f"{run}: {self._limit} commands wait for a safe point already",
            reason=Reason.COMMAND_QUEUE_FULL,
            retry_after=_RETRY_SECONDS,
        )


async def first_message(requests: AsyncIterator[_M], draining: asyncio.Event) -> _M | None:
    """The message a stream begins with, or ``None`` for a stream that ends without one.

    Raises:
        EsperError: DRAINING when the server drains before anything came.
    """
    coming, stop = asyncio.ensure_future(_next(requests)), asyncio.ensure_future(draining.wait())
    try:
        await asyncio.wait([coming, stop], return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise EsperError("the server is shutting down: connect again", reason=Reason.DRAINING)
        return coming.result()
    finally:
        coming.cancel()
        stop.cancel()


async def _next(requests: AsyncIterator[_M]) -> _M | None:
    return await anext(requests, None)


async def serve_link(
    requests: AsyncIterator[_M],
    link: Link[_C],
    registry: LinkRegistry[_C],
    handle: Callable[[_M], None],
    draining: asyncio.Event,
) -> AsyncGenerator[_C, None]:
    """Commands for the stream of ``link`` while ``handle`` gets what comes up; ends with either side.

    An error of ``handle`` ends the stream with that error. The link is detached in the end, and what an older process
    still says once a newer one has attached is dropped. Close it with ``aclosing``.
    """

    async def read() -> None:
        async for message in requests:
            if not link.replaced:
                handle(message)

    reader = asyncio.ensure_future(read())
    try:
        async with contextlib.aclosing(link.commands(draining, reader)) as commands:
            async for command in commands:
                yield command
        if reader.done():
            reader.result()
    finally:
        reader.cancel()
        registry.detach(link)

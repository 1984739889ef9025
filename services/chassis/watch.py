"""Watching resources: a snapshot, a bookmark, then changes by rising revision (as in etcd and Kubernetes)."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from esper.common.v1.common_pb2 import ChangeType
from services.chassis.errors import EsperError, Reason
from services.chassis.pagination import decode_offset, encode_token

_T = TypeVar("_T")
_HISTORY: Final = 1024
_QUEUE: Final = 1024
_HEARTBEAT_SECONDS: Final = 15.0


@dataclass(frozen=True, slots=True)
class WatchItem(Generic[_T]):
    """One message of a watch: ``item`` is ``None`` in a bookmark; ``token`` resumes after this message.

    Within the snapshot the token is empty: a watch that was cut there has to begin with a snapshot again.
    """

    change: ChangeType.ValueType
    item: _T | None
    revision: int
    token: str


@dataclass(frozen=True, slots=True)
class _Change(Generic[_T]):
    change: ChangeType.ValueType
    item: _T
    revision: int


class WatchHub(Generic[_T]):
    """Hands changes to watchers. For one event loop; every watcher has a bounded queue of its own.

    Args:
        history: changes kept for watchers that resume; an older token is RESUME_TOKEN_EXPIRED.
        queue: changes a watcher may lag behind before it is dropped with WATCHER_TOO_SLOW.
        heartbeat_seconds: a bookmark is sent after this long without a change.
    """

    def __init__(
        self, *, history: int = _HISTORY, queue: int = _QUEUE, heartbeat_seconds: float = _HEARTBEAT_SECONDS
    ) -> None:
        # Revisions of another process mean nothing here: the token names the process it came from.
        self._hub_id = secrets.token_hex(8)
        self._history: deque[_Change[_T]] = deque(maxlen=history)
        self._queue = queue
        self._heartbeat = heartbeat_seconds
        self._revision = 0
        self._watchers: set[_Watcher[_T]] = set()

    @property
    def revision(self) -> int:
        """Of the newest change; 0 before the first."""
        return self._revision

    @property
    def watchers(self) -> int:
        """Watches under way."""
        return len(self._watchers)

    def publish(self, item: _T, change: ChangeType.ValueType) -> int:
        """Tell all watchers; returns the change's revision."""
        self._revision += 1
        made = _Change(change, item, self._revision)
        self._history.append(made)
        for watcher in self._watchers:
            watcher.offer(made)
        return self._revision

    async def watch(
        self,
        *,
        snapshot: Callable[[], Iterable[_T]],
        draining: asyncio.Event,
        match: Callable[[_T], bool] = lambda item: True,
        resume_token: str | None = None,
    ) -> AsyncGenerator[WatchItem[_T], None]:
        """Snapshot and bookmark, or the changes since ``resume_token``; then changes until ``draining`` is set.

        Close it with ``aclosing``, so that a watcher that went away is forgotten at once.

        Args:
            snapshot: all resources as of now; called once, not when resuming.
            draining: ends the watch.
            match: which resources are told of.
            resume_token: of a message before.

        Raises:
            EsperError: RESUME_TOKEN_EXPIRED (also for a token of another process, or none at all), WATCHER_TOO_SLOW.
        """
        watcher: _Watcher[_T] = _Watcher(self._queue)
        # From here on no change is missed; those of the backlog are in the history or in the snapshot.
        backlog = self._since(resume_token) if resume_token else None
        start, existing = self._revision, [] if resume_token else [item for item in snapshot() if match(item)]
        self._watchers.add(watcher)
        try:
            for item in existing:
                yield WatchItem(ChangeType.CHANGE_TYPE_SNAPSHOT, item, start, "")
            if backlog is None:
                yield self._item(ChangeType.CHANGE_TYPE_BOOKMARK, None, start)
            for change in backlog or ():
                if match(change.item):
                    yield self._item(change.change, change.item, change.revision)
            seen, clock = start, asyncio.get_running_loop().time
            due = clock() + self._heartbeat
            while (got := await watcher.next(draining, due - clock())) is not _ENDED:
                if isinstance(got, _Change):
                    seen = got.revision
                    if match(got.item):
                        yield self._item(got.change, got.item, seen)
                        due = clock() + self._heartbeat
                        continue
                # Changes that do not match tell the watcher nothing: its token would grow old without a bookmark.
                if got is None or clock() >= due:
                    yield self._item(ChangeType.CHANGE_TYPE_BOOKMARK, None, seen)
                    due = clock() + self._heartbeat
        finally:
            self._watchers.discard(watcher)

    def _item(self, change: ChangeType.ValueType, item: _T | None, revision: int) -> WatchItem[_T]:
        return WatchItem(change, item, revision, encode_token({"hub": self._hub_id}, str(revision)))

    def _since(self, token: str) -> list[_Change[_T]]:
        try:
            after = decode_offset({"hub": self._hub_id}, token)
        except EsperError as error:
            raise _expired() from error
        if self._history and after < self._history[0].revision - 1:
            raise _expired()
        return [change for change in self._history if change.revision > after]


class _End:
    """What a watcher gets when its watch is over."""


_ENDED: Final = _End()


class _Watcher(Generic[_T]):
    """The queue of one watch."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[_Change[_T]] = deque()
        self._news = asyncio.Event()
        self._overrun = False

    def offer(self, change: _Change[_T]) -> None:
        if len(self._waiting) >= self._limit:
            self._overrun = True
        else:
            self._waiting.append(change)
        self._news.set()

    async def next(self, draining: asyncio.Event, heartbeat: float) -> _Change[_T] | _End | None:
        """The next change, ``None`` when a heartbeat is due, ``_ENDED`` on draining once nothing waits any more."""
        if not self._waiting and not self._overrun:
            await _first_of(self._news, draining, heartbeat)
        if self._overrun:
            raise EsperError(
                f"the watcher fell {self._limit} changes behind: resume from the last token and read faster",
                reason=Reason.WATCHER_TOO_SLOW,
            )
        if self._waiting:
            return self._waiting.popleft()
        return _ENDED if draining.is_set() else None


async def _first_of(news: asyncio.Event, draining: asyncio.Event, timeout: float) -> None:
    news.clear()
    waits = [asyncio.ensure_future(event.wait()) for event in (news, draining)]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _expired() -> EsperError:
    return EsperError(
        "resume_token: changes since it are no longer kept; watch without a token", reason=Reason.RESUME_TOKEN_EXPIRED
    )

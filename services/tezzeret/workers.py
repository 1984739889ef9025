"""The workers of a service and the threads that wait for them, so that the event loop never does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from services.tezzeret.worker import Worker, context

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")


class Workers:
    """``count`` workers that begin to load torch at once. Make it inside the running loop."""

    def __init__(self, count: int, memory_bytes: int) -> None:
        forkserver = context()
        self._all = [Worker(forkserver, memory_bytes) for _ in range(count)]
        self._threads = ThreadPoolExecutor(max_workers=count, thread_name_prefix="tezzeret-worker")
        self._warming = [self.call(worker.warm) for worker in self._all]

    def __iter__(self) -> Iterator[Worker]:
        """All workers."""
        return iter(self._all)

    def call(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        """Run something that waits for a worker in a thread of its own."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def warm(self) -> None:
        """Return when all workers have loaded what they need; one that could not start is tried again by its jobs."""
        for failure in await asyncio.gather(*self._warming, return_exceptions=True):
            if isinstance(failure, Exception):
                _LOG.warning("a worker did not start: %r", failure)

    async def close(self) -> None:
        """End the processes; whatever runs must have been cancelled before."""
        await asyncio.gather(*self._warming, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        for worker in self._all:
            worker.close()

"""Stages that protect a server: a cap on deadlines and a bound on calls under way."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

from services.chassis.errors import EsperError, Reason
from services.chassis.interceptors.calls import Call


class DeadlineCap:
    """Ends calls after ``limit`` seconds even if their client would wait longer, or for ever.

    A stream of answers without a deadline is left alone: watches and subscriptions live until their client leaves or
    the server drains.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Run the call inside the cap; raises EsperError (DEADLINE_EXCEEDED) when it fires."""
        endless_stream = call.streaming and call.remaining == math.inf
        if call.infrastructure or endless_stream or call.remaining <= self._limit:
            yield
            return
        timer = asyncio.timeout(self._limit)
        try:
            async with timer:
                yield
        except TimeoutError as error:
            if not timer.expired():
                raise  # the handler's own, and a bug of the handler
            raise EsperError(
                f"the call took longer than the {self._limit:g} s this server allows",
                reason=Reason.DEADLINE_EXCEEDED,
                metadata={"max_deadline_seconds": f"{self._limit:g}"},
            ) from error


class ConcurrencyLimit:
    """Refuses the call after ``limit`` calls under way, open streams included, with a time to come back."""

    #: Seconds a refused client is told to wait.
    RETRY_AFTER = 0.5

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active = 0

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Count the call; raises EsperError (RESOURCE_EXHAUSTED with RetryInfo) when there are too many."""
        if call.infrastructure:  # a busy server is not a dead one
            yield
            return
        if self._active >= self._limit:
            raise EsperError(
                f"{self._limit} calls are under way already (services.max_concurrent_rpcs)",
                reason=Reason.TOO_MANY_CALLS,
                metadata={"max_concurrent_rpcs": str(self._limit)},
                retry_after=self.RETRY_AFTER,
            )
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

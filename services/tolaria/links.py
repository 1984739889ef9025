"""The training process's end of a link to a gateway: state goes up, commands come down, for as long as it takes.

A gateway that was killed comes back knowing nothing: after every attachment the newest picture of everything is sent
again. Of each thing only the newest picture waits, so that what waits is bounded by what there is. For one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final

import grpc.aio
from google.protobuf.message import Message

_LOG: Final = logging.getLogger(__name__)
_BACKOFF_SECONDS: Final = (0.1, 2.0)


class GatewayLink:
    """One link.

    Args:
        name: Of the gateway, for the log.
        attach: Opens the stream: the stub's ``Attach``.
        hello: Makes the first message.
        receive: Called with each message of the gateway, attachment's acceptance included.
    """

    def __init__(
        self,
        name: str,
        attach: Callable[[AsyncIterator[Any]], Any],
        hello: Callable[[], Message],
        receive: Callable[[Any], None],
    ) -> None:
        self._name = name
        self._attach = attach
        self._hello = hello
        self._receive = receive
        self._pictures: dict[str, Message] = {}
        self._waiting: dict[str, Message] = {}
        self._changed = asyncio.Event()
        self._closing = False
        #: How often the gateway accepted an attachment.
        self.attachments = 0

    def show(self, key: str, message: Message) -> None:
        """Send ``message`` now and again after every attachment, until a newer one of the same ``key`` replaces it."""
        self._pictures[key] = message
        self.send(key, message)

    def send(self, key: str, message: Message) -> None:
        """Send ``message`` once; lost if the stream breaks now (the gateway asks again for what it misses)."""
        self._waiting[key] = message
        self._changed.set()

    def close(self) -> None:
        """Send what waits and end."""
        self._closing = True
        self._changed.set()

    async def run(self) -> None:
        """Attach, and attach again whenever the stream ends, until :meth:`close`."""
        pause = _BACKOFF_SECONDS[0]
        while not self._closing:
            before = self.attachments
            try:
                async for message in self._attach(self._outgoing()):
                    self.attachments += message.HasField("accepted")
                    self._receive(message)
            except grpc.aio.AioRpcError as error:
                _LOG.info("the link to %s was cut: %s %s", self._name, error.code().name, error.details())
            if not self._closing:
                pause = _BACKOFF_SECONDS[0] if self.attachments > before else min(_BACKOFF_SECONDS[1], 2 * pause)
                await asyncio.sleep(pause)

    async def _outgoing(self) -> AsyncGenerator[Message, None]:
        yield self._hello()
        self._waiting = {**self._pictures, **self._waiting}
        while True:
            while self._waiting:
                key = next(iter(self._waiting))
                yield self._waiting.pop(key)
            if self._closing:
                return
            self._changed.clear()
            await self._changed.wait()

"""Mutations that may be repeated: the same request id gives the same answer."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Any, Final, TypeVar, cast

from google.protobuf.message import Message

from services.chassis.errors import EsperError, Reason, required

_T = TypeVar("_T")
_DEFAULT_ENTRIES: Final = 10_000


def reused(request_id: str) -> EsperError:
    """For an id that came before, with other content."""
    return EsperError(
        f"request_id {request_id!r} was used for another request: choose a new one", reason=Reason.REQUEST_ID_REUSED
    )


def digest_of(message: Message) -> str:
    """SHA-256 of a message in deterministic serialisation, hex."""
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()


class RequestCache:
    """Answers by (method, request id), of one process. One event loop only.

    Beyond ``entries`` the answers that were not asked for longest go; work under way stays, however many there are.

    Two calls with one id at once run once. A failure is not kept, so that it may be tried again. Where an answer has
    to survive a restart the component keeps it itself.
    """

    def __init__(self, entries: int = _DEFAULT_ENTRIES) -> None:
        self._entries = entries
        self._answers: OrderedDict[tuple[str, str], tuple[str, asyncio.Future[Any]]] = OrderedDict()

    async def once(self, method: str, request: Message, work: Callable[[], Awaitable[_T]]) -> _T:
        """The answer to ``request``, made by ``work`` unless the same request was answered before.

        Args:
            method: name of the rpc.
            request: a message with a ``request_id``.
            work: makes the answer.

        Raises:
            EsperError: REQUIRED_FIELD without an id, REQUEST_ID_REUSED when it came with other content.
        """
        request_id: str = request.request_id  # type: ignore[attr-defined]  # every mutation has one; messages share no type that says so
        if not request_id:
            raise required("request_id")
        key, digest = (method, request_id), digest_of(request)
        if (known := self._answers.get(key)) is not None:
            if known[0] != digest:
                raise reused(request_id)
            self._answers.move_to_end(key)
            return cast(_T, await asyncio.shield(known[1]))
        answer = asyncio.ensure_future(_call(work))
        self._answers[key] = (digest, answer)
        answer.add_done_callback(lambda done: self._keep(key, done))
        # Shielded: a caller that hangs up must not undo the work for one that asks again.
        return await asyncio.shield(answer)

    def _keep(self, key: tuple[str, str], answer: asyncio.Future[Any]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            del self._answers[key]
            return
        # Done answers beyond the bound; what is under way would be done twice if it were asked for again.
        done = (known for known, (_, future) in self._answers.items() if future.done())
        for old in list(islice(done, max(0, len(self._answers) - self._entries))):
            del self._answers[old]


async def _call(work: Callable[[], Awaitable[_T]]) -> _T:
    return await work()

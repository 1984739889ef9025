"""One interceptor for the four kinds of calls.

A handler of grpc.aio comes in four kinds, and those that answer with a stream in two spellings (asynchronous generator,
or coroutine that calls ``context.write``). :class:`CallInterceptor` reduces them to one shape: a :class:`Call`, around
which the stages are entered, and which runs to its end inside them. Errors raised while a stream is iterated and
cancellations therefore pass through the stages like any other exception, and a generator is closed at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio

#: Health and reflection: never traced, never refused, logged only at debug.
_INFRASTRUCTURE: Final = "/grpc."


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """One call while it is served."""

    #: ``/package.Service/Method``.
    method: str
    context: grpc.aio.ServicerContext[Any, Any]
    #: Metadata of the call; of a key sent twice the last value.
    metadata: Mapping[str, str | bytes]
    #: Whether the answer is a stream.
    streaming: bool
    #: When the call arrived, ``time.monotonic()``.
    started: float
    #: Messages sent so far (generators only; handlers that write by themselves are not counted).
    responses: int = 0
    #: Called with the call when its first message of a stream has been sent.
    on_first_response: Callable[[], None] | None = None
    #: Status the client gets, once an error decided it.
    code: grpc.StatusCode | None = None
    #: ErrorInfo reason of that error.
    reason: str | None = None

    @property
    def infrastructure(self) -> bool:
        """Whether this is a health or reflection call."""
        return self.method.startswith(_INFRASTRUCTURE)

    def final_code(self, error: BaseException | None) -> grpc.StatusCode:
        """The status the client gets, given the exception that left the error mapping (None: none did).

        A cancelled handler is either out of time or left by its client.
        """
        if self.code is not None:
            return self.code
        if error is None or isinstance(error, grpc.aio.AbortError):
            # Set by context.abort or set_code; grpc.aio keeps a plain number, 0 if nobody set it.
            return status_code(self.context.code())
        return grpc.StatusCode.DEADLINE_EXCEEDED if self.remaining <= 0 else grpc.StatusCode.CANCELLED

    @property
    def remaining(self) -> float:
        """Seconds until the client's deadline, infinite without one."""
        # The stubs deny that grpc.aio answers None for a call without deadline.
        seconds = cast("float | None", self.context.time_remaining())
        return math.inf if seconds is None else seconds


_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


def status_code(number: Any) -> grpc.StatusCode:
    """A status as grpc.aio hands it out (number, None for not set, or already a code) as a code."""
    if isinstance(number, grpc.StatusCode):
        return number
    return _BY_NUMBER.get(number or 0, grpc.StatusCode.UNKNOWN)


#: What is done around a call. It must let CancelledError and grpc.aio.AbortError pass.
Stage = Callable[[Call], contextlib.AbstractAsyncContextManager[None]]

_Behavior = Callable[[Any, Any], Any]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs every call inside ``stages``, the first being the outermost."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = tuple(stages)
        # One wrapped handler per method that exists: bounded by the contracts.
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Called by grpc for each call; an unknown method has no handler and stays UNIMPLEMENTED."""
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        name = "_".join(
            "stream" if flag else "unary" for flag in (handler.request_streaming, handler.response_streaming)
        )
        behavior: _Behavior = getattr(handler, name)
        around = self._streaming if handler.response_streaming else self._unary
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{name}_rpc_method_handler")
        return make(
            around(method, behavior),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _unary(self, method: str, behavior: _Behavior) -> _Behavior:
        async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with self._inside(method, context, streaming=False):
                return await behavior(request, context)

        return serve

    def _streaming(self, method: str, behavior: _Behavior) -> _Behavior:
        # A coroutine that writes, and no generator around the generator: grpc would leave that one to the garbage
        # collector when the client goes away during a write, and the stages would end who knows when and where.
        if not inspect.isasyncgenfunction(behavior):

            async def serve(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
                async with self._inside(method, context, streaming=True):
                    await behavior(request, context)

            return serve

        async def serve_generator(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with (
                self._inside(method, context, streaming=True) as call,
                contextlib.aclosing(behavior(request, context)) as responses,
            ):
                async for response in responses:
                    await context.write(response)
                    call.responses += 1
                    if call.responses == 1 and call.on_first_response is not None:
                        call.on_first_response()

        return serve_generator

    @contextlib.asynccontextmanager
    async def _inside(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], *, streaming: bool
    ) -> AsyncIterator[Call]:
        metadata = {str(key): value for key, value in context.invocation_metadata() or ()}
        call = Call(method, context, metadata, streaming, time.monotonic())
        async with contextlib.AsyncExitStack() as stack:
            for stage in self._stages:
                await stack.enter_async_context(stage(call))
            yield call

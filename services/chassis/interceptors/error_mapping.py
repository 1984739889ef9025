"""Stage: exceptions become statuses that a client in any language can act on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final, NoReturn

import grpc.aio

from services.chassis import logs
from services.chassis.errors import EsperError, Reason, to_rpc_status
from services.chassis.ids import new_id
from services.chassis.interceptors.calls import Call, status_code
from services.chassis.interceptors.ids import REQUEST_ID

_LOGGER: Final = logging.getLogger("esper.errors")


@contextlib.asynccontextmanager
async def stage(call: Call) -> AsyncIterator[None]:
    """EsperError becomes its rich status; anything unforeseen INTERNAL with an id that finds the log line.

    Cancellation passes: swallowing it leaks the call. So does ``context.abort``, which the handler meant.
    """
    try:
        yield
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except EsperError as error:
        await _abort(call, error)
    except Exception as error:  # the last line: whatever a handler raised must reach the client as a status
        error_id = new_id("err-")
        _LOGGER.exception("unforeseen error", extra={"fields": {"method": call.method, "error_id": error_id}})
        opaque = EsperError(
            f"internal error; the server's log has it under {error_id}",
            reason=Reason.INTERNAL,
            metadata={"error_id": error_id},
        )
        opaque.__cause__ = error
        await _abort(call, opaque)


async def _abort(call: Call, error: EsperError) -> NoReturn:
    status = to_rpc_status(error)
    call.code = status_code(status.code)
    call.reason = error.reason.value
    # abort replaces the trailing metadata: the request id must be put in again.
    trailing = (*status.trailing_metadata, (REQUEST_ID, logs.request_id.get() or ""))
    await call.context.abort(call.code, status.details, trailing)

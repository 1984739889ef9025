"""Stage: one log line per call, when it has ended."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from services.chassis.interceptors.calls import Call

_LOGGER: Final = logging.getLogger("esper.access")


@contextlib.asynccontextmanager
async def stage(call: Call) -> AsyncIterator[None]:
    """Log method, status, reason, duration (milliseconds), peer and messages sent; health and reflection at debug."""
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        level = logging.DEBUG if call.infrastructure else logging.INFO
        if _LOGGER.isEnabledFor(level):
            fields: dict[str, Any] = {
                "method": call.method,
                "code": call.final_code(failure).name,
                "duration_ms": round((time.monotonic() - call.started) * 1e3, 3),
                "peer": call.context.peer(),
            }
            if call.reason is not None:
                fields["reason"] = call.reason
            if call.streaming:
                fields["responses"] = call.responses
            _LOGGER.log(level, "call", extra={"fields": fields})

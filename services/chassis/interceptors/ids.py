"""Stage: the ids a call carries, put where logs, spans and further calls find them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Final

from services.chassis import logs
from services.chassis.ids import new_id
from services.chassis.interceptors.calls import Call

#: Metadata key of the request id: sent by clients or made here, and sent back.
REQUEST_ID: Final = "x-esper-request-id"
#: Metadata key of the run a call belongs to.
RUN_ID: Final = "x-esper-run"

# Ids end up in logs and metadata: anything else than printable ASCII of sensible length is not taken over.
_ACCEPTABLE: Final = re.compile(r"[\x21-\x7e]{1,128}")


@contextlib.asynccontextmanager
async def stage(call: Call) -> AsyncIterator[None]:
    """Set the request and run ids of the call and send the request id back in the trailing metadata."""
    # grpc.aio serves each call in a task of its own, so nothing needs to be set back.
    request_id = _acceptable(call.metadata.get(REQUEST_ID)) or new_id("req-")
    logs.request_id.set(request_id)
    logs.run_id.set(_acceptable(call.metadata.get(RUN_ID)))
    call.context.set_trailing_metadata(((REQUEST_ID, request_id),))
    yield


def _acceptable(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) and _ACCEPTABLE.fullmatch(value) else None

"""Logging of a process: JSON lines on standard error, with the ids of the call and the span they belong to.

The supervisor writes a child's standard error to ``<run_dir>/logs/<service>.log`` and bounds it
(:mod:`services.chassis.log_files`). A line has at least ``time`` (UTC, RFC 3339), ``level``, ``service``, ``logger``
and ``message``; inside a call ``request_id`` and ``run``, inside a span ``trace_id`` and ``span_id``. Fields given as
``extra={"fields": {...}}`` are added as they are.
"""

from __future__ import annotations

import contextvars
import datetime as dt
import json
import logging
import sys
from typing import Any, Final, Literal, TextIO

from opentelemetry import trace

#: Id of the request being served or made; set by the server interceptor, sent on by the channels.
request_id: Final[contextvars.ContextVar[str | None]] = contextvars.ContextVar("esper_request_id", default=None)
#: Id of the run that the work belongs to.
run_id: Final[contextvars.ContextVar[str | None]] = contextvars.ContextVar("esper_run_id", default=None)

Level = Literal["debug", "info", "warning", "error"]


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record as one JSON object."""
        moment = dt.datetime.fromtimestamp(record.created, dt.UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := request_id.get()) is not None:
            line["request_id"] = request
        if (run := run_id.get()) is not None:
            line["run"] = run
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line["trace_id"] = f"{span.trace_id:032x}"
            line["span_id"] = f"{span.span_id:016x}"
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # default=str: a log line must never fail because of the type of a field.
        return json.dumps(line, default=str)


def setup(service: str, level: Level, stream: TextIO | None = None) -> None:
    """Send the root logger's lines to ``stream`` (standard error by default), replacing earlier handlers."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Libraries speak up from warnings on; at debug their chatter would hide ours.
    for noisy in ("asyncio", "kafka", "sqlalchemy", "opentelemetry"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

"""What Oona raises; the reasons themselves are in the one table of :mod:`services.chassis.errors`."""

from __future__ import annotations

from services.chassis.errors import EsperError, FieldViolation, Reason


class LogCorruptError(Exception):
    """A segment of the embedded log is damaged elsewhere than at its torn end; nothing is dropped silently."""


def bus_unavailable(why: str) -> EsperError:
    """The log or the broker cannot be reached; the caller tries again."""
    return EsperError(f"The event bus is not available: {why}", reason=Reason.BUS_UNAVAILABLE, retry_after=0.2)


def bus_overloaded(what: str) -> EsperError:
    """A bound is reached; the caller waits and tries again."""
    return EsperError(f"The event bus is overloaded: {what}", reason=Reason.BUS_OVERLOADED, retry_after=0.1)


def topic_not_found(name: str) -> EsperError:
    """There is no topic of this bare name."""
    return EsperError(
        f"There is no topic topics/{name}; ListTopics shows those that exist.",
        reason=Reason.TOPIC_NOT_FOUND,
        metadata={"topic": f"topics/{name}"},
    )


def topic_exists(name: str) -> EsperError:
    """There is another topic of this bare name."""
    return EsperError(
        f"topics/{name} exists already with other payload types, partitions or retention.",
        reason=Reason.TOPIC_EXISTS,
        metadata={"topic": f"topics/{name}"},
    )


def draining() -> EsperError:
    """The server is going down; the caller opens its stream again."""
    return EsperError("The server is draining; subscribe again.", reason=Reason.DRAINING, retry_after=0.2)


def invalid_fields(violations: list[FieldViolation]) -> EsperError:
    """All that is wrong with a request, at once."""
    text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations[:5])
    if len(violations) > 5:
        text += f"; and {len(violations) - 5} more"
    return EsperError(text, reason=Reason.INVALID_FIELD, violations=violations)

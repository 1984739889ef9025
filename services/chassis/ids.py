"""Identifiers and resource names."""

from __future__ import annotations

import re
import secrets
import time
from functools import cache
from typing import Final

from services.chassis.errors import EsperError, FieldViolation, Reason, required

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_TIME_DIGITS: Final = 10
_RANDOM_DIGITS: Final = 12
_VARIABLE: Final = re.compile(r"\{(\w+)\}")


def new_id(prefix: str = "") -> str:
    """A new identifier: ``prefix``, 10 digits of time (milliseconds since 1970), 12 of chance, lower case.

    Identifiers sort by the time they were made and are unique without asking anybody (60 random bits; Crockford's
    base 32, which leaves out letters that look like digits).
    """
    return prefix + _digits(time.time_ns() // 1_000_000, _TIME_DIGITS) + _digits(secrets.randbits(60), _RANDOM_DIGITS)


def _digits(number: int, count: int) -> str:
    return "".join(_ALPHABET[(number >> (5 * place)) & 31] for place in reversed(range(count)))


@cache
def _matcher(pattern: str) -> re.Pattern[str]:
    """``runs/{r}/slots/{slot}`` as an expression; a variable is one segment, which may hold colons and dots."""
    parts = [r"([^/\s]+)" if _VARIABLE.fullmatch(part) else re.escape(part) for part in pattern.split("/")]
    return re.compile("/".join(parts))


def parse_name(pattern: str, name: str, *, field: str = "name") -> tuple[str, ...]:
    """The variable segments of a resource name: ``parse_name("runs/{r}/seeds/{s}", "runs/a/seeds/b") == ("a", "b")``.

    Args:
        pattern: the form, with ``{variables}`` as whole segments.
        name: the name to take apart.
        field: path of the request's field that holds it, for the error.

    Raises:
        EsperError: REQUIRED_FIELD when it is empty, INVALID_NAME when it has another form.
    """
    if not name:
        raise required(field)
    found = _matcher(pattern).fullmatch(name)
    if found is None:
        why = f"{name!r} does not have the form {pattern}"
        raise EsperError(
            f"{field}: {why}",
            reason=Reason.INVALID_NAME,
            metadata={"field": field, "pattern": pattern},
            violations=[FieldViolation(field, why)],
        )
    return found.groups()

"""Pages of lists (AIP-158): opaque tokens that are bound to the filter they were made for."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Final

from services.chassis.errors import EsperError, Reason, invalid

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000
_MOST_DIGITS: Final = 19


def page_size_of(requested: int, *, default: int = DEFAULT_PAGE_SIZE, maximum: int = MAX_PAGE_SIZE) -> int:
    """The size of a page: ``default`` for 0, at most ``maximum``.

    Raises:
        EsperError: INVALID_FIELD for a negative size.
    """
    if requested < 0:
        raise invalid("page_size", f"{requested} is negative", f"give 0 for {default}, or 1 to {maximum}")
    return min(requested or default, maximum)


def encode_token(filter_fields: Mapping[str, object], cursor: str) -> str:
    """A token that continues a list with these filter fields at ``cursor``."""
    return base64.urlsafe_b64encode(json.dumps([_mark(filter_fields), cursor]).encode()).decode()


def decode_token(filter_fields: Mapping[str, object], token: str) -> str:
    """The cursor in a token.

    Raises:
        EsperError: INVALID_PAGE_TOKEN when it is none, or was made for other filter fields.
    """
    try:
        mark, cursor = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _bad_token("it is none that a list gave") from error
    if mark != _mark(filter_fields) or not isinstance(cursor, str):
        raise _bad_token("it was given for another list or filter")
    return cursor


def decode_offset(filter_fields: Mapping[str, object], token: str) -> int:
    """The cursor in a token as a whole number from 0; 0 for no token.

    Raises:
        EsperError: INVALID_PAGE_TOKEN.
    """
    if not token:
        return 0
    cursor = decode_token(filter_fields, token)
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) < _MOST_DIGITS):
        raise _bad_token("it is none that a list gave")
    return int(cursor)


def _mark(filter_fields: Mapping[str, object]) -> str:
    content = json.dumps(filter_fields, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _bad_token(why: str) -> EsperError:
    return EsperError(f"page_token: {why}; start from the first page", reason=Reason.INVALID_PAGE_TOKEN)

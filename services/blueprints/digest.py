"""One spelling of JSON and one hash, so that equal content has one identity."""

from __future__ import annotations

import hashlib
import json
from typing import TypeAlias

JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"

DIGEST_BYTES = 32
"""Length of a SHA-256 (FIPS 180-4)."""

RESOURCE_ID_CHARACTERS = 32
"""Hex characters of a digest that make a resource id: 128 bits, far beyond any chance of a collision."""


def canonical_json(value: JsonValue) -> bytes:
    """The one spelling of ``value``: sorted keys, no spaces, UTF-8, shortest floats that round-trip.

    Raises:
        ValueError: It holds NaN or an infinity, which JSON has no word for.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> bytes:
    """SHA-256 of ``data``, 32 raw bytes."""
    return hashlib.sha256(data).digest()


def resource_id(digest: bytes) -> str:
    """The id under which content with this digest is found: its first 32 hex characters."""
    return digest.hex()[:RESOURCE_ID_CHARACTERS]

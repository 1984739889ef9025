"""What goes between the training process and the process of its mesh: JSON with one binary part. Torch-free, no gRPC.

A frame is the length of its JSON and that of its binary part, four bytes each in network order, and the two.
Both ends are ours and of one version; nothing that comes from outside a run arrives here unpacked.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

_LENGTHS: Final = struct.Struct("!II")
#: One object, and a message of the contracts in its wire format or nothing.
Frame = tuple[dict[str, Any], bytes]


def pack(header: Mapping[str, Any], body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def unpack(stream: BinaryIO) -> Iterator[Frame]:
    """The frames of ``stream`` as they arrive, until it ends; one that was cut off is left out."""
    # Reset: the other end was killed with something unread.
    with contextlib.suppress(ConnectionResetError):
        while len(lengths := stream.read(_LENGTHS.size)) == _LENGTHS.size:
            text_length, body_length = _LENGTHS.unpack(lengths)
            text, body = stream.read(text_length), stream.read(body_length)
            if len(text) + len(body) < text_length + body_length:
                return
            yield json.loads(text), body


def split(read: bytearray) -> Iterator[dict[str, Any]]:
    """Take the whole frames out of ``read``, one by one; the beginning of the next one stays. Without binary parts."""
    while len(read) >= _LENGTHS.size:
        text_length, body_length = _LENGTHS.unpack_from(read)
        end = _LENGTHS.size + text_length
        if len(read) < end + body_length:
            return
        text = bytes(read[_LENGTHS.size : end])
        del read[: end + body_length]
        yield json.loads(text)

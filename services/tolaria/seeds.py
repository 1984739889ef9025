"""One root seed, many generators: every use draws from a stream of its own.

Initialisation, data order, augmentation, validation split and controller never share a generator, so that what one of
them draws cannot shift another (GROWTH, section 5: a shared generator made the arms of an experiment unpaired).
"""

from __future__ import annotations

import hashlib


def derive(root: int, *path: str | int) -> int:
    """The 63-bit seed of the stream that ``path`` names under ``root``; equal arguments give equal seeds."""
    text = "/".join([str(root), *(str(part) for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

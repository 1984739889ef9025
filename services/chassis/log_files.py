"""Log files that stay bounded although their writers never open them again.

A process of a run writes its log through the descriptor it was started with, and so do its children, the libraries in
it and the interpreter that dies: no logging handler in it could move them all to a new file. So the supervisor does
what logrotate calls ``copytruncate``: it copies a log that has become too long aside and cuts it to nothing; the
descriptor, opened for appending, goes on at the new end. A line that is written between the last byte copied and the
cut (microseconds) is lost.
"""

from __future__ import annotations

import contextlib
import shutil
from itertools import pairwise
from pathlib import Path


class LogFiles:
    """The logs (``*.log``) of a folder: ``files`` for each process, set aside when longer than ``max_bytes``.

    ``NAME.log`` is being written, ``NAME.log.1`` is what came before it, ``NAME.log.2`` before that. A log that has
    grown to more than twice ``max_bytes`` between two calls of :meth:`rotate` loses its oldest lines.
    """

    def __init__(self, folder: Path, *, max_bytes: int, files: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._files = files

    def rotate(self) -> None:
        """Set aside what has become too long. Never raises: where there is no room for a copy, the log stays whole."""
        for log in self._folder.glob("*.log"):
            with contextlib.suppress(OSError):  # no room, or the run folder is being removed
                if log.stat().st_size > self._max_bytes:
                    self._set_aside(log)

    def _set_aside(self, log: Path) -> None:
        copy = log.with_name(f"{log.name}.part")
        try:
            with log.open("rb+") as written, copy.open("wb") as target:
                if (surplus := log.stat().st_size - 2 * self._max_bytes) > 0:
                    written.seek(surplus)
                    written.readline()  # the rest of a line that is cut
                shutil.copyfileobj(written, target)
                target.flush()  # a full disk says so before the log is cut
                written.truncate(0)
            parts = [log.with_name(f"{log.name}.{number}") for number in range(self._files - 1, 0, -1)]
            for older, newer in pairwise(parts):
                if newer.exists():
                    newer.replace(older)
            if parts:
                copy.replace(parts[-1])
        finally:
            copy.unlink(missing_ok=True)

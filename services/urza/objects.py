"""The port to the store of artifacts, and its embedded implementation: a folder.

The other one is :mod:`services.urza.s3_objects`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from services.chassis.files import storage_error, sync_folder


class ObjectStore(Protocol):
    """Immutable bytes by key. Blocking; safe to call from several threads and processes.

    All methods raise EsperError: STORAGE_FULL, STORAGE_FAILED.
    """

    def put(self, key: str, source: Path) -> None:
        """Keep what is in the file under ``key``, whole or not at all, durably; replaces what was there."""

    def size(self, key: str) -> int | None:
        """Bytes under ``key``; ``None`` if there is nothing."""

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Bytes from ``offset``: ``length`` of them, or those up to the end."""


class DirectoryObjects:
    """Objects as files of a folder: ``<first two characters>/<key>``."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if it is not there."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, source: Path) -> None:
        """See :class:`ObjectStore`: a copy beside the target, made durable, then one rename."""
        target = self._path(key)
        try:
            target.parent.mkdir(exist_ok=True)
            descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=".put-")
            try:
                with os.fdopen(descriptor, "wb") as copy, source.open("rb") as original:
                    shutil.copyfileobj(original, copy, 2**20)
                    copy.flush()
                    os.fsync(copy.fileno())
                Path(beside).replace(target)
            except BaseException:
                Path(beside).unlink(missing_ok=True)
                raise
            sync_folder(target.parent)
        except OSError as error:
            raise storage_error(target, error) from error

    def size(self, key: str) -> int | None:
        """See :class:`ObjectStore`."""
        try:
            return self._path(key).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """See :class:`ObjectStore`."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise storage_error(path, error) from error

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

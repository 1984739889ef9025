"""Uploads under way: bytes that have arrived of artifacts that are not whole yet.

What was appended survives a ``kill -9`` of the service, so an upload goes on where it broke off. Files are locked
(``flock``) while they are written: two writers of one artifact, even in two processes, cannot mix their bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from services.chassis.errors import EsperError, Reason
from services.chassis.files import storage_error

MAX_PARTIALS = 64
"""Unfinished uploads kept; with the largest artifact they bound the room they take."""
KEEP_SECONDS = 24 * 3600.0
"""An unfinished upload that nobody goes on with is dropped after this."""
_SUFFIX = ".part"


class Staging:
    """The unfinished uploads of a folder. Blocking; safe to call from several threads and processes."""

    def __init__(self, folder: Path, *, max_partials: int = MAX_PARTIALS, keep_seconds: float = KEEP_SECONDS) -> None:
        """Makes the folder if it is not there and drops what is too old.

        Args:
            folder: Where they are kept; a local file system.
            max_partials: Unfinished uploads kept at once.
            keep_seconds: Age at which one is dropped.
        """
        self._folder = folder
        self._max_partials = max_partials
        self._keep_seconds = keep_seconds
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_old()

    def committed_bytes(self, digest: bytes) -> int:
        """Bytes that have arrived of the artifact with this digest."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def open(self, digest: bytes, size: int, offset: int) -> Upload:
        """Go on with an upload, or begin one; what is there beyond ``offset`` is dropped.

        Args:
            digest: SHA-256 of the whole artifact.
            size: Its size, bytes.
            offset: Where the next byte belongs.

        Raises:
            EsperError: UPLOAD_OFFSET_MISMATCH (fewer bytes have arrived), UPLOAD_IN_PROGRESS, TOO_MANY_UPLOADS,
                STORAGE_FULL, STORAGE_FAILED.
        """
        path = self._path(digest)
        if not path.exists() and len(self._partials()) >= self._max_partials:
            self._drop_old()
            if len(self._partials()) >= self._max_partials:
                raise EsperError(
                    f"{self._max_partials} unfinished uploads are kept, no more: finish one or try again later",
                    reason=Reason.TOO_MANY_UPLOADS,
                    retry_after=60.0,
                )
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise storage_error(path, error) from error
        upload = Upload(path, descriptor, size)
        try:
            upload.begin(offset)
        except BaseException:
            upload.close()
            raise
        return upload

    def _partials(self) -> list[Path]:
        return list(self._folder.glob(f"*{_SUFFIX}"))

    def _drop_old(self) -> None:
        horizon = time.time() - self._keep_seconds
        for path in self._partials():
            try:
                if path.stat().st_mtime < horizon:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process dropped or finished it first

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest.hex()}{_SUFFIX}"


class Upload:
    """One unfinished upload, locked for this writer until closed."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        """For :meth:`Staging.open`, which also calls :meth:`begin`."""
        self.path = path
        self.size = size
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._busy = threading.Lock()
        self._closing = False
        self.received = 0

    def begin(self, offset: int) -> None:
        """Lock it and drop what is beyond ``offset``; raises as :meth:`Staging.open` does."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_progress() from None
        state = os.fstat(self._file.fileno())
        if state.st_nlink == 0:
            raise _in_progress()  # who held the lock before us has just finished or dropped it
        arrived = state.st_size
        if offset > arrived:
            if arrived == 0:
                self.discard()
            raise offset_mismatch(f"the upload goes on at {arrived}, not at {offset}", arrived)
        self._file.truncate(offset)
        self._file.seek(offset)
        self.received = offset

    @property
    def complete(self) -> bool:
        """Whether all bytes have arrived."""
        return self.received == self.size

    def append(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            EsperError: UPLOAD_OFFSET_MISMATCH (more than the size), STORAGE_FULL, STORAGE_FAILED.
        """
        if self.received + len(data) > self.size:
            raise offset_mismatch(f"the chunks go beyond the {self.size} bytes of the header", self.received)
        rest = memoryview(data)
        with self.working():
            try:
                while rest:
                    written = self._file.write(rest)
                    self.received += written
                    rest = rest[written:]
            except OSError as error:
                raise storage_error(self.path, error) from error

    def read(self) -> bytes:
        """All that has arrived."""
        return self.path.read_bytes()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep it open for the length of a piece of work: a :meth:`close` meanwhile takes effect at its end."""
        with self._busy:
            yield
        if self._closing:
            self.close()

    def discard(self) -> None:
        """Drop it: it was committed, or can never be."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of it, at once or at the end of the work under way; what has arrived stays. Does not block."""
        self._closing = True
        if self._busy.acquire(blocking=False):
            try:
                self._file.close()
            finally:
                self._busy.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _in_progress() -> EsperError:
    return EsperError("somebody else uploads this artifact now", reason=Reason.UPLOAD_IN_PROGRESS, retry_after=1.0)


def offset_mismatch(message: str, committed: int) -> EsperError:
    """UPLOAD_OFFSET_MISMATCH with the offset at which to go on."""
    return EsperError(
        f"{message}; resume at {committed}",
        reason=Reason.UPLOAD_OFFSET_MISMATCH,
        metadata={"committed_bytes": str(committed)},
    )

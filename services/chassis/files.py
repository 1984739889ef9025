"""Files that survive a crash: written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from services.chassis.errors import EsperError, Reason

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def storage_error(path: Path, error: OSError) -> EsperError:
    """STORAGE_FULL or STORAGE_FAILED for what the operating system said of ``path``."""
    if error.errno in _NO_ROOM:
        return EsperError(f"{path}: no room on the disk; free some and try again", reason=Reason.STORAGE_FULL)
    return EsperError(f"{path}: {error.strerror or error}", reason=Reason.STORAGE_FAILED, metadata={"path": str(path)})


def sync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str, *, fsync: bool = True, mode: int = 0o644) -> None:
    """Put ``content`` at ``path`` in one rename: readers see the old file or the new one, also after a crash.

    Args:
        path: target; its folder exists.
        content: text is written as UTF-8.
        fsync: whether it must survive a power cut, not just a kill.
        mode: rights of the file.

    Raises:
        EsperError: STORAGE_FULL or STORAGE_FAILED; the old file is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                if fsync:
                    file.flush()
                    os.fsync(file.fileno())
            Path(beside).replace(path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
        if fsync:
            sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


def append_line(path: Path, record: Any, *, fsync: bool = False) -> None:
    """Append ``record`` as one line of JSON; a line that a crash has torn is ended first, so that only it is lost.

    Raises:
        EsperError: STORAGE_FULL or STORAGE_FAILED; lines before it are intact, nothing of it stays.
    """
    line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
    try:
        with path.open("a+b", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            if before and os.pread(file.fileno(), 1, before - 1) != b"\n":
                line = b"\n" + line
            try:
                while line:
                    line = line[file.write(line) :]
                if fsync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise storage_error(path, error) from error

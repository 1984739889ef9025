"""SQLite as the embedded database of services: durable, and shared by processes that open it at the same moment."""

from __future__ import annotations

import sqlite3
import time
from typing import Any, Final

#: How long opening waits for another process that is opening the same database, seconds.
PATIENCE_SECONDS: Final = 10.0
_LOOK_SECONDS: Final = 0.01
_PRIMARY_CODE: Final = 0xFF


def make_durable(connection: Any, *, patience: float = PATIENCE_SECONDS) -> None:
    """Write-ahead log with a sync at every commit: readers never wait, and what was answered survives a kill.

    The switch to the log needs the database for itself and, where another connection is about to do the same, fails at
    once whatever the busy timeout is (sqlite.org/wal.html): so it is tried again here.

    Args:
        connection: of the driver ``sqlite3``, outside of a transaction.
        patience: seconds to keep trying.

    Raises:
        sqlite3.OperationalError: the database is still locked after that, or cannot be used at all.
    """
    deadline = time.monotonic() + patience
    cursor = connection.cursor()
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & _PRIMARY_CODE in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_SECONDS)  # the lock is another process's: nothing tells us when it goes
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()

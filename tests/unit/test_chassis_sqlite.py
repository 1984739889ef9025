"""Opening one SQLite database from several sides at the same moment."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.chassis.sqlite import make_durable


def test_a_database_that_another_is_opening_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "d.sqlite"
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    ours = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        make_durable(ours, patience=0)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(make_durable, ours)
        with pytest.raises(TimeoutError):
            opening.result(0.1)  # it waits: the lock is held
        holder.execute("ROLLBACK")
        opening.result(10)
    assert ours.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert ours.execute("PRAGMA synchronous").fetchone() == (2,)
    holder.close()
    ours.close()


def test_what_is_no_database_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "d.sqlite").write_bytes(b"no database at all, but long enough to have a header" * 40)
    connection = sqlite3.connect(tmp_path / "d.sqlite")
    with pytest.raises(sqlite3.DatabaseError, match="not a database"):
        make_durable(connection)
    connection.close()
    (tmp_path / "read-only").touch()
    nowhere = sqlite3.connect(f"file:{tmp_path / 'read-only'}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        make_durable(nowhere)
    nowhere.close()


def test_many_may_open_a_new_database_at_once(tmp_path: Path) -> None:
    def open_one(path: Path) -> str:
        connection = sqlite3.connect(path)
        make_durable(connection)
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        connection.close()
        return str(mode)

    for number in range(20):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(open_one, [tmp_path / f"{number}.sqlite"] * 8)) == {"wal"}

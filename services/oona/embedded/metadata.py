"""Topics and consumer offsets of the embedded bus, in SQLite. Calls block: they belong to the disk thread."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

from services.oona.bus import TopicPartition
from services.oona.topics import TopicSpec

_SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, spec TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS offsets (
    consumer_group TEXT NOT NULL, topic TEXT NOT NULL, part INTEGER NOT NULL, position INTEGER NOT NULL,
    PRIMARY KEY (consumer_group, topic, part)
) WITHOUT ROWID;
"""


class Metadata:
    """The database.

    In write-ahead mode a commit survives kill -9 of the process; a power cut may lose the last offsets, whose events
    are then delivered again.

    Raises:
        sqlite3.Error: from every method, where the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.executescript(_SCHEMA)

    def topics(self) -> list[TopicSpec]:
        """All topics, by name."""
        rows = self._connection.execute("SELECT name, spec FROM topics ORDER BY name").fetchall()
        found = []
        for name, text in rows:
            fields = json.loads(text)
            fields["payload_types"] = tuple(fields["payload_types"])
            found.append(TopicSpec(name=name, **fields))
        return found

    def add_topics(self, specs: Sequence[TopicSpec]) -> None:
        """Stores topics; one whose name exists stays as it is."""
        rows = [
            (
                spec.name,
                json.dumps(
                    {
                        "payload_types": spec.payload_types,
                        "partitions": spec.partitions,
                        "retention_bytes": spec.retention_bytes,
                        "created_ns": spec.created_ns,
                    }
                ),
            )
            for spec in specs
        ]
        self._transact("INSERT OR IGNORE INTO topics VALUES (?, ?)", rows)

    def offsets(self) -> dict[str, dict[TopicPartition, int]]:
        """What every group has committed."""
        groups: dict[str, dict[TopicPartition, int]] = {}
        rows = self._connection.execute("SELECT consumer_group, topic, part, position FROM offsets").fetchall()
        for group, topic, partition, position in rows:
            groups.setdefault(group, {})[TopicPartition(topic, partition)] = position
        return groups

    def store_offsets(self, offsets: Mapping[tuple[str, TopicPartition], int]) -> None:
        """Stores what groups have committed."""
        rows = [(group, source.topic, source.partition, position) for (group, source), position in offsets.items()]
        self._transact("INSERT OR REPLACE INTO offsets VALUES (?, ?, ?, ?)", rows)

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def _transact(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.Error:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

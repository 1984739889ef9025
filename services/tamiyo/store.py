"""Where Tamiyo keeps policy versions, decisions and outcomes: SQLite embedded, PostgreSQL by URL.

Records are JSON documents under a key; the few columns beside them are what queries need. Every write is
committed before its call returns, so an answer that was given survives kill -9.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import sqlalchemy as sa

Document: TypeAlias = Mapping[str, Any]

_METADATA: Final = sa.MetaData()
_POLICIES: Final = sa.Table(
    "policies",
    _METADATA,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("algorithm", sa.String, nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("active", sa.Boolean, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)
_DECISIONS: Final = sa.Table(
    "decisions",
    _METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("run", sa.String, nullable=False, index=True),
    sa.Column("request_id", sa.String, nullable=False, unique=True),
    sa.Column("request_digest", sa.String, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
)
_OUTCOMES: Final = sa.Table(
    "outcomes",
    _METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("request_id", sa.String, nullable=False, unique=True),
    sa.Column("document", sa.Text, nullable=False),
)
_SETTINGS: Final = sa.Table(
    "settings",
    _METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


def sqlite_url(folder: Path) -> str:
    """URL of the embedded database in ``folder``, which is made when it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'tamiyo.sqlite'}"


class Store:
    """The records of one Tamiyo. Not for use by two threads at once; calls block for a few milliseconds.

    ``decision_limit`` bounds the decisions kept: the oldest go first.
    """

    def __init__(self, url: str, *, decision_limit: int) -> None:
        self._engine = sa.create_engine(url)
        self._decision_limit = decision_limit
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", _durable)
        _METADATA.create_all(self._engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def add_policy(self, name: str, algorithm: str, version: int, active: bool, document: Document) -> None:
        """Keep a new policy version."""
        row = {"name": name, "algorithm": algorithm, "version": version, "active": active}
        with self._engine.begin() as connection:
            connection.execute(_POLICIES.insert().values(**row, document=json.dumps(document)))

    def policies(self) -> list[tuple[bool, dict[str, Any]]]:
        """(active, document) of every version, by algorithm and version."""
        query = sa.select(_POLICIES.c.active, _POLICIES.c.document).order_by(_POLICIES.c.algorithm, _POLICIES.c.version)
        with self._engine.connect() as connection:
            return [(bool(row.active), json.loads(row.document)) for row in connection.execute(query)]

    def activate(self, name: str, algorithm: str) -> None:
        """Make one version of the algorithm the active one, and no other."""
        with self._engine.begin() as connection:
            connection.execute(
                _POLICIES.update().where(_POLICIES.c.algorithm == algorithm).values(active=_POLICIES.c.name == name)
            )

    def add_decision(self, name: str, run: str, request_id: str, request_digest: str, document: Document) -> None:
        """Keep a decision; beyond the limit the oldest is forgotten."""
        row = {"name": name, "run": run, "request_id": request_id, "request_digest": request_digest}
        with self._engine.begin() as connection:
            made = connection.execute(_DECISIONS.insert().values(**row, document=json.dumps(document)))
            newest = made.inserted_primary_key[0] if made.inserted_primary_key else 0
            connection.execute(_DECISIONS.delete().where(_DECISIONS.c.sequence <= newest - self._decision_limit))

    def decision_of_request(self, request_id: str) -> tuple[str, dict[str, Any]] | None:
        """(request digest, document) of the decision a request made, or ``None``."""
        query = sa.select(_DECISIONS.c.request_digest, _DECISIONS.c.document).where(
            _DECISIONS.c.request_id == request_id
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else (row.request_digest, json.loads(row.document))

    def decision(self, name: str) -> dict[str, Any] | None:
        """A decision's document, or ``None``."""
        query = sa.select(_DECISIONS.c.document).where(_DECISIONS.c.name == name)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        return None if row is None else dict(json.loads(row.document))

    def decisions(self, run: str, before: int | None, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """(sequence, document), newest first, of one run or (empty) of all, older than ``before``."""
        query = sa.select(_DECISIONS.c.sequence, _DECISIONS.c.document).order_by(_DECISIONS.c.sequence.desc())
        if run:
            query = query.where(_DECISIONS.c.run == run)
        if before is not None:
            query = query.where(_DECISIONS.c.sequence < before)
        with self._engine.connect() as connection:
            return [(row.sequence, json.loads(row.document)) for row in connection.execute(query.limit(limit))]

    def add_outcome(self, request_id: str, document: Document) -> None:
        """Keep an outcome; the same request twice is one outcome."""
        known = sa.select(_OUTCOMES.c.sequence).where(_OUTCOMES.c.request_id == request_id)
        with self._engine.begin() as connection:
            if connection.execute(known).first() is None:
                connection.execute(_OUTCOMES.insert().values(request_id=request_id, document=json.dumps(document)))

    def outcomes(self) -> list[dict[str, Any]]:
        """All outcomes, oldest first."""
        query = sa.select(_OUTCOMES.c.document).order_by(_OUTCOMES.c.sequence)
        with self._engine.connect() as connection:
            return [json.loads(row.document) for row in connection.execute(query)]

    def outcome_count(self) -> int:
        """How many outcomes are kept."""
        with self._engine.connect() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(_OUTCOMES)).scalar_one())

    def setting(self, key: str) -> str | None:
        """A setting's value, or ``None``."""
        query = sa.select(_SETTINGS.c.value).where(_SETTINGS.c.key == key)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one_or_none()

    def set_setting(self, key: str, value: str | None) -> None:
        """Set a setting, or remove it with ``None``."""
        with self._engine.begin() as connection:
            connection.execute(_SETTINGS.delete().where(_SETTINGS.c.key == key))
            if value is not None:
                connection.execute(_SETTINGS.insert().values(key=key, value=value))


def _durable(connection: Any, record: object) -> None:
    """Write-ahead log with a sync at every commit: readers never wait, and what was answered survives a kill."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()

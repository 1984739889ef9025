"""Where Tamiyo keeps policy versions, decisions and outcomes: SQLite embedded, PostgreSQL by URL.

Records are JSON documents under a key; the few columns beside them are what queries need. Every write is
committed before its call returns, so an answer that was given survives kill -9.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import sqlalchemy as sa

from services.chassis.errors import EsperError, Reason
from services.chassis.sqlite import make_durable

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
# A table of its own: databases of before it exist, and it is made beside their tables as they are.
_REQUESTS: Final = sa.Table(
    "policy_requests",
    _METADATA,
    sa.Column("method", sa.String, primary_key=True),
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("request_digest", sa.String, nullable=False),
    sa.Column("policy", sa.String, nullable=False),
)
_SETTINGS: Final = sa.Table(
    "settings",
    _METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Request:
    """A change of the policies as its caller may repeat it: the rpc, its request id, SHA-256 of its content (hex)."""

    method: str
    id: str
    digest: str


def sqlite_url(folder: Path) -> str:
    """URL of the embedded database in ``folder``, which is made when it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'tamiyo.sqlite'}"


class Store:
    """The records of one Tamiyo. Not for use by two threads at once; calls block for a few milliseconds.

    Several processes may share one database. ``decision_limit`` bounds the decisions kept: the oldest go first.
    Every method raises EsperError UNAVAILABLE while the database cannot be reached, STORAGE_FULL when it has no room.
    """

    def __init__(self, url: str, *, decision_limit: int) -> None:
        with _translated():
            self._engine = sa.create_engine(url, pool_pre_ping=True)
            self._decision_limit = decision_limit
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _prepare_sqlite)
            _METADATA.create_all(self._engine)

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with _translated(), self._engine.begin() as connection:
            yield connection

    def _write(self, *statements: sa.Insert | sa.Update) -> bool:
        """All of it in one transaction; False, and nothing is written, when a row that is new has a key that is not."""
        with _translated():
            try:
                with self._engine.begin() as connection:
                    for statement in statements:
                        connection.execute(statement)
            except sa.exc.IntegrityError:
                return False
        return True

    def add_policy(
        self,
        name: str,
        algorithm: str,
        version: int,
        active: bool,
        document: Document,
        *,
        request: Request | None = None,
    ) -> bool:
        """Keep a new policy version, and with it who asked; False when it exists, or the request has its answer."""
        row = {"name": name, "algorithm": algorithm, "version": version, "active": active}
        return self._write(
            _POLICIES.insert().values(**row, document=json.dumps(document)), *_noted(request, policy=name)
        )

    def policies(self) -> list[tuple[bool, dict[str, Any]]]:
        """(active, document) of every version, by algorithm and version."""
        query = sa.select(_POLICIES.c.active, _POLICIES.c.document).order_by(_POLICIES.c.algorithm, _POLICIES.c.version)
        with self._begin() as connection:
            return [(bool(row.active), json.loads(row.document)) for row in connection.execute(query)]

    def activate(self, name: str, algorithm: str, request: Request | None = None) -> None:
        """Make one version of the algorithm the active one, and no other; not again for one request."""
        chosen = _POLICIES.update().where(_POLICIES.c.algorithm == algorithm).values(active=_POLICIES.c.name == name)
        self._write(chosen, *_noted(request, policy=name))

    def policy_of_request(self, request: Request) -> tuple[str, str] | None:
        """(request digest, name of the policy) that a request of this rpc and id had for an answer, or ``None``."""
        query = sa.select(_REQUESTS.c.request_digest, _REQUESTS.c.policy).where(
            _REQUESTS.c.method == request.method, _REQUESTS.c.request_id == request.id
        )
        with self._begin() as connection:
            row = connection.execute(query).first()
        return None if row is None else (row.request_digest, row.policy)

    def add_decision(self, name: str, run: str, request_id: str, request_digest: str, document: Document) -> bool:
        """Keep a decision, and beyond the limit forget the oldest; False when the request has a decision already."""
        row = {"name": name, "run": run, "request_id": request_id, "request_digest": request_digest}
        if not self._write(_DECISIONS.insert().values(**row, document=json.dumps(document))):
            return False
        newest = sa.select(sa.func.max(_DECISIONS.c.sequence)).scalar_subquery()
        with self._begin() as connection:
            connection.execute(_DECISIONS.delete().where(_DECISIONS.c.sequence <= newest - self._decision_limit))
        return True

    def decision_of_request(self, request_id: str) -> tuple[str, dict[str, Any]] | None:
        """(request digest, document) of the decision a request made, or ``None``."""
        query = sa.select(_DECISIONS.c.request_digest, _DECISIONS.c.document).where(
            _DECISIONS.c.request_id == request_id
        )
        with self._begin() as connection:
            row = connection.execute(query).first()
        return None if row is None else (row.request_digest, json.loads(row.document))

    def decision(self, name: str) -> dict[str, Any] | None:
        """A decision's document, or ``None``."""
        query = sa.select(_DECISIONS.c.document).where(_DECISIONS.c.name == name)
        with self._begin() as connection:
            row = connection.execute(query).first()
        return None if row is None else dict(json.loads(row.document))

    def decisions(self, run: str, before: int | None, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """(sequence, document), newest first, of one run or (empty) of all, older than ``before``."""
        query = sa.select(_DECISIONS.c.sequence, _DECISIONS.c.document).order_by(_DECISIONS.c.sequence.desc())
        if run:
            query = query.where(_DECISIONS.c.run == run)
        if before is not None:
            query = query.where(_DECISIONS.c.sequence < before)
        with self._begin() as connection:
            return [(row.sequence, json.loads(row.document)) for row in connection.execute(query.limit(limit))]

    def add_outcome(self, request_id: str, document: Document) -> None:
        """Keep an outcome; the same request twice is one outcome."""
        self._write(_OUTCOMES.insert().values(request_id=request_id, document=json.dumps(document)))

    def outcomes(self) -> list[dict[str, Any]]:
        """All outcomes, oldest first."""
        query = sa.select(_OUTCOMES.c.document).order_by(_OUTCOMES.c.sequence)
        with self._begin() as connection:
            return [json.loads(row.document) for row in connection.execute(query)]

    def outcome_count(self) -> int:
        """How many outcomes are kept."""
        with self._begin() as connection:
            return int(connection.execute(sa.select(sa.func.count()).select_from(_OUTCOMES)).scalar_one())

    def setting(self, key: str) -> str | None:
        """A setting's value, or ``None``."""
        query = sa.select(_SETTINGS.c.value).where(_SETTINGS.c.key == key)
        with self._begin() as connection:
            return connection.execute(query).scalar_one_or_none()

    def set_setting(self, key: str, value: str | None) -> None:
        """Set a setting, or remove it with ``None``."""
        with self._begin() as connection:
            connection.execute(_SETTINGS.delete().where(_SETTINGS.c.key == key))
            if value is not None:
                connection.execute(_SETTINGS.insert().values(key=key, value=value))


def _noted(request: Request | None, *, policy: str) -> Iterator[sa.Insert]:
    if request is not None:
        yield _REQUESTS.insert().values(
            method=request.method, request_id=request.id, request_digest=request.digest, policy=policy
        )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what a database says when it is away, full or no database at all into our errors."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if "disk is full" in str(error) or "No space left" in str(error):
            raise EsperError("the policies' database has no room left", reason=Reason.STORAGE_FULL) from error
        # The statement and its values are for the log, not for the caller.
        detail = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        raise EsperError(f"the policies' database: {detail}", reason=Reason.UNAVAILABLE, retry_after=1.0) from error


def _prepare_sqlite(connection: Any, _record: object) -> None:
    make_durable(connection)

"""The metadata store on SQL: SQLite embedded, PostgreSQL at scale, by URL. Migrates itself when it opens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine, RowMapping, make_url

from services.blueprints.artifact import Characterization
from services.blueprints.digest import canonical_json
from services.blueprints.spec import Blueprint, Interface
from services.chassis.errors import EsperError, Reason, invalid
from services.chassis.sqlite import make_durable
from services.urza.metadata import BlueprintQuery, Cursor, KernelQuery
from services.urza.records import (
    BlueprintRecord,
    BlueprintState,
    KernelRecord,
    KernelStatus,
    Outcome,
    OutcomeCounts,
    OutcomeResult,
)
from services.urza.schema import (
    BLUEPRINT_TAGS,
    BLUEPRINTS,
    HEAD,
    KERNEL_OUTCOMES,
    KERNEL_TAGS,
    KERNELS,
    METADATA,
    VERSION,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WAIT_SECONDS = 10.0
"""How long a call waits for another writer, a connection of the pool, or the server to accept one."""
_MIGRATIONS = Path(__file__).parent / "migrations"
_MIGRATION_LOCK = 0x45535045  # any number; all replicas take the same


class SqlMetadata:
    """See :class:`services.urza.metadata.MetadataStore`."""

    def __init__(self, url: str) -> None:
        """Connect and bring the schema up to date; several processes may do so at once.

        Args:
            url: SQLAlchemy URL: ``sqlite:///PATH`` or ``postgresql+psycopg://...``.

        Raises:
            EsperError: INVALID_FIELD for a URL of no known form or driver, UNAVAILABLE when there is no such database.
        """
        try:
            parsed = make_url(url)
            parsed.get_dialect()
        except exc.ArgumentError as error:  # an unknown dialect is one too
            raise invalid("services.urza.database_url", str(error), "give an SQLAlchemy URL") from error
        self._sqlite = parsed.get_backend_name() == "sqlite"
        timeout: dict[str, Any] = (
            {"timeout": _WAIT_SECONDS} if self._sqlite else {"connect_timeout": int(_WAIT_SECONDS)}
        )
        engine = sql.create_engine(
            parsed, connect_args=timeout, pool_size=4, max_overflow=0, pool_timeout=_WAIT_SECONDS, pool_pre_ping=True
        )
        if self._sqlite:
            sql.event.listen(engine, "connect", _prepare_sqlite)
            sql.event.listen(engine, "begin", _begin_sqlite)
        self._engine: Engine = engine
        self._writer: Engine = engine.execution_options(esper_writes=True)
        try:
            self._migrate()
        except BaseException:
            engine.dispose()
            raise

    def add_blueprint(self, record: BlueprintRecord) -> tuple[BlueprintRecord, bool]:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        values = {
            "id": record.id,
            "family": record.blueprint.family,
            "spec": canonical_json(record.blueprint.to_json()).decode(),
            "display_name": record.display_name,
            "description": record.description,
            "parent": record.parent or None,
            "state": record.state.value,
            "create_time": _to_micros(record.create_time),
            "archive_time": None if record.archive_time is None else _to_micros(record.archive_time),
            "revision": record.revision,
        }
        added = self._add(BLUEPRINTS, BLUEPRINT_TAGS, values, record.tags)
        return (record, True) if added else (_present(self.blueprint(record.id)), False)

    def blueprint(self, blueprint_id: str) -> BlueprintRecord | None:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        with self._reading() as connection:
            found = _blueprints(connection, sql.select(BLUEPRINTS).where(BLUEPRINTS.c.id == blueprint_id))
        return found[0] if found else None

    def blueprints(self, query: BlueprintQuery, *, after: Cursor | None, limit: int) -> list[BlueprintRecord]:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        columns = BLUEPRINTS.c
        statement = _page(sql.select(BLUEPRINTS), BLUEPRINTS, after, limit)
        statement = statement.where(*_equal(BLUEPRINTS, family=query.family or None))
        statement = statement.where(*_tagged(BLUEPRINTS, BLUEPRINT_TAGS, query.tags))
        if not query.include_archived:
            statement = statement.where(columns.state == BlueprintState.ACTIVE.value)
        if query.parents is not None:
            statement = statement.where(columns.parent.in_(query.parents))
        with self._reading() as connection:
            return _blueprints(connection, statement)

    def set_blueprint_state(
        self, blueprint_id: str, *, revision: int, state: BlueprintState, archive_time: datetime | None
    ) -> bool:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        time = None if archive_time is None else _to_micros(archive_time)
        return self._change(BLUEPRINTS, blueprint_id, revision, state=state.value, archive_time=time)

    def add_kernel(self, record: KernelRecord) -> tuple[KernelRecord, bool]:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        cost = record.characterization
        values = {
            "id": record.id,
            "blueprint": record.blueprint,
            "family": record.family,
            "digest": record.digest,
            "signature": record.signature,
            "size_bytes": record.size_bytes,
            "interface": canonical_json(record.interface.to_json()).decode(),
            "interface_signature": record.interface_signature,
            "size": record.size,
            "init_seed": record.init_seed,
            "target": cost.target,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "latency_seconds": cost.latency_seconds,
            "latency_batch": cost.latency_batch,
            "memory_bytes": cost.memory_bytes,
            "status": record.status.value,
            "status_reason": record.status_reason,
            "create_time": _to_micros(record.create_time),
            "status_time": _to_micros(record.status_time),
            "revision": record.revision,
        }
        added = self._add(KERNELS, KERNEL_TAGS, values, record.tags)
        return (record, True) if added else (_present(self.kernel(record.id)), False)

    def kernel(self, kernel_id: str) -> KernelRecord | None:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        with self._reading() as connection:
            found = _kernels(connection, sql.select(KERNELS).where(KERNELS.c.id == kernel_id))
        return found[0] if found else None

    def kernels(self, query: KernelQuery, *, after: Cursor | None, limit: int) -> list[KernelRecord]:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        statement = _page(sql.select(KERNELS), KERNELS, after, limit).where(*_conditions(query))
        with self._reading() as connection:
            return _kernels(connection, statement)

    def best_kernel(self, query: KernelQuery) -> KernelRecord | None:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        columns = KERNELS.c
        per_sample = columns.latency_seconds / sql.func.coalesce(columns.latency_batch, 1)
        statement = (
            sql.select(KERNELS)
            .where(*_conditions(query))
            .order_by(
                (columns.status != KernelStatus.VALIDATED.value).asc(),
                columns.latency_seconds.is_(None).asc(),
                per_sample.asc(),
                columns.create_time.desc(),
                columns.id,
            )
            .limit(1)
        )
        with self._reading() as connection:
            found = _kernels(connection, statement)
        return found[0] if found else None

    def set_kernel_status(
        self, kernel_id: str, *, revision: int, status: KernelStatus, reason: str, time: datetime
    ) -> bool:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        values = {"status": status.value, "status_reason": reason, "status_time": _to_micros(time)}
        return self._change(KERNELS, kernel_id, revision, **values)

    def record_outcome(self, kernel_id: str, outcome: Outcome, time: datetime) -> None:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        columns, worth = KERNEL_OUTCOMES.c, outcome.contribution
        values = {
            "result": outcome.result.value,
            "contribution": None if worth is None else worth.value,
            "contribution_low": None if worth is None else worth.low,
            "contribution_high": None if worth is None else worth.high,
            "contribution_confidence": None if worth is None else worth.confidence,
            "contribution_samples": None if worth is None else worth.samples,
            "time": _to_micros(time),
        }
        update = (
            sql.update(KERNEL_OUTCOMES)
            .where(columns.kernel == kernel_id, columns.seed == outcome.seed)
            .values(**values)
        )
        insert = sql.insert(KERNEL_OUTCOMES).values(kernel=kernel_id, seed=outcome.seed, **values)
        try:
            with self._writing() as connection:
                if connection.execute(update).rowcount == 0:
                    connection.execute(insert)
        except exc.IntegrityError:
            # Another replica told of the same seed between our two statements.
            with self._writing() as connection:
                connection.execute(update)

    def close(self) -> None:
        """See :class:`~services.urza.metadata.MetadataStore`."""
        self._engine.dispose()

    def _migrate(self) -> None:
        with self._writing() as connection:
            if not self._sqlite:  # one replica migrates, the others wait and find it done
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            if not sql.inspect(connection).has_table(VERSION.name):
                # A new database gets the newest tables at once: the steps are for old ones, and alembic takes half a
                # second to import.
                METADATA.create_all(connection)
                VERSION.create(connection)
                connection.execute(sql.insert(VERSION).values(version_num=HEAD))
            elif connection.execute(sql.select(VERSION.c.version_num)).scalar() != HEAD:
                _upgrade(connection)

    def _add(self, table: sql.Table, tags: sql.Table, values: dict[str, Any], words: Sequence[str]) -> bool:
        """Insert a row and its tags; False if its id is there."""
        try:
            with self._writing() as connection:
                connection.execute(sql.insert(table).values(**values))
                if words:
                    connection.execute(sql.insert(tags), [{"tag": word, "owner": values["id"]} for word in words])
        except exc.IntegrityError:
            return False
        return True

    def _change(self, table: sql.Table, row_id: str, revision: int, **values: Any) -> bool:
        statement = (
            sql.update(table)
            .where(table.c.id == row_id, table.c.revision == revision)
            .values(**values, revision=revision + 1)
        )
        with self._writing() as connection:
            return connection.execute(statement).rowcount == 1

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _translated(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _translated(), self._writer.begin() as connection:
            yield connection


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise EsperError(
            f"the library's database is of another version, a newer one perhaps: {error}", reason=Reason.STORAGE_FAILED
        ) from error


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what a database says when it is away or full into our errors."""
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
        if "disk is full" in str(error) or "No space left" in str(error):
            raise EsperError("the library's database has no room left", reason=Reason.STORAGE_FULL) from error
        # The statement and its values are for the log, not for the caller.
        detail = str(getattr(error, "orig", None) or error).strip().split("\n")[0]
        raise EsperError(f"the library's database: {detail}", reason=Reason.UNAVAILABLE, retry_after=1.0) from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: the driver's own way splits transactions around DDL
    make_durable(connection)
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A writer takes its lock at once: one that first reads could find, on writing, that it has to start anew.
    writes = connection.get_execution_options().get("esper_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _to_micros(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _from_micros(micros: int) -> datetime:
    return _EPOCH + timedelta(microseconds=micros)


def _present(record: Any) -> Any:
    """A record whose id was refused as taken; rows are never removed."""
    assert record is not None, "a row that could not be added for its id is there"
    return record


def _page(statement: sql.Select[Any], table: sql.Table, after: Cursor | None, limit: int) -> sql.Select[Any]:
    columns = table.c
    if after is not None:
        micros = _to_micros(after.time)
        statement = statement.where(
            (columns.create_time > micros) | ((columns.create_time == micros) & (columns.id > after.id))
        )
    return statement.order_by(columns.create_time, columns.id).limit(limit)


def _equal(table: sql.Table, **values: object) -> list[sql.ColumnElement[bool]]:
    return [table.c[name] == value for name, value in values.items() if value is not None]


def _tagged(table: sql.Table, tags: sql.Table, words: Sequence[str]) -> list[sql.ColumnElement[bool]]:
    return [table.c.id.in_(sql.select(tags.c.owner).where(tags.c.tag == word)) for word in words]


def _conditions(query: KernelQuery) -> list[sql.ColumnElement[bool]]:
    limits = {
        "latency_seconds": query.max_latency_seconds,
        "memory_bytes": query.max_memory_bytes,
        "parameters": query.max_parameters,
        "flops": query.max_flops,
    }
    conditions = _equal(
        KERNELS,
        blueprint=query.blueprint or None,
        family=query.family or None,
        interface_signature=query.interface_signature or None,
        target=query.target or None,
        size=query.size,
        init_seed=query.init_seed,
    )
    conditions += _tagged(KERNELS, KERNEL_TAGS, query.tags)
    # NULL, the unmeasured, is at or below nothing.
    conditions += [KERNELS.c[name] <= limit for name, limit in limits.items() if limit is not None]
    if query.statuses:
        conditions.append(KERNELS.c.status.in_([status.value for status in query.statuses]))
    return conditions


def _blueprints(connection: Connection, statement: sql.Select[Any]) -> list[BlueprintRecord]:
    rows = connection.execute(statement).mappings().all()
    tags = _tags_of(connection, BLUEPRINT_TAGS, [row["id"] for row in rows])
    return [
        BlueprintRecord(
            blueprint=Blueprint.from_json(json.loads(row["spec"])),
            display_name=row["display_name"],
            description=row["description"],
            tags=tags.get(row["id"], ()),
            parent=row["parent"] or "",
            state=BlueprintState(row["state"]),
            create_time=_from_micros(row["create_time"]),
            archive_time=None if row["archive_time"] is None else _from_micros(row["archive_time"]),
            revision=row["revision"],
        )
        for row in rows
    ]


def _kernels(connection: Connection, statement: sql.Select[Any]) -> list[KernelRecord]:
    rows = connection.execute(statement).mappings().all()
    ids = [row["id"] for row in rows]
    tags = _tags_of(connection, KERNEL_TAGS, ids)
    outcomes = _outcomes_of(connection, ids)
    return [_kernel(row, tags.get(row["id"], ()), outcomes.get(row["id"], OutcomeCounts())) for row in rows]


def _kernel(row: RowMapping, tags: tuple[str, ...], outcomes: OutcomeCounts) -> KernelRecord:
    return KernelRecord(
        id=row["id"],
        blueprint=row["blueprint"],
        family=row["family"],
        digest=bytes(row["digest"]),
        signature=bytes(row["signature"]),
        size_bytes=row["size_bytes"],
        interface=Interface.from_json(json.loads(row["interface"])),
        interface_signature=row["interface_signature"],
        size=row["size"],
        init_seed=row["init_seed"],
        characterization=Characterization(
            target=row["target"],
            parameters=row["parameters"],
            flops=row["flops"],
            latency_seconds=row["latency_seconds"],
            latency_batch=row["latency_batch"],
            memory_bytes=row["memory_bytes"],
        ),
        status=KernelStatus(row["status"]),
        status_reason=row["status_reason"],
        tags=tags,
        create_time=_from_micros(row["create_time"]),
        status_time=_from_micros(row["status_time"]),
        revision=row["revision"],
        outcomes=outcomes,
    )


def _tags_of(connection: Connection, tags: sql.Table, ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    statement = sql.select(tags.c.owner, tags.c.tag).where(tags.c.owner.in_(ids)).order_by(tags.c.tag)
    for owner, tag in connection.execute(statement):
        found[owner] = (*found.get(owner, ()), tag)
    return found


def _outcomes_of(connection: Connection, ids: Sequence[str]) -> dict[str, OutcomeCounts]:
    columns = KERNEL_OUTCOMES.c
    statement = (
        sql.select(
            columns.kernel,
            columns.result,
            sql.func.count(),
            sql.func.count(columns.contribution),
            sql.func.sum(columns.contribution),
        )
        .where(columns.kernel.in_(ids))
        .group_by(columns.kernel, columns.result)
    )
    results: dict[str, dict[OutcomeResult, int]] = {}
    sums: dict[str, tuple[int, float]] = {}
    for kernel, result, count, measured, total in connection.execute(statement):
        results.setdefault(kernel, {})[OutcomeResult(result)] = count
        before = sums.get(kernel, (0, 0.0))
        sums[kernel] = (before[0] + measured, before[1] + (total or 0.0))
    return {
        kernel: OutcomeCounts(counts, sums[kernel][1] / sums[kernel][0] if sums[kernel][0] else None)
        for kernel, counts in results.items()
    }

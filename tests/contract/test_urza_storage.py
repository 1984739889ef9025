"""One contract for every metadata store and every object store of Urza."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect

from services.blueprints.artifact import Characterization
from services.blueprints.spec import Blueprint, InitRecipe
from services.blueprints.vocabulary import InitRule
from services.chassis.config.schema import S3Config
from services.chassis.errors import EsperError, Reason
from services.urza.metadata import BlueprintQuery, Cursor, KernelQuery, MetadataStore
from services.urza.objects import DirectoryObjects, ObjectStore
from services.urza.records import (
    BlueprintRecord,
    BlueprintState,
    Interval,
    KernelRecord,
    KernelStatus,
    Outcome,
    OutcomeResult,
)
from services.urza.s3_objects import S3Objects
from services.urza.schema import HEAD, METADATA, VERSION
from services.urza.sql_metadata import _MIGRATIONS, SqlMetadata
from tests.infrastructure.kernels import WIDTH
from tests.infrastructure.s3 import S3Store

_TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'library.sqlite'}"
    server: str = request.getfixturevalue("postgres_url")
    return server


@pytest.fixture
def store(url: str) -> Iterator[MetadataStore]:
    store = SqlMetadata(url)
    yield store
    store.close()


def _blueprint(number: int = 0, *, minutes: int = 0, tags: tuple[str, ...] = (), parent: str = "") -> BlueprintRecord:
    return BlueprintRecord(
        blueprint=Blueprint("widen", {"number": number, "share": 0.5, "flag": True, "word": "é"}),
        display_name=f"number {number}",
        description='it\'s "quoted"; DROP TABLE blueprints',
        tags=tags,
        parent=parent,
        state=BlueprintState.ACTIVE,
        create_time=_TIME + timedelta(minutes=minutes),
    )


def _kernel(blueprint: BlueprintRecord, number: int = 0, **changes: object) -> KernelRecord:
    cost = changes.pop("cost", Characterization("cpu", 10, 100, 0.5, 32, 1000))
    record = KernelRecord(
        id=f"{number:032x}",
        blueprint=blueprint.id,
        family="widen",
        digest=number.to_bytes(32, "big"),
        signature=b"\0\xff" * 32,
        size_bytes=2**33,
        interface=WIDTH,
        interface_signature="f" * 64,
        size=4,
        init_seed=2**63 - 1,
        characterization=cost,  # type: ignore[arg-type]  # popped from the changes, which are of any type
        status=KernelStatus.UPLOADED,
        status_reason="",
        tags=("a", "b"),
        create_time=_TIME + timedelta(minutes=number),
        status_time=_TIME,
    )
    return replace(record, **changes)  # type: ignore[arg-type]  # as above


def test_records_come_back_as_they_went_in(store: MetadataStore) -> None:
    blueprint = _blueprint(tags=("a", "b"))
    assert store.blueprint(blueprint.id) is None
    assert store.add_blueprint(blueprint) == (blueprint, True)
    assert store.blueprint(blueprint.id) == blueprint
    kernel = _kernel(blueprint)
    assert store.kernel(kernel.id) is None
    assert store.add_kernel(kernel) == (kernel, True)
    assert store.kernel(kernel.id) == kernel
    unmeasured = _kernel(blueprint, 1, cost=Characterization("cpu", 0), tags=())
    store.add_kernel(unmeasured)
    assert store.kernel(unmeasured.id) == unmeasured


def test_what_is_there_already_stays_as_it_is(store: MetadataStore) -> None:
    first = _blueprint(tags=("a",))
    store.add_blueprint(first)
    assert store.add_blueprint(replace(first, display_name="other", tags=("z",))) == (first, False)
    kernel = _kernel(first)
    store.add_kernel(kernel)
    assert store.add_kernel(replace(kernel, status_reason="other")) == (kernel, False)


def test_of_many_who_add_the_same_one_does(store: MetadataStore) -> None:
    record = _blueprint(tags=("a",))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: store.add_blueprint(record), range(16)))
    assert [created for _, created in answers].count(True) == 1
    assert {answer.id for answer, _ in answers} == {record.id}


def test_blueprints_are_found_by_family_tags_state_and_parent(store: MetadataStore) -> None:
    root = _blueprint(0, minutes=0, tags=("a",))
    child = _blueprint(1, minutes=1, tags=("a", "b"), parent=root.id)
    other = BlueprintRecord(
        Blueprint("bridge", {}, InitRecipe(InitRule.KAIMING_NORMAL)), "", "", (), "", BlueprintState.ACTIVE, _TIME
    )
    for record in (root, child, other):
        store.add_blueprint(record)

    def found(query: BlueprintQuery) -> set[str]:
        return {record.id for record in store.blueprints(query, after=None, limit=10)}

    assert found(BlueprintQuery()) == {root.id, child.id, other.id}
    assert found(BlueprintQuery(family="bridge")) == {other.id}
    assert found(BlueprintQuery(tags=("a",))) == {root.id, child.id}
    assert found(BlueprintQuery(tags=("a", "b"))) == {child.id}
    assert found(BlueprintQuery(tags=("c",))) == set()
    assert found(BlueprintQuery(parents=(root.id, other.id))) == {child.id}
    assert found(BlueprintQuery(parents=())) == set()
    assert store.set_blueprint_state(root.id, revision=1, state=BlueprintState.ARCHIVED, archive_time=_TIME)
    assert found(BlueprintQuery(tags=("a",))) == {child.id}
    assert found(BlueprintQuery(tags=("a",), include_archived=True)) == {root.id, child.id}


def test_a_change_needs_the_revision_that_is_there(store: MetadataStore) -> None:
    record = _blueprint()
    store.add_blueprint(record)
    archived = {"state": BlueprintState.ARCHIVED, "archive_time": _TIME}
    assert not store.set_blueprint_state(record.id, revision=2, **archived)  # type: ignore[arg-type]  # a table of mixed types
    assert not store.set_blueprint_state("0" * 32, revision=1, **archived)  # type: ignore[arg-type]  # as above
    assert store.blueprint(record.id) == record
    assert store.set_blueprint_state(record.id, revision=1, **archived)  # type: ignore[arg-type]  # as above
    after = store.blueprint(record.id)
    assert after == replace(record, state=BlueprintState.ARCHIVED, archive_time=_TIME, revision=2)
    assert store.set_blueprint_state(record.id, revision=2, state=BlueprintState.ACTIVE, archive_time=None)
    assert store.blueprint(record.id) == replace(record, revision=3)

    kernel = _kernel(record)
    store.add_kernel(kernel)
    later = _TIME + timedelta(hours=1)

    def validate(revision: int) -> bool:
        return store.set_kernel_status(
            kernel.id, revision=revision, status=KernelStatus.VALIDATED, reason="it works", time=later
        )

    assert not validate(7)
    assert validate(1)
    assert not validate(1)
    expected = replace(kernel, status=KernelStatus.VALIDATED, status_reason="it works", status_time=later, revision=2)
    assert store.kernel(kernel.id) == expected


def test_of_many_who_change_the_same_revision_one_does(store: MetadataStore) -> None:
    record = _blueprint()
    store.add_blueprint(record)
    with ThreadPoolExecutor(8) as pool:
        changed = list(
            pool.map(
                lambda _: store.set_blueprint_state(
                    record.id, revision=1, state=BlueprintState.ARCHIVED, archive_time=_TIME
                ),
                range(16),
            )
        )
    assert changed.count(True) == 1


def test_pages_are_in_order_and_complete_also_where_times_are_equal(store: MetadataStore) -> None:
    for number in range(7):
        store.add_blueprint(_blueprint(number, minutes=number // 3))
    seen: list[BlueprintRecord] = []
    after = None
    while page := store.blueprints(BlueprintQuery(), after=after, limit=2):
        seen += page
        after = Cursor(page[-1].create_time, page[-1].id)
    assert seen == store.blueprints(BlueprintQuery(), after=None, limit=1000)
    assert len({record.id for record in seen}) == 7
    assert [record.create_time for record in seen] == sorted(record.create_time for record in seen)


def _limits(*costs: Characterization) -> Callable[[BlueprintRecord], list[KernelRecord]]:
    return lambda blueprint: [_kernel(blueprint, number, cost=cost) for number, cost in enumerate(costs)]


def test_the_unmeasured_passes_no_limit(store: MetadataStore) -> None:
    blueprint = _blueprint()
    store.add_blueprint(blueprint)
    costs = (
        Characterization("cpu", 10, 100, 0.5, 32, 1000),
        Characterization("cpu", 20, 200, 0.7, 32, 2000),
        Characterization("cpu", 5),
    )
    for kernel in _limits(*costs)(blueprint):
        store.add_kernel(kernel)

    def found(query: KernelQuery) -> list[int]:
        return [int(record.id, 16) for record in store.kernels(query, after=None, limit=10)]

    assert found(KernelQuery()) == [0, 1, 2]
    assert found(KernelQuery(max_latency_seconds=0.5)) == [0]
    assert found(KernelQuery(max_latency_seconds=1e9)) == [0, 1]
    assert found(KernelQuery(max_memory_bytes=1500)) == [0]
    assert found(KernelQuery(max_parameters=10)) == [0, 2]
    assert found(KernelQuery(max_flops=10**15)) == [0, 1]
    assert found(KernelQuery(max_flops=0)) == []


def test_kernels_are_found_by_what_they_are(store: MetadataStore) -> None:
    blueprint, other = _blueprint(0), _blueprint(1)
    store.add_blueprint(blueprint)
    store.add_blueprint(other)
    base = _kernel(blueprint, 0)
    different: dict[str, object] = {
        "interface_signature": "0" * 64,
        "size": 5,
        "init_seed": 7,
        "family": "bridge",
        "tags": ("c",),
        "status": KernelStatus.RETIRED,
        "cost": Characterization("cuda", 10),
    }
    store.add_kernel(base)
    store.add_kernel(_kernel(other, 1))
    for number, (name, value) in enumerate(different.items(), 2):
        store.add_kernel(_kernel(blueprint, number, **{name: value}))

    def found(query: KernelQuery) -> set[int]:
        return {int(record.id, 16) for record in store.kernels(query, after=None, limit=100)}

    everything = set(range(9))
    assert found(KernelQuery()) == everything
    assert found(KernelQuery(blueprint=blueprint.id)) == everything - {1}
    assert found(KernelQuery(interface_signature="0" * 64)) == {2}
    assert found(KernelQuery(size=5)) == {3}
    assert found(KernelQuery(init_seed=7)) == {4}
    assert found(KernelQuery(init_seed=0)) == set()
    assert found(KernelQuery(family="bridge")) == {5}
    assert found(KernelQuery(tags=("c",))) == {6}
    assert found(KernelQuery(tags=("a", "b"))) == everything - {6}
    assert found(KernelQuery(statuses=(KernelStatus.RETIRED, KernelStatus.REJECTED))) == {7}
    assert found(KernelQuery(target="cuda")) == {8}
    page = store.kernels(KernelQuery(), after=Cursor(base.create_time, base.id), limit=1)
    assert [int(record.id, 16) for record in page] == [1]


def test_the_best_kernel_is_validated_then_fast_then_new(store: MetadataStore) -> None:
    blueprint = _blueprint()
    store.add_blueprint(blueprint)

    def best() -> int | None:
        record = store.best_kernel(KernelQuery(blueprint=blueprint.id))
        return None if record is None else int(record.id, 16)

    def add(number: int, status: KernelStatus, latency: float | None, batch: int | None = 32) -> None:
        cost = Characterization("cpu", 1, 1, latency, batch)
        store.add_kernel(_kernel(blueprint, number, status=status, cost=cost))

    assert best() is None
    add(1, KernelStatus.UPLOADED, 0.1)
    assert best() == 1
    add(2, KernelStatus.VALIDATED, None)
    assert best() == 2, "validated comes before fast"
    add(3, KernelStatus.VALIDATED, None)
    assert best() == 3, "the newer of two unmeasured"
    add(4, KernelStatus.VALIDATED, 0.9)
    assert best() == 4, "measured comes before unmeasured"
    add(5, KernelStatus.VALIDATED, 0.5)
    assert best() == 5, "the faster"
    add(6, KernelStatus.VALIDATED, 0.6, batch=64)
    assert best() == 6, "the faster per sample"
    add(7, KernelStatus.RETIRED, 0.0)
    assert best() == 6


def test_a_seed_has_one_outcome_the_last_one_told(store: MetadataStore) -> None:
    blueprint = _blueprint()
    store.add_blueprint(blueprint)
    kernel = _kernel(blueprint)
    store.add_kernel(kernel)
    store.add_kernel(_kernel(blueprint, 1))

    def tell(seed: str, result: OutcomeResult, points: float | None) -> None:
        worth = None if points is None else Interval(points, points - 1, points + 1, 0.95, 500)
        store.record_outcome(kernel.id, Outcome(seed, result, worth), _TIME)

    tell("runs/r/seeds/1", OutcomeResult.CULLED, None)
    record = store.kernel(kernel.id)
    assert record is not None
    assert record.outcomes.results == {OutcomeResult.CULLED: 1}
    assert record.outcomes.mean_contribution is None, "nothing was measured"
    tell("runs/r/seeds/1", OutcomeResult.FOSSILIZED, 1.0)
    tell("runs/r/seeds/2", OutcomeResult.FOSSILIZED, None)
    tell("runs/r/seeds/3", OutcomeResult.ROLLED_BACK, 2.0)
    record = store.kernel(kernel.id)
    assert record is not None
    assert record.outcomes.results == {OutcomeResult.FOSSILIZED: 2, OutcomeResult.ROLLED_BACK: 1}
    assert record.outcomes.mean_contribution == pytest.approx(1.5)
    assert record.revision == 1
    untouched = store.kernel(f"{1:032x}")
    assert untouched is not None
    assert untouched.outcomes.results == {}


def test_many_may_tell_of_one_seed_at_once(store: MetadataStore) -> None:
    blueprint = _blueprint()
    store.add_blueprint(blueprint)
    kernel = _kernel(blueprint)
    store.add_kernel(kernel)
    outcome = Outcome("runs/r/seeds/1", OutcomeResult.CULLED, Interval(1, 0, 2, 0.95, 10))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.record_outcome(kernel.id, outcome, _TIME), range(24)))
    record = store.kernel(kernel.id)
    assert record is not None
    assert record.outcomes.results == {OutcomeResult.CULLED: 1}


def test_what_was_written_is_there_when_it_opens_again(url: str) -> None:
    first = SqlMetadata(url)
    record = _blueprint()
    first.add_blueprint(record)
    first.close()
    second = SqlMetadata(url)
    assert second.blueprint(record.id) == record
    second.close()


def test_several_may_open_an_empty_database_at_once(url: str) -> None:
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda _: SqlMetadata(url), range(3)))
    record = _blueprint()
    assert [store.add_blueprint(record)[1] for store in stores] == [True, False, False]
    for store in stores:
        store.close()


def _before_the_first_migration(url: str, *versions: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        VERSION.create(connection)
        for version in versions:
            connection.execute(VERSION.insert().values(version_num=version))
    engine.dispose()


def test_the_migrated_schema_is_the_one_of_the_code(url: str) -> None:
    _before_the_first_migration(url)
    store = SqlMetadata(url)
    record = _blueprint(tags=("a",))
    assert store.add_blueprint(record) == (record, True)
    store.close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, METADATA) == []
        assert context.get_current_revision() == HEAD
        keys = {table: inspect(connection).get_pk_constraint(table)["constrained_columns"] for table in METADATA.tables}
    engine.dispose()
    assert keys == {name: [column.name for column in table.primary_key] for name, table in METADATA.tables.items()}


def test_a_new_schema_is_the_migrated_one(url: str) -> None:
    SqlMetadata(url).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, METADATA) == []
        assert context.get_current_revision() == HEAD
    engine.dispose()
    assert ScriptDirectory(str(_MIGRATIONS)).get_current_head() == HEAD


def test_a_database_of_a_newer_version_is_left_alone(url: str) -> None:
    _before_the_first_migration(url, "9999")
    with pytest.raises(EsperError, match="another version") as caught:
        SqlMetadata(url)
    assert caught.value.reason is Reason.STORAGE_FAILED


def test_a_database_that_is_away_is_unavailable() -> None:
    with pytest.raises(EsperError) as caught:
        SqlMetadata("postgresql+psycopg://nobody@127.0.0.1:1/none")
    assert caught.value.reason is Reason.UNAVAILABLE


def test_a_postgresql_that_goes_away_is_unavailable_until_it_is_back(postgres_url: str) -> None:
    store = SqlMetadata(postgres_url)
    record = _blueprint()
    store.add_blueprint(record)
    name = postgres_url.rpartition("/")[2]
    server = postgres_url.replace("postgresql+psycopg", "postgresql").removesuffix(name) + "postgres"
    cut = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute(cut.encode())
        for call in (lambda: store.blueprint(record.id), lambda: store.add_blueprint(_blueprint(1))):
            with pytest.raises(EsperError) as caught:
                call()
            assert caught.value.reason is Reason.UNAVAILABLE
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
    assert store.blueprint(record.id) == record
    store.close()


def test_a_full_database_is_storage_full_and_keeps_what_it_has(tmp_path: Path) -> None:
    store = SqlMetadata(f"sqlite:///{tmp_path / 'library.sqlite'}")
    record = _blueprint()
    store.add_blueprint(record)
    store._engine.dispose()
    # SQLite's own bound on its file: it says what it says on a full disk.
    event.listen(store._engine, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count=1"))
    with pytest.raises(EsperError) as caught:
        for number in range(1, 1000):
            store.add_blueprint(replace(_blueprint(number), description="x" * 4096))
    assert caught.value.reason is Reason.STORAGE_FULL
    assert store.blueprint(record.id) == record
    store.close()


@pytest.mark.parametrize("url", ["nonsense", "nosuch://x"])
def test_a_url_of_no_known_form_is_a_field_error(url: str) -> None:
    with pytest.raises(EsperError, match=r"services\.urza\.database_url"):
        SqlMetadata(url)


# Object stores.


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3)])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryObjects(tmp_path / "artifacts")
    return S3Objects(request.getfixturevalue("s3"))


def test_objects_are_kept_whole_and_read_in_parts(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 5000)
    assert objects.size("abcd") is None
    objects.put("abcd", source)
    assert objects.size("abcd") == 1_280_000
    assert objects.read("abcd", 0, 4) == b"\0\1\2\3"
    assert objects.read("abcd", 1_279_999, 100) == b"\xff"
    assert objects.read("abcd", 1_280_000, 100) == b""
    assert objects.read("abcd", 7, 0) == b""
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda place: objects.read("abcd", place * 256, 256), range(200))
        assert set(parts) == {bytes(range(256))}


def test_putting_again_replaces_what_was_damaged(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for content in (b"damaged", b"whole"):
        source.write_bytes(content)
        objects.put("abcd", source)
        assert objects.read("abcd", 0, 100) == content


def test_an_object_that_is_not_there_is_a_storage_error(objects: ObjectStore) -> None:
    with pytest.raises(EsperError) as caught:
        objects.read("abcd", 0, 1)
    assert caught.value.reason is Reason.STORAGE_FAILED


def test_a_put_that_fails_leaves_what_was_there(objects: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"whole")
    objects.put("abcd", source)
    with pytest.raises(EsperError) as caught:
        objects.put("abcd", tmp_path / "missing")
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert objects.read("abcd", 0, 100) == b"whole"


def test_a_put_that_fails_leaves_nothing_lying_about(tmp_path: Path) -> None:
    objects = DirectoryObjects(tmp_path / "artifacts")
    with pytest.raises(EsperError):
        objects.put("abcd", tmp_path / "missing")
    assert list((tmp_path / "artifacts" / "ab").iterdir()) == []


def test_a_large_object_comes_back_from_a_bucket_as_it_was(s3: S3Config, s3_store: S3Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(0).randbytes(12 * 2**20))
    objects = S3Objects(s3)
    objects.put("abcd", source)
    assert objects.size("abcd") == 12 * 2**20
    assert b"".join(objects.read("abcd", place * 2**20, 2**20) for place in range(13)) == source.read_bytes()
    assert (s3_store.folder / s3.prefix / "ab" / "abcd").stat().st_size == 12 * 2**20, "it is under its prefix"
    assert S3Objects(s3.model_copy(update={"prefix": "elsewhere"})).size("abcd") is None


@pytest.mark.parametrize(
    ("change", "variable", "said"),
    [
        ({"bucket": "not-there"}, None, "NoSuchBucket"),
        ({}, "AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch"),
        ({"endpoint_url": "http://127.0.0.1:1"}, None, "error sending request"),
    ],
)
def test_a_bucket_that_cannot_be_used_says_so_at_once(
    s3: S3Config, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], variable: str | None, said: str
) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, "wrong")
    with pytest.raises(EsperError, match=rf"services\.urza\.s3 cannot be used.*{said}") as caught:
        S3Objects(s3.model_copy(update=change))
    assert caught.value.reason is Reason.STORAGE_FAILED
    assert "\n" not in caught.value.message


def test_a_store_that_goes_away_loses_nothing(s3: S3Config, s3_store: S3Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"whole")
    objects = S3Objects(s3)
    objects.put("abcd", source)
    s3_store.server.stop()
    try:
        for call in (
            lambda: objects.put("efgh", source),
            lambda: objects.size("abcd"),
            lambda: objects.read("abcd", 0, 5),
        ):
            with pytest.raises(EsperError) as caught:
                call()
            assert caught.value.reason is Reason.STORAGE_FAILED
    finally:
        s3_store.server.start()
    assert objects.read("abcd", 0, 100) == b"whole"
    assert objects.size("efgh") is None

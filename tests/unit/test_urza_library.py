"""The library on a real database and a real folder: what may enter, change, and be found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.blueprints import signature
from services.blueprints.digest import sha256
from services.blueprints.families import builtin_blueprints
from services.blueprints.spec import Blueprint
from services.chassis.errors import EsperError, Reason
from services.urza import library as library_module
from services.urza.library import Library, UploadHeader
from services.urza.metadata import BlueprintQuery, KernelQuery
from services.urza.objects import DirectoryObjects
from services.urza.records import BlueprintState, KernelRecord, KernelStatus, Outcome, OutcomeResult
from services.urza.sql_metadata import SqlMetadata
from services.urza.staging import Staging, Upload
from tests.infrastructure.kernels import BOTTLENECK, SPAN, WIDEN, WIDTH, SignedKernel, signed_kernel

_START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Bench:
    """A library with its ports at hand."""

    library: Library
    metadata: SqlMetadata
    folder: Path

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    def header(self, kernel: SignedKernel, **changes: object) -> UploadHeader:
        header = UploadHeader(
            kernel.manifest.blueprint.id, kernel.digest, kernel.signature, len(kernel.data), tags=("b", "a", "b")
        )
        return replace(header, **changes)  # type: ignore[arg-type]  # changes of several types

    def begin(self, kernel: SignedKernel, **changes: object) -> Upload:
        upload = self.library.begin_upload(self.header(kernel, **changes))
        assert isinstance(upload, Upload)
        return upload

    def upload(self, kernel: SignedKernel) -> KernelRecord:
        with self.begin(kernel) as upload:
            upload.append(kernel.data)
            return self.library.commit_upload(self.header(kernel), upload)

    def set_status(
        self,
        kernel: KernelRecord,
        status: KernelStatus,
        *,
        revision: int | None = None,
        attested: KernelStatus | None = None,
    ) -> KernelRecord:
        key = signature.load_private_key(self.keys)
        word = signature.attest_status(key, kernel.digest, (attested or status).value)
        return self.library.set_status(
            kernel.id, status, blueprint=kernel.blueprint, reason="because", attestation=word, revision=revision
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    metadata = SqlMetadata(f"sqlite:///{tmp_path / 'library.sqlite'}")
    signature.generate_keypair(tmp_path / "keys")
    seconds = itertools.count()
    library = Library(
        metadata,
        DirectoryObjects(tmp_path / "artifacts"),
        Staging(tmp_path / "uploads"),
        tmp_path / "keys",
        clock=lambda: _START + timedelta(seconds=next(seconds)),
    )
    library.seed()
    yield Bench(library, metadata, tmp_path)
    metadata.close()


def _refusal(call: object) -> EsperError:
    with pytest.raises(EsperError) as caught:
        call()  # type: ignore[operator]  # a lambda of the tests below
    return caught.value


def _variant(reduction: int) -> Blueprint:
    return replace(BOTTLENECK, parameters={**BOTTLENECK.parameters, "reduction": reduction})


# Blueprints.


def test_the_built_in_blueprints_are_put_in_once(bench: Bench) -> None:
    assert bench.library.seed() == []
    found = bench.library.blueprints(BlueprintQuery(tags=("builtin",)), after=None, limit=10)
    assert {record.id for record in found} == {blueprint.id for blueprint in builtin_blueprints()}
    assert bench.library.blueprint(WIDEN.id).tags == ("builtin", "widen")


def test_a_blueprint_is_created_once(bench: Bench) -> None:
    record, created = bench.library.create_blueprint(_variant(2), display_name="two", tags=("x", "a", "x"))
    assert created
    assert record.tags == ("a", "x")
    assert bench.library.create_blueprint(_variant(2), display_name="other") == (record, False)


@pytest.mark.parametrize(
    ("blueprint", "reason", "field"),
    [
        (Blueprint("nothing"), Reason.UNKNOWN_FAMILY, "spec.family"),
        (_variant(0), Reason.BLUEPRINT_INVALID, "spec.parameters.reduction"),
        (Blueprint("widen", {"a": 1}), Reason.BLUEPRINT_INVALID, "spec.parameters.a"),
    ],
)
def test_an_unsound_blueprint_is_refused(bench: Bench, blueprint: Blueprint, reason: Reason, field: str) -> None:
    error = _refusal(lambda: bench.library.create_blueprint(blueprint))
    assert error.reason is reason
    assert [violation.field for violation in error.violations] == [field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("display_name", "x" * 513),
        ("description", "x" * 4097),
        ("description", "a\0b"),
        ("tags", ["a"] * 65),
        ("tags", ["Upper"]),
        ("tags", [""]),
        ("tags", ["a b"]),
    ],
)
def test_texts_and_tags_are_bounded(bench: Bench, field: str, value: object) -> None:
    arguments = {field: value}
    error = _refusal(lambda: bench.library.create_blueprint(_variant(2), **arguments))  # type: ignore[arg-type]  # one of several fields
    assert error.reason is Reason.INVALID_FIELD
    assert error.metadata["field"].startswith(field)


def test_lineage_goes_up_and_down(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [BOTTLENECK.id]
    for reduction, parent in ((2, 0), (8, 0), (16, 1), (32, 3)):
        record, _ = bench.library.create_blueprint(_variant(reduction), parent=ids[parent])
        ids.append(record.id)
    bench.library.archive_blueprint(ids[2], revision=None)
    lineage = bench.library.lineage(ids[3])
    assert [record.id for record in lineage.ancestors] == [ids[0], ids[1]]
    assert lineage.blueprint.id == ids[3]
    assert [record.id for record in lineage.descendants] == [ids[4]]
    whole = bench.library.lineage(ids[0])
    assert [record.id for record in whole.descendants] == ids[1:]
    assert not whole.truncated
    monkeypatch.setattr(library_module, "MAX_DESCENDANTS", 3)
    short = bench.library.lineage(ids[0])
    assert [record.id for record in short.descendants] == ids[1:4]
    assert short.truncated


def test_a_parent_must_be_there_and_be_another(bench: Bench) -> None:
    library = bench.library
    assert _refusal(lambda: library.create_blueprint(_variant(2), parent="0" * 32)).reason is Reason.UNKNOWN_BLUEPRINT
    own = _variant(2).id
    assert _refusal(lambda: library.create_blueprint(_variant(2), parent=own)).metadata["field"] == "parent"


def test_archiving_needs_the_etag_and_is_final(bench: Bench) -> None:
    library = bench.library
    assert _refusal(lambda: library.archive_blueprint(WIDEN.id, revision=5)).reason is Reason.ETAG_MISMATCH
    record, changed = library.archive_blueprint(WIDEN.id, revision=1)
    assert changed
    assert (record.state, record.revision) == (BlueprintState.ARCHIVED, 2)
    assert record.archive_time is not None
    assert library.archive_blueprint(WIDEN.id, revision=1) == (record, False)
    assert WIDEN.id not in {found.id for found in library.blueprints(BlueprintQuery(), after=None, limit=10)}
    error = _refusal(lambda: library.archive_blueprint("0" * 32, revision=None))
    assert error.reason is Reason.UNKNOWN_BLUEPRINT


# Uploads.


def test_an_upload_becomes_a_kernel(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys, latency_seconds=0.5, memory_bytes=77, seed=9)
    record = bench.upload(kernel)
    assert bench.library.kernel(record.id, blueprint=BOTTLENECK.id) == record
    assert (record.status, record.tags, record.init_seed) == (KernelStatus.UPLOADED, ("a", "b"), 9)
    assert record.characterization == kernel.manifest.characterization
    assert record.interface == SPAN
    assert b"".join(bench.library.download(record, 0)) == kernel.data
    assert b"".join(bench.library.download(record, 100)) == kernel.data[100:]
    assert list(bench.library.download(record, len(kernel.data))) == []
    assert bench.library.upload_progress(kernel.digest) == (len(kernel.data), record)
    assert bench.library.begin_upload(bench.header(kernel)) == record, "there already"
    assert list((bench.folder / "uploads").iterdir()) == []


def test_an_upload_is_resumed(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys)
    with bench.begin(kernel) as upload:
        upload.append(kernel.data[:100])
        error = _refusal(lambda: bench.library.commit_upload(bench.header(kernel), upload))
        assert error.reason is Reason.UPLOAD_OFFSET_MISMATCH
        assert error.metadata == {"committed_bytes": "100"}
    assert bench.library.upload_progress(kernel.digest) == (100, None)
    with bench.begin(kernel, offset_bytes=100) as upload:
        upload.append(kernel.data[100:])
        bench.library.commit_upload(bench.header(kernel), upload)


def test_a_crash_between_bytes_and_record_is_mended_by_the_same_upload(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys)
    source = bench.folder / "source"
    source.write_bytes(kernel.data)
    DirectoryObjects(bench.folder / "artifacts").put(kernel.digest.hex(), source)
    record = bench.upload(kernel)
    assert b"".join(bench.library.download(record, 0)) == kernel.data


def test_an_upload_of_a_stranger_is_refused_before_a_byte_is_kept(bench: Bench, tmp_path: Path) -> None:
    kernel = signed_kernel(tmp_path / "stranger")
    assert _refusal(lambda: bench.begin(kernel)).reason is Reason.SIGNATURE_INVALID
    own = signed_kernel(bench.keys)
    assert _refusal(lambda: bench.begin(own, signature=b"x")).reason is Reason.SIGNATURE_INVALID
    assert list((bench.folder / "uploads").iterdir()) == []
    (bench.keys / "tezzeret.pub").unlink()
    assert _refusal(lambda: bench.begin(own)).reason is Reason.NO_TRUSTED_KEY


def test_a_header_is_checked(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys)
    assert _refusal(lambda: bench.begin(kernel, size_bytes=0)).reason is Reason.INVALID_FIELD
    assert _refusal(lambda: bench.begin(kernel, size_bytes=2**28 + 1)).reason is Reason.ARTIFACT_TOO_LARGE
    for offset in (-1, len(kernel.data) + 1):
        assert _refusal(lambda offset=offset: bench.begin(kernel, offset_bytes=offset)).reason is Reason.INVALID_FIELD
    assert _refusal(lambda: bench.begin(kernel, tags=("A",))).reason is Reason.INVALID_FIELD
    assert _refusal(lambda: bench.begin(kernel, blueprint="0" * 32)).reason is Reason.UNKNOWN_BLUEPRINT
    bench.library.archive_blueprint(BOTTLENECK.id, revision=None)
    assert _refusal(lambda: bench.begin(kernel)).reason is Reason.BLUEPRINT_ARCHIVED


def test_bytes_without_their_digest_are_refused_and_dropped(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys)
    with bench.begin(kernel) as upload:
        upload.append(kernel.data[:-1] + bytes([kernel.data[-1] ^ 1]))
        error = _refusal(lambda: bench.library.commit_upload(bench.header(kernel), upload))
    assert error.reason is Reason.DIGEST_MISMATCH
    assert bench.library.upload_progress(kernel.digest) == (0, None)
    bench.upload(kernel)


def test_signed_bytes_that_are_no_kernel_are_refused(bench: Bench) -> None:
    junk = b"not a kernel at all"
    word = signature.sign(signature.load_private_key(bench.keys), sha256(junk))
    kernel = replace(signed_kernel(bench.keys), data=junk, digest=sha256(junk), signature=word)
    assert _refusal(lambda: bench.upload(kernel)).reason is Reason.ARTIFACT_INVALID


def test_a_kernel_of_another_blueprint_is_refused(bench: Bench) -> None:
    kernel = signed_kernel(bench.keys)
    header = bench.header(kernel, blueprint=WIDEN.id)
    with bench.begin(kernel, blueprint=WIDEN.id) as upload:
        upload.append(kernel.data)
        error = _refusal(lambda: bench.library.commit_upload(header, upload))
    assert error.reason is Reason.ARTIFACT_INVALID
    assert BOTTLENECK.id in error.message


def test_damage_in_the_store_is_found_before_the_last_chunk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bench.upload(signed_kernel(bench.keys))
    path = bench.folder / "artifacts" / record.digest.hex()[:2] / record.digest.hex()
    data = path.read_bytes()
    monkeypatch.setattr(library_module, "CHUNK_BYTES", 1000)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    chunks: list[bytes] = []
    assert _refusal(lambda: chunks.extend(bench.library.download(record, 0))).reason is Reason.DIGEST_MISMATCH
    assert 0 < sum(map(len, chunks)) < len(data)
    path.write_bytes(data[:-1])
    assert _refusal(lambda: list(bench.library.download(record, 10))).reason is Reason.DIGEST_MISMATCH
    path.unlink()
    assert _refusal(lambda: list(bench.library.download(record, 0))).reason is Reason.STORAGE_FAILED
    for offset in (-1, len(data) + 1):
        error = _refusal(lambda offset=offset: list(bench.library.download(record, offset)))
        assert error.metadata["field"] == "offset_bytes"


# Status, resolution, outcomes.


def test_a_kernel_walks_its_status_machine(bench: Bench) -> None:
    kernel = bench.upload(signed_kernel(bench.keys))
    validated = bench.set_status(kernel, KernelStatus.VALIDATED, revision=1)
    assert (validated.status, validated.status_reason, validated.revision) == (KernelStatus.VALIDATED, "because", 2)
    assert bench.set_status(kernel, KernelStatus.VALIDATED, revision=1) == validated, "told again"
    error = _refusal(lambda: bench.set_status(kernel, KernelStatus.REJECTED))
    assert error.reason is Reason.KERNEL_STATUS_CONFLICT
    assert "allowed: RETIRED" in error.message
    assert _refusal(lambda: bench.set_status(kernel, KernelStatus.RETIRED, revision=1)).reason is Reason.ETAG_MISMATCH
    assert bench.set_status(kernel, KernelStatus.RETIRED, revision=2).status is KernelStatus.RETIRED
    assert "it is the end" in _refusal(lambda: bench.set_status(kernel, KernelStatus.VALIDATED)).message


def test_only_the_validator_sets_a_status(bench: Bench) -> None:
    kernel = bench.upload(signed_kernel(bench.keys))
    error = _refusal(lambda: bench.set_status(kernel, KernelStatus.VALIDATED, attested=KernelStatus.REJECTED))
    assert error.reason is Reason.SIGNATURE_INVALID
    assert bench.library.kernel(kernel.id).status is KernelStatus.UPLOADED
    other = replace(kernel, blueprint=WIDEN.id)
    assert _refusal(lambda: bench.set_status(other, KernelStatus.VALIDATED)).reason is Reason.KERNEL_NOT_FOUND


def test_resolution_says_why_there_is_nothing(bench: Bench) -> None:
    library, place = bench.library, signature.interface_signature(SPAN)

    def resolve(**changes: object) -> KernelRecord:
        arguments: dict[str, object] = {"size": 2, "target": "cpu", **changes}
        return library.resolve(BOTTLENECK.id, place, **arguments)  # type: ignore[arg-type]  # of several types

    error = _refusal(lambda: library.resolve("0" * 32, place, size=2, target="cpu"))
    assert error.reason is Reason.UNKNOWN_BLUEPRINT
    error = _refusal(resolve)
    assert error.reason is Reason.NO_KERNEL
    assert error.metadata["interface_signature"] == place
    kernel = bench.upload(signed_kernel(bench.keys, seed=3))
    error = _refusal(resolve)
    assert error.reason is Reason.NO_VALIDATED_KERNEL
    assert error.metadata["status"] == "UPLOADED"
    bench.set_status(kernel, KernelStatus.VALIDATED)
    assert resolve().id == kernel.id
    assert resolve(init_seed=3).id == kernel.id
    for change in ({"size": 3}, {"target": "cuda"}, {"init_seed": 4}):
        assert _refusal(lambda change=change: resolve(**change)).reason is Reason.NO_KERNEL
    library.archive_blueprint(BOTTLENECK.id, revision=None)
    assert _refusal(resolve).reason is Reason.BLUEPRINT_ARCHIVED


def test_outcomes_are_counted_with_the_kernel(bench: Bench) -> None:
    kernel = bench.upload(signed_kernel(bench.keys, blueprint=WIDEN, interface=WIDTH, size=4))
    outcome = Outcome("runs/r/seeds/s", OutcomeResult.FOSSILIZED)
    record = bench.library.record_outcome(kernel.id, outcome, blueprint=WIDEN.id)
    assert record.outcomes.results == {OutcomeResult.FOSSILIZED: 1}
    assert bench.library.kernels(KernelQuery(family="widen"), after=None, limit=5) == [record]
    error = _refusal(lambda: bench.library.record_outcome("0" * 32, outcome, blueprint=WIDEN.id))
    assert error.reason is Reason.KERNEL_NOT_FOUND


def test_changes_that_meet_another_change_are_told_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = bench.upload(signed_kernel(bench.keys))
    stale_blueprint, stale_kernel = bench.library.blueprint(BOTTLENECK.id), kernel
    bench.metadata.set_blueprint_state(BOTTLENECK.id, revision=1, state=BlueprintState.ACTIVE, archive_time=None)
    bench.metadata.set_kernel_status(kernel.id, revision=1, status=KernelStatus.UPLOADED, reason="", time=_START)
    # As another replica would see them: read before the change, written after it.
    monkeypatch.setattr(bench.metadata, "blueprint", lambda _: stale_blueprint)
    monkeypatch.setattr(bench.metadata, "kernel", lambda _: stale_kernel)
    error = _refusal(lambda: bench.library.archive_blueprint(BOTTLENECK.id, revision=None))
    assert error.reason is Reason.ETAG_MISMATCH
    assert _refusal(lambda: bench.set_status(kernel, KernelStatus.VALIDATED)).reason is Reason.ETAG_MISMATCH

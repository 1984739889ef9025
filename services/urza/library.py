"""The library: what may enter it, what may change in it, what it finds. Knows no gRPC and no SQL.

All methods block on the database or the disk; call them off the event loop. They raise EsperError, and whatever the
ports raise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints import artifact, families, signature
from services.blueprints.digest import resource_id
from services.blueprints.families import FAMILIES
from services.blueprints.spec import Blueprint, SpecError
from services.chassis.errors import EsperError, FieldViolation, Reason, invalid, not_found
from services.urza.metadata import BlueprintQuery, Cursor, KernelQuery, MetadataStore
from services.urza.objects import ObjectStore
from services.urza.records import (
    STATUS_TRANSITIONS,
    BlueprintRecord,
    BlueprintState,
    KernelRecord,
    KernelStatus,
    Outcome,
)
from services.urza.staging import Staging, Upload, offset_mismatch

CHUNK_BYTES = 2**20
"""Artifacts travel in pieces of at most this."""
MAX_DESCENDANTS = 1000
MAX_TAGS = 64
_MAX_NAME = 512
_MAX_TEXT = 4096
_TAG = re.compile(r"[a-z0-9._:-]{1,64}")


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a blueprint comes from and what came of it.

    Attributes:
        ancestors: The oldest first.
        blueprint: Itself.
        descendants: Generation by generation.
        truncated: Whether there are more descendants than these.
    """

    ancestors: tuple[BlueprintRecord, ...]
    blueprint: BlueprintRecord
    descendants: tuple[BlueprintRecord, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class UploadHeader:
    """What an upload is about.

    Attributes:
        blueprint: Id of the blueprint it was compiled from.
        digest: SHA-256 of the whole artifact, 32 bytes.
        signature: Of the compiler over the digest.
        size_bytes: Size of the whole artifact.
        offset_bytes: Where the first chunk belongs.
        tags: Words to find it by.
    """

    blueprint: str
    digest: bytes
    signature: bytes
    size_bytes: int
    offset_bytes: int = 0
    tags: tuple[str, ...] = ()


class Library:
    """Blueprints and kernels, on three ports.

    Args:
        metadata: Records.
        objects: Artifacts.
        staging: Uploads under way.
        keys_dir: Folder of the public key that vouches for kernels; read when it is needed.
        clock: The time now, UTC.
    """

    def __init__(
        self,
        metadata: MetadataStore,
        objects: ObjectStore,
        staging: Staging,
        keys_dir: Path,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._metadata = metadata
        self._objects = objects
        self._staging = staging
        self._keys_dir = keys_dir
        self._clock = clock

    # Blueprints.

    def seed(self) -> list[BlueprintRecord]:
        """Put the built-in blueprints in; returns those that were not there. Idempotent."""
        added = []
        for blueprint in families.builtin_blueprints():
            family = FAMILIES[blueprint.family]
            record, created = self.create_blueprint(
                blueprint, display_name=family.name, description=family.description, tags=("builtin", family.name)
            )
            if created:
                added.append(record)
        return added

    def create_blueprint(
        self,
        blueprint: Blueprint,
        *,
        display_name: str = "",
        description: str = "",
        tags: Sequence[str] = (),
        parent: str = "",
    ) -> tuple[BlueprintRecord, bool]:
        """Add a blueprint, unless it is there: that one, and whether it was added.

        Raises:
            EsperError: UNKNOWN_FAMILY, BLUEPRINT_INVALID, INVALID_FIELD, UNKNOWN_BLUEPRINT (the parent).
        """
        _check_blueprint(blueprint)
        _check_text(display_name, "display_name", _MAX_NAME)
        _check_text(description, "description", _MAX_TEXT)
        if parent:
            if parent == blueprint.id:
                raise invalid("parent", "a blueprint cannot come from itself", "name another, or none")
            self.blueprint(parent)
        record = BlueprintRecord(
            blueprint=blueprint,
            display_name=display_name,
            description=description,
            tags=_checked_tags(tags),
            parent=parent,
            state=BlueprintState.ACTIVE,
            create_time=self._clock(),
        )
        return self._metadata.add_blueprint(record)

    def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """The blueprint of an id; raises EsperError (UNKNOWN_BLUEPRINT)."""
        record = self._metadata.blueprint(blueprint_id)
        if record is None:
            raise not_found("blueprint", f"blueprints/{blueprint_id}", reason=Reason.UNKNOWN_BLUEPRINT)
        return record

    def blueprints(self, query: BlueprintQuery, *, after: Cursor | None, limit: int) -> list[BlueprintRecord]:
        """Blueprints, oldest first, behind ``after``."""
        return self._metadata.blueprints(query, after=after, limit=limit)

    def archive_blueprint(self, blueprint_id: str, *, revision: int | None) -> tuple[BlueprintRecord, bool]:
        """Take a blueprint out of use: it, and whether that changed anything.

        Args:
            blueprint_id: Which.
            revision: As last read; ``None``: whatever it is now.

        Raises:
            EsperError: UNKNOWN_BLUEPRINT, ETAG_MISMATCH.
        """
        record = self.blueprint(blueprint_id)
        if record.state is BlueprintState.ARCHIVED:
            return record, False
        time = self._clock()
        if revision not in {None, record.revision} or not self._metadata.set_blueprint_state(
            blueprint_id, revision=record.revision, state=BlueprintState.ARCHIVED, archive_time=time
        ):
            raise _changed(f"blueprints/{blueprint_id}")
        return self.blueprint(blueprint_id), True

    def lineage(self, blueprint_id: str) -> Lineage:
        """Ancestors and descendants of a blueprint; raises EsperError (UNKNOWN_BLUEPRINT)."""
        record = self.blueprint(blueprint_id)
        ancestors: list[BlueprintRecord] = []
        parent = record.parent
        while parent:  # ends: a parent is there before its child, and neither ever changes
            ancestors.append(self.blueprint(parent))
            parent = ancestors[-1].parent
        descendants: list[BlueprintRecord] = []
        generation = [record.id]
        while generation and len(descendants) <= MAX_DESCENDANTS:
            query = BlueprintQuery(include_archived=True, parents=tuple(generation))
            children = self._metadata.blueprints(query, after=None, limit=MAX_DESCENDANTS + 1)
            descendants += children
            generation = [child.id for child in children]
        return Lineage(
            ancestors=tuple(reversed(ancestors)),
            blueprint=record,
            descendants=tuple(descendants[:MAX_DESCENDANTS]),
            truncated=len(descendants) > MAX_DESCENDANTS,
        )

    # Kernels.

    def kernel(self, kernel_id: str, *, blueprint: str | None = None) -> KernelRecord:
        """The kernel of an id, of this blueprint if one is named; raises EsperError (KERNEL_NOT_FOUND)."""
        record = self._metadata.kernel(kernel_id)
        if record is None or blueprint not in {None, record.blueprint}:
            name = f"blueprints/{blueprint or '-'}/kernels/{kernel_id}"
            raise not_found("kernel", name, reason=Reason.KERNEL_NOT_FOUND)
        return record

    def kernels(self, query: KernelQuery, *, after: Cursor | None, limit: int) -> list[KernelRecord]:
        """Kernels, oldest first, behind ``after``."""
        return self._metadata.kernels(query, after=after, limit=limit)

    def resolve(
        self, blueprint_id: str, interface_signature: str, *, size: int, target: str, init_seed: int | None = None
    ) -> KernelRecord:
        """The best validated kernel for a place.

        Raises:
            EsperError: UNKNOWN_BLUEPRINT, BLUEPRINT_ARCHIVED, NO_KERNEL, NO_VALIDATED_KERNEL.
        """
        self._active_blueprint(blueprint_id)
        found = self._metadata.best_kernel(
            KernelQuery(
                blueprint=blueprint_id,
                interface_signature=interface_signature,
                size=size,
                target=target,
                init_seed=init_seed,
            )
        )
        facts = {
            "blueprint": f"blueprints/{blueprint_id}",
            "interface_signature": interface_signature,
            "size": str(size),
            "target": target,
        }
        if found is None:
            raise EsperError(
                f"no kernel of blueprints/{blueprint_id} was compiled for this place at size {size} on {target}: "
                "create a compile job",
                reason=Reason.NO_KERNEL,
                metadata=facts,
            )
        if found.status is not KernelStatus.VALIDATED:
            raise EsperError(
                f"kernels for this place exist, none is validated (the best is {found.status}): "
                "wait for its validation, or create a compile job",
                reason=Reason.NO_VALIDATED_KERNEL,
                metadata={**facts, "status": found.status.value},
            )
        return found

    def set_status(
        self,
        kernel_id: str,
        status: KernelStatus,
        *,
        blueprint: str,
        reason: str,
        attestation: bytes,
        revision: int | None,
    ) -> KernelRecord:
        """Validate, reject or retire a kernel, on the validator's word.

        Args:
            kernel_id: Which.
            status: The status it gets.
            blueprint: Id of its blueprint.
            reason: Why, in words.
            attestation: ``signature.attest_status`` of digest and status.
            revision: As last read; ``None``: whatever it is now.

        Raises:
            EsperError: KERNEL_NOT_FOUND, SIGNATURE_INVALID, NO_TRUSTED_KEY, KERNEL_STATUS_CONFLICT, ETAG_MISMATCH,
                INVALID_FIELD.
        """
        _check_text(reason, "reason", _MAX_TEXT)
        record = self.kernel(kernel_id, blueprint=blueprint)
        try:
            signature.verify_status(self._trusted_key(), record.digest, status.value, attestation)
        except signature.SignatureError as error:
            raise EsperError(
                "attestation: the validator did not sign this status of this kernel", reason=Reason.SIGNATURE_INVALID
            ) from error
        if record.status is status:
            return record
        if status not in STATUS_TRANSITIONS[record.status]:
            allowed = ", ".join(sorted(STATUS_TRANSITIONS[record.status])) or "none, it is the end"
            raise EsperError(
                f"a kernel that is {record.status} cannot become {status} (allowed: {allowed})",
                reason=Reason.KERNEL_STATUS_CONFLICT,
                metadata={"status": record.status.value},
            )
        if revision not in {None, record.revision} or not self._metadata.set_kernel_status(
            kernel_id, revision=record.revision, status=status, reason=reason, time=self._clock()
        ):
            raise _changed(f"blueprints/{blueprint}/kernels/{kernel_id}")
        return self.kernel(kernel_id)

    def record_outcome(self, kernel_id: str, outcome: Outcome, *, blueprint: str) -> KernelRecord:
        """Note what became of a seed; told again, the last word counts. Raises EsperError (KERNEL_NOT_FOUND)."""
        self.kernel(kernel_id, blueprint=blueprint)
        self._metadata.record_outcome(kernel_id, outcome, self._clock())
        return self.kernel(kernel_id)

    # Artifacts.

    def begin_upload(self, header: UploadHeader) -> KernelRecord | Upload:
        """The kernel, if it is there; else a place for its bytes, to be closed by the caller.

        The signature is checked here: nothing that a stranger signed is ever stored.

        Raises:
            EsperError: UNKNOWN_BLUEPRINT, BLUEPRINT_ARCHIVED, INVALID_FIELD, ARTIFACT_TOO_LARGE, SIGNATURE_INVALID,
                NO_TRUSTED_KEY, UPLOAD_OFFSET_MISMATCH, UPLOAD_IN_PROGRESS, TOO_MANY_UPLOADS, STORAGE_FULL.
        """
        if not 1 <= header.size_bytes <= artifact.MAX_ARTIFACT_BYTES:
            raise EsperError(
                f"size_bytes: {header.size_bytes} is not within 1..{artifact.MAX_ARTIFACT_BYTES}",
                reason=Reason.ARTIFACT_TOO_LARGE if header.size_bytes > 0 else Reason.INVALID_FIELD,
                metadata={"field": "header.size_bytes"},
            )
        if not 0 <= header.offset_bytes <= header.size_bytes:
            raise invalid("header.offset_bytes", f"{header.offset_bytes} is outside the artifact", "ask GetUpload")
        _checked_tags(header.tags)
        self._verify(header.digest, header.signature)
        there = self._metadata.kernel(resource_id(header.digest))
        if there is not None and there.blueprint == header.blueprint:
            return there
        self._active_blueprint(header.blueprint)
        return self._staging.open(header.digest, header.size_bytes, header.offset_bytes)

    def commit_upload(self, header: UploadHeader, upload: Upload) -> KernelRecord:
        """Check what has arrived and make it a kernel, all or nothing.

        Raises:
            EsperError: UPLOAD_OFFSET_MISMATCH (bytes are missing; they can follow), DIGEST_MISMATCH, ARTIFACT_INVALID
                (it is dropped), STORAGE_FULL.
        """
        with upload.working():
            return self._commit(header, upload)

    def _commit(self, header: UploadHeader, upload: Upload) -> KernelRecord:
        if not upload.complete:
            raise offset_mismatch(f"{upload.size - upload.received} bytes are missing", upload.received)
        try:
            kernel = self._opened(header, upload.read())
        except EsperError:
            upload.discard()  # more of the same bytes would never make it right
            raise
        manifest, time = kernel.manifest, self._clock()
        record = KernelRecord(
            id=resource_id(header.digest),
            blueprint=manifest.blueprint.id,
            family=manifest.family,
            digest=header.digest,
            signature=header.signature,
            size_bytes=header.size_bytes,
            interface=manifest.interface,
            interface_signature=manifest.interface_signature,
            size=manifest.size,
            init_seed=manifest.seed,
            characterization=manifest.characterization,
            status=KernelStatus.UPLOADED,
            status_reason="",
            tags=_checked_tags(header.tags),
            create_time=time,
            status_time=time,
        )
        # First the bytes, then the record that makes them a kernel: a crash between leaves bytes that the same upload,
        # told again, overwrites with themselves.
        self._objects.put(header.digest.hex(), upload.path)
        record, _ = self._metadata.add_kernel(record)
        upload.discard()
        return record

    def upload_progress(self, digest: bytes) -> tuple[int, KernelRecord | None]:
        """Bytes that are safe here, and the kernel if it is whole."""
        record = self._metadata.kernel(resource_id(digest))
        if record is not None:
            return record.size_bytes, record
        return self._staging.committed_bytes(digest), None

    def download(self, record: KernelRecord, offset: int) -> Iterator[bytes]:
        """The artifact from ``offset`` on, in chunks; read from its beginning, its digest is checked on the way.

        Raises:
            EsperError: INVALID_FIELD (offset beyond the end), DIGEST_MISMATCH, STORAGE_FAILED.
        """
        if not 0 <= offset <= record.size_bytes:
            raise invalid("offset_bytes", f"{offset} is not within 0..{record.size_bytes}", "begin at 0")
        key, position, hasher = record.digest.hex(), offset, hashlib.sha256()
        while position < record.size_bytes:
            chunk = self._objects.read(key, position, min(CHUNK_BYTES, record.size_bytes - position))
            position += len(chunk)
            hasher.update(chunk)
            # Before the last chunk goes out: nobody gets a whole artifact that is damaged.
            short = not chunk
            if short or (position == record.size_bytes and offset == 0 and hasher.digest() != record.digest):
                raise EsperError(
                    f"what is stored of kernel {record.id} does not have its digest: compile it again",
                    reason=Reason.DIGEST_MISMATCH,
                    metadata={"digest": key},
                )
            yield chunk

    def _opened(self, header: UploadHeader, data: bytes) -> artifact.Kernel:
        try:
            kernel = artifact.open_verified(data, header.digest, header.signature, self._trusted_key())
            families.check_kernel(kernel)
        except artifact.DigestMismatchError as error:
            raise EsperError(str(error), reason=Reason.DIGEST_MISMATCH) from error
        except (artifact.ArtifactError, SpecError) as error:
            raise EsperError(f"the artifact is no kernel: {error}", reason=Reason.ARTIFACT_INVALID) from error
        if kernel.manifest.blueprint.id != header.blueprint:
            raise EsperError(
                f"the artifact is a kernel of blueprints/{kernel.manifest.blueprint.id}, "
                f"not of blueprints/{header.blueprint}",
                reason=Reason.ARTIFACT_INVALID,
            )
        return kernel

    def _verify(self, digest: bytes, word: bytes) -> None:
        try:
            signature.verify(self._trusted_key(), digest, word)
        except signature.SignatureError as error:
            raise EsperError(f"header.signature: {error}", reason=Reason.SIGNATURE_INVALID) from error

    def _trusted_key(self) -> Ed25519PublicKey:
        try:
            return signature.load_public_key(self._keys_dir)
        except signature.SignatureError as error:
            raise EsperError(str(error), reason=Reason.NO_TRUSTED_KEY) from error

    def _active_blueprint(self, blueprint_id: str) -> BlueprintRecord:
        record = self.blueprint(blueprint_id)
        if record.state is BlueprintState.ARCHIVED:
            raise EsperError(
                f"blueprints/{blueprint_id} is archived: choose another",
                reason=Reason.BLUEPRINT_ARCHIVED,
                metadata={"name": f"blueprints/{blueprint_id}"},
            )
        return record


def _check_blueprint(blueprint: Blueprint) -> None:
    try:
        families.check(blueprint)
    except SpecError as error:
        field = error.field.replace("blueprint.", "spec.", 1)
        raise EsperError(
            f"{field}: {error.why}",
            reason=Reason.BLUEPRINT_INVALID if blueprint.family in FAMILIES else Reason.UNKNOWN_FAMILY,
            metadata={"field": field},
            violations=[FieldViolation(field, error.why)],
        ) from error


def _check_text(text: str, field: str, limit: int) -> None:
    if len(text) > limit or "\0" in text:
        raise invalid(field, f"has {len(text)} characters or a NUL", f"give at most {limit}, without NUL")


def _checked_tags(tags: Sequence[str]) -> tuple[str, ...]:
    if len(tags) > MAX_TAGS:
        raise invalid("tags", f"{len(tags)} are too many", f"give at most {MAX_TAGS}")
    for index, tag in enumerate(tags):
        if not _TAG.fullmatch(tag):
            raise invalid(f"tags[{index}]", f"{tag[:80]!r} is no tag", "use 1..64 of a-z, 0-9, '.', '_', ':' and '-'")
    return tuple(sorted(set(tags)))


def _changed(name: str) -> EsperError:
    return EsperError(
        f"{name} changed since it was read: read it again", reason=Reason.ETAG_MISMATCH, metadata={"name": name}
    )

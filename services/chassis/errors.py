"""The one tree and the one table of errors.

Every failure a user can meet is an :class:`EsperError` with a :class:`Reason`. The reason decides the gRPC status
code and is what programs match on; the message names what is wrong and the way out, for people. On the wire an
error is a ``google.rpc.Status`` with one ``ErrorInfo`` (domain ``esper``), and BadRequest, RetryInfo or ResourceInfo
where they help (AIP-193).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN: Final = "esper"
_DETAILS_KEY: Final = "grpc-status-details-bin"
# Bounds of what an error carries, in bytes of UTF-8; the message is percent-encoded, up to three times as long.
_MESSAGE_BYTES: Final = 800
_TEXT_BYTES: Final = 250
_VIOLATIONS: Final = 5
_Code = grpc.StatusCode
_M = TypeVar("_M", bound=Message)


class Reason(enum.StrEnum):
    """THE table: reason -> gRPC code, what it means, the way out."""

    code: grpc.StatusCode
    meaning: str
    way_out: str

    def __new__(cls, name: str, code: grpc.StatusCode, meaning: str, way_out: str) -> Self:
        """One row of the table; the value is the name that travels on the wire."""
        row = str.__new__(cls, name)
        row._value_ = name
        row.code, row.meaning, row.way_out = code, meaning, way_out
        return row

    # What a request looks like.
    REQUIRED_FIELD = ("REQUIRED_FIELD", _Code.INVALID_ARGUMENT, "a required field is empty", "fill it")
    INVALID_FIELD = (
        "INVALID_FIELD",
        _Code.INVALID_ARGUMENT,
        "a field's value makes no sense",
        "see the field's comment",
    )
    INVALID_NAME = (
        "INVALID_NAME",
        _Code.INVALID_ARGUMENT,
        "a resource name has the wrong form",
        "see the pattern named",
    )
    INVALID_PAGE_TOKEN = (
        "INVALID_PAGE_TOKEN",
        _Code.INVALID_ARGUMENT,
        "the page token is not of this list and filter",
        "start from the first page",
    )
    REQUEST_ID_REUSED = (
        "REQUEST_ID_REUSED",
        _Code.ALREADY_EXISTS,
        "the request id was used for another request",
        "choose a new one",
    )
    ETAG_MISMATCH = (
        "ETAG_MISMATCH",
        _Code.ABORTED,
        "the resource changed since it was read",
        "read it again, then repeat",
    )
    RESUME_TOKEN_EXPIRED = (
        "RESUME_TOKEN_EXPIRED",
        _Code.OUT_OF_RANGE,
        "changes since the token are no longer kept",
        "watch without a token: it begins with a snapshot",
    )
    WATCHER_TOO_SLOW = (
        "WATCHER_TOO_SLOW",
        _Code.RESOURCE_EXHAUSTED,
        "the watcher did not keep up and was dropped",
        "resume from the last token, read faster",
    )
    # Servers and their neighbours.
    INTERNAL = (
        "INTERNAL",
        _Code.INTERNAL,
        "a defect of the server",
        "report the error id; the server's log has the rest",
    )
    NOT_FOUND = ("NOT_FOUND", _Code.NOT_FOUND, "there is no such resource", "list what exists")
    DEADLINE_EXCEEDED = (
        "DEADLINE_EXCEEDED",
        _Code.DEADLINE_EXCEEDED,
        "the answer did not come in time",
        "allow more time, or look again later",
    )
    TOO_MANY_CALLS = (
        "TOO_MANY_CALLS",
        _Code.RESOURCE_EXHAUSTED,
        "the server has as many calls under way as it allows",
        "retry after the delay given",
    )
    DRAINING = ("DRAINING", _Code.UNAVAILABLE, "the server is shutting down", "connect again")
    UNAVAILABLE = ("UNAVAILABLE", _Code.UNAVAILABLE, "the service cannot be reached now", "retry")
    SERVICE_UNREACHABLE = (
        "SERVICE_UNREACHABLE",
        _Code.UNAVAILABLE,
        "a service does not answer at its address",
        "start it, or correct its address",
    )
    SERVICE_START_FAILED = ("SERVICE_START_FAILED", _Code.UNAVAILABLE, "a service could not start", "see its log")
    ADDRESS_UNKNOWN = (
        "ADDRESS_UNKNOWN",
        _Code.FAILED_PRECONDITION,
        "no address of a service is known",
        "set services.<name>.address",
    )
    PORT_IN_USE = ("PORT_IN_USE", _Code.UNAVAILABLE, "the port is taken", "choose another, or 0 for any")
    INSECURE_LISTENER = (
        "INSECURE_LISTENER",
        _Code.FAILED_PRECONDITION,
        "a non-loopback interface without TLS",
        "configure services.tls or set services.insecure",
    )
    BAD_TLS_FILES = (
        "BAD_TLS_FILES",
        _Code.FAILED_PRECONDITION,
        "certificate, key or CA cannot be used",
        "check the files named",
    )
    STORAGE_FULL = ("STORAGE_FULL", _Code.RESOURCE_EXHAUSTED, "the disk is full; what was there is intact", "free room")
    STORAGE_FAILED = (
        "STORAGE_FAILED",
        _Code.UNAVAILABLE,
        "a file could not be read or written",
        "check the path and its rights",
    )
    # Tamiyo.
    POLICY_NOT_FOUND = (
        "POLICY_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such policy or version",
        "ListPolicies shows those that exist",
    )
    UNKNOWN_ALGORITHM = (
        "UNKNOWN_ALGORITHM",
        _Code.INVALID_ARGUMENT,
        "there is no such algorithm",
        "use one of those named",
    )
    NO_OUTCOMES = (
        "NO_OUTCOMES",
        _Code.FAILED_PRECONDITION,
        "too few outcomes to learn from",
        "report more, or ask for fewer",
    )
    DECISION_NOT_FOUND = (
        "DECISION_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such decision",
        "ListDecisions shows those kept",
    )
    # Kasmina and Tolaria.
    RUN_NOT_FOUND = ("RUN_NOT_FOUND", _Code.NOT_FOUND, "no such run has attached", "ListRuns shows those known")
    RUN_NOT_ATTACHED = (
        "RUN_NOT_ATTACHED",
        _Code.UNAVAILABLE,
        "the run's training process is not attached now",
        "retry once it is back",
    )
    RUN_ALREADY_ATTACHED = (
        "RUN_ALREADY_ATTACHED",
        _Code.FAILED_PRECONDITION,
        "a newer process of the run is attached",
        "end the older process",
    )
    RUN_ALREADY_ENDED = ("RUN_ALREADY_ENDED", _Code.FAILED_PRECONDITION, "the run is over", "start or resume a run")
    SEED_NOT_FOUND = ("SEED_NOT_FOUND", _Code.NOT_FOUND, "there is no such seed", "ListSeeds shows those that exist")
    SLOT_NOT_FOUND = ("SLOT_NOT_FOUND", _Code.NOT_FOUND, "there is no such slot", "GetTopology shows those that exist")
    SLOT_NOT_FREE = (
        "SLOT_NOT_FREE",
        _Code.FAILED_PRECONDITION,
        "the slot is occupied, under embargo or locked",
        "wait, or choose another",
    )
    ILLEGAL_TRANSITION = (
        "ILLEGAL_TRANSITION",
        _Code.FAILED_PRECONDITION,
        "the lifecycle has no such transition",
        "see the lifecycle table",
    )
    ADAPTATION_NOT_FOUND = (
        "ADAPTATION_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such adaptation",
        "check the command id",
    )
    ADAPTATION_ALREADY_APPLIED = (
        "ADAPTATION_ALREADY_APPLIED",
        _Code.FAILED_PRECONDITION,
        "it cannot be cancelled any more",
        "cull its seed",
    )
    COMMAND_QUEUE_FULL = (
        "COMMAND_QUEUE_FULL",
        _Code.RESOURCE_EXHAUSTED,
        "too many commands wait for a safe point",
        "retry after the delay given",
    )
    HEALTH_NOT_MEASURED = (
        "HEALTH_NOT_MEASURED",
        _Code.NOT_FOUND,
        "no health has been measured yet",
        "ask again after an epoch of the growth window",
    )
    CHECKPOINT_NOT_FOUND = (
        "CHECKPOINT_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such checkpoint",
        "the run folder holds those kept",
    )
    CHECKPOINT_INVALID = (
        "CHECKPOINT_INVALID",
        _Code.DATA_LOSS,
        "a checkpoint is damaged or of another version",
        "resume from an older one",
    )
    DATA_INVALID = (
        "DATA_INVALID",
        _Code.DATA_LOSS,
        "a data file is missing, damaged or not the official one",
        "see the command named",
    )
    MODEL_INVALID = (
        "MODEL_INVALID",
        _Code.INVALID_ARGUMENT,
        "the network cannot be built or does not fit",
        "see the message",
    )
    TRAINING_FAILED = (
        "TRAINING_FAILED",
        _Code.ABORTED,
        "training became unstable and did not recover",
        "lower the learning rate",
    )
    EXPORT_FAILED = (
        "EXPORT_FAILED",
        _Code.FAILED_PRECONDITION,
        "the grown network could not be exported; the run itself is complete",
        "see the message",
    )
    RUN_LOCKED = ("RUN_LOCKED", _Code.FAILED_PRECONDITION, "another train.py holds the run folder", "end it first")
    RUN_FOLDER_INVALID = (
        "RUN_FOLDER_INVALID",
        _Code.FAILED_PRECONDITION,
        "it is no run folder of this format",
        "check the path",
    )
    # Blueprints, Urza, Tezzeret.
    BLUEPRINT_INVALID = (
        "BLUEPRINT_INVALID",
        _Code.INVALID_ARGUMENT,
        "the blueprint is outside the vocabulary",
        "see the field named",
    )
    UNKNOWN_BLUEPRINT = (
        "UNKNOWN_BLUEPRINT",
        _Code.NOT_FOUND,
        "there is no such blueprint",
        "ListBlueprints shows those that exist",
    )
    UNKNOWN_FAMILY = (
        "UNKNOWN_FAMILY",
        _Code.INVALID_ARGUMENT,
        "there is no such blueprint family",
        "use one of those named",
    )
    BLUEPRINT_DOES_NOT_FIT = (
        "BLUEPRINT_DOES_NOT_FIT",
        _Code.FAILED_PRECONDITION,
        "the blueprint does not fit the interface",
        "choose another slot or blueprint",
    )
    BLUEPRINT_ARCHIVED = (
        "BLUEPRINT_ARCHIVED",
        _Code.FAILED_PRECONDITION,
        "the blueprint is archived",
        "choose another",
    )
    KERNEL_NOT_FOUND = (
        "KERNEL_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such kernel",
        "ListKernels shows those that exist",
    )
    NO_KERNEL = (
        "NO_KERNEL",
        _Code.NOT_FOUND,
        "nothing was compiled for this interface and size",
        "create a compile job",
    )
    NO_VALIDATED_KERNEL = (
        "NO_VALIDATED_KERNEL",
        _Code.NOT_FOUND,
        "kernels exist but none is validated",
        "wait, or create a compile job",
    )
    KERNEL_STATUS_CONFLICT = (
        "KERNEL_STATUS_CONFLICT",
        _Code.FAILED_PRECONDITION,
        "the kernel's status allows no such change",
        "see the status machine",
    )
    DIGEST_MISMATCH = (
        "DIGEST_MISMATCH",
        _Code.DATA_LOSS,
        "the bytes do not have the digest named",
        "transfer again; if it stays, the source is damaged",
    )
    SIGNATURE_INVALID = (
        "SIGNATURE_INVALID",
        _Code.PERMISSION_DENIED,
        "no trusted key signed these bytes",
        "compile with this mesh's Tezzeret",
    )
    ARTIFACT_INVALID = (
        "ARTIFACT_INVALID",
        _Code.DATA_LOSS,
        "the artifact is no kernel of this format",
        "compile it again",
    )
    ARTIFACT_TOO_LARGE = (
        "ARTIFACT_TOO_LARGE",
        _Code.INVALID_ARGUMENT,
        "the artifact is above the bound",
        "choose a smaller size",
    )
    UPLOAD_OFFSET_MISMATCH = (
        "UPLOAD_OFFSET_MISMATCH",
        _Code.ABORTED,
        "the upload goes on at another offset",
        "resume at the offset given",
    )
    UPLOAD_IN_PROGRESS = (
        "UPLOAD_IN_PROGRESS",
        _Code.ABORTED,
        "somebody else uploads the same artifact now",
        "retry after the delay given",
    )
    TOO_MANY_UPLOADS = (
        "TOO_MANY_UPLOADS",
        _Code.RESOURCE_EXHAUSTED,
        "as many unfinished uploads are kept as may be",
        "finish one, or wait a day for the oldest to expire",
    )
    NO_TRUSTED_KEY = (
        "NO_TRUSTED_KEY",
        _Code.FAILED_PRECONDITION,
        "no public key to verify signatures with",
        "put tezzeret.pub into the folder of the keys",
    )
    COMPILE_JOB_NOT_FOUND = (
        "COMPILE_JOB_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such compile job",
        "ListCompileJobs shows those kept",
    )
    COMPILE_QUEUE_FULL = (
        "COMPILE_QUEUE_FULL",
        _Code.RESOURCE_EXHAUSTED,
        "too many compile jobs wait",
        "retry after the delay given",
    )
    UNKNOWN_TARGET = (
        "UNKNOWN_TARGET",
        _Code.INVALID_ARGUMENT,
        "there is no such target here",
        "ListTargets shows those served",
    )
    WORKER_CRASHED = ("WORKER_CRASHED", _Code.ABORTED, "the worker process died", "the job may be created again")
    JOB_TIMEOUT = (
        "JOB_TIMEOUT",
        _Code.DEADLINE_EXCEEDED,
        "the job took longer than it may",
        "raise services.tezzeret.job_timeout_seconds",
    )
    MEMORY_LIMIT = (
        "MEMORY_LIMIT",
        _Code.RESOURCE_EXHAUSTED,
        "the worker used more memory than it may",
        "raise services.tezzeret.worker_memory_bytes",
    )
    VALIDATION_FAILED = (
        "VALIDATION_FAILED",
        _Code.FAILED_PRECONDITION,
        "the kernel did not behave as declared",
        "see the check named",
    )
    JOB_CANCELLED = ("JOB_CANCELLED", _Code.CANCELLED, "the job was cancelled", "create it again if it is still wanted")
    # Oona.
    TOPIC_NOT_FOUND = (
        "TOPIC_NOT_FOUND",
        _Code.NOT_FOUND,
        "there is no such topic",
        "ListTopics shows those that exist",
    )
    TOPIC_EXISTS = (
        "TOPIC_EXISTS",
        _Code.ALREADY_EXISTS,
        "the topic exists with other settings",
        "use it as it is, or another name",
    )
    PAYLOAD_TYPE_NOT_ALLOWED = (
        "PAYLOAD_TYPE_NOT_ALLOWED",
        _Code.INVALID_ARGUMENT,
        "the topic does not take this payload",
        "see the topic's payload types",
    )
    BUS_UNAVAILABLE = ("BUS_UNAVAILABLE", _Code.UNAVAILABLE, "the event bus cannot be reached", "retry")
    BUS_OVERLOADED = (
        "BUS_OVERLOADED",
        _Code.RESOURCE_EXHAUSTED,
        "a bound of the event bus is reached",
        "retry after the delay given",
    )


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong: its path, and why and the way out in words."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Resource:
    """The resource an error is about."""

    type: str
    name: str


class EsperError(Exception):
    """A failure with a reason that programs match on and a message that people act on.

    Args:
        message: what is wrong and the way out, in words.
        reason: row of the table.
        metadata: further facts by name; they reach the client in ErrorInfo.
        violations: the fields that are wrong, for a bad request.
        retry_after: seconds after which a retry makes sense.
        resource: the resource it is about.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: Reason,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] | None = None,
        retry_after: float | None = None,
        resource: Resource | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations or ())
        self.retry_after = retry_after
        self.resource = resource

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code its reason has."""
        return self.reason.code


class RemoteError(EsperError):
    """An error that another process answered with; ``rpc_error`` is the raw one."""

    def __init__(self, rpc_error: grpc.RpcError, status: status_pb2.Status | None) -> None:
        code, message = status_of(rpc_error)
        info = _detail(status, error_details_pb2.ErrorInfo)
        bad = _detail(status, error_details_pb2.BadRequest)
        retry = _detail(status, error_details_pb2.RetryInfo)
        resource = _detail(status, error_details_pb2.ResourceInfo)
        super().__init__(
            message,
            reason=_reason_of(info, code),
            metadata=None if info is None else info.metadata,
            violations=None if bad is None else [FieldViolation(v.field, v.description) for v in bad.field_violations],
            retry_after=None if retry is None else retry.retry_delay.ToTimedelta().total_seconds(),
            resource=None if resource is None else Resource(resource.resource_type, resource.resource_name),
        )
        self.rpc_error = rpc_error
        self._code = code

    @property
    def code(self) -> grpc.StatusCode:
        """The status code that came over the wire, also where its reason is unknown here."""
        return self._code


_FALLBACKS: Final = {
    _Code.UNAVAILABLE: Reason.UNAVAILABLE,
    _Code.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    _Code.NOT_FOUND: Reason.NOT_FOUND,
    _Code.INVALID_ARGUMENT: Reason.INVALID_FIELD,
}
_BY_NAME: Final = {reason.value: reason for reason in Reason}


def _reason_of(info: error_details_pb2.ErrorInfo | None, code: grpc.StatusCode) -> Reason:
    known = _BY_NAME.get(info.reason) if info is not None and info.domain == DOMAIN else None
    return known or _FALLBACKS.get(code, Reason.INTERNAL)


def _detail(status: status_pb2.Status | None, kind: type[_M]) -> _M | None:
    for packed in status.details if status is not None else ():
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            packed.Unpack(detail)
            return detail
    return None


def reason_named(name: str) -> Reason:
    """The row of a reason that came over the wire; INTERNAL for one that this version does not know."""
    return _BY_NAME.get(name, Reason.INTERNAL)


def invalid(field: str, why: str, fix: str) -> EsperError:
    """INVALID_FIELD: ``field`` is the path, e.g. ``observation.slots[2].width``; ``why`` and ``fix`` in words."""
    text = f"{field}: {why}; {fix}"
    violation = FieldViolation(field, f"{why}; {fix}")
    return EsperError(text, reason=Reason.INVALID_FIELD, metadata={"field": field}, violations=[violation])


def required(field: str) -> EsperError:
    """REQUIRED_FIELD: ``field`` is the path of a field that is empty."""
    why = "it is required and empty"
    violation = FieldViolation(field, why)
    return EsperError(
        f"{field}: {why}", reason=Reason.REQUIRED_FIELD, metadata={"field": field}, violations=[violation]
    )


def not_found(resource_type: str, name: str, *, reason: Reason = Reason.NOT_FOUND, hint: str = "") -> EsperError:
    """NOT_FOUND, or a more telling reason with that code; ``hint`` is the way out where the table's is too general."""
    text = f"there is no {resource_type} {name!r}: {hint or reason.way_out}"
    return EsperError(text, reason=reason, metadata={"name": name}, resource=Resource(resource_type, name))


@dataclass(frozen=True)
class RpcStatus(grpc.Status):
    """What grpc needs to end a call with details: code, message, trailing metadata."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_rpc_status(error: EsperError) -> RpcStatus:
    """The error for the wire: a google.rpc.Status in the trailers beside code and message.

    Texts are cut so that the trailers stay below the 8 KiB that every gRPC peer takes: above it a client would see
    nothing of the error.
    """
    message = _cut(error.message, _MESSAGE_BYTES)
    metadata = {key: _cut(value, _TEXT_BYTES) for key, value in error.metadata.items()}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN, metadata=metadata)]
    if error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(v.field, _TEXT_BYTES), description=_cut(v.description, _TEXT_BYTES)
            )
            for v in error.violations[:_VIOLATIONS]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.resource is not None:
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=error.resource.type, resource_name=_cut(error.resource.name, _TEXT_BYTES)
            )
        )
    number = error.code.value[0]
    status = status_pb2.Status(code=number, message=message, details=_pack(details))
    return RpcStatus(error.code, message, ((_DETAILS_KEY, status.SerializeToString()),))


def _cut(text: str, most: int) -> str:
    data = text.encode()
    return text if len(data) <= most else data[: most - 3].decode(errors="ignore") + "..."


def _pack(messages: Iterable[Message]) -> list[AnyMessage]:
    packed = []
    for message in messages:
        box = AnyMessage()
        box.Pack(message)
        packed.append(box)
    return packed


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """(code, message) of an RPC error of grpc or grpc.aio; UNKNOWN where it carries none."""
    code = error.code() if hasattr(error, "code") else _Code.UNKNOWN
    details = error.details() if hasattr(error, "details") else None
    return code, details or str(error)


def from_rpc_error(error: grpc.RpcError) -> RemoteError:
    """The error a server answered with, as the same tree its own process uses; ``rpc_error`` keeps the raw one."""
    packed = dict(_trailers(error)).get(_DETAILS_KEY)
    try:
        return RemoteError(error, status_pb2.Status.FromString(packed) if isinstance(packed, bytes) else None)
    except DecodeError:
        return RemoteError(error, None)  # some proxy's own trailer: code and message still tell


def _trailers(error: grpc.RpcError) -> Iterable[tuple[str, str | bytes]]:
    trailers = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return cast("Iterable[tuple[str, str | bytes]]", trailers or ())

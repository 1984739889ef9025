"""Urza's records to and from its contract."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from esper.common.v1 import common_pb2
from esper.urza.v1 import blueprint_pb2, kernel_pb2
from services.blueprints.families import FAMILIES
from services.blueprints.spec import MAX_NAME_CHARACTERS, Blueprint, InitRecipe, Interface, Scalar, SpecError
from services.blueprints.wire import (
    blueprint_from_spec,
    digest_from_proto,
    digest_to_proto,
    interface_from_proto,
    interface_to_proto,
)
from services.chassis.errors import EsperError, FieldViolation, Reason, invalid, required
from services.urza.metadata import Cursor
from services.urza.records import BlueprintRecord, Interval, KernelRecord, KernelStatus, Outcome, OutcomeResult

_BLUEPRINT_STATE = "BLUEPRINT_STATE_"
_KERNEL_STATUS = "KERNEL_STATUS_"
_OUTCOME_RESULT = "KERNEL_OUTCOME_RESULT_"


def read_blueprint(spec: blueprint_pb2.BlueprintSpec) -> Blueprint:
    """The blueprint of a spec, with the family's defaults for what it leaves out.

    Raises:
        EsperError: REQUIRED_FIELD, UNKNOWN_FAMILY, BLUEPRINT_INVALID, each with the field's path.
    """
    if not spec.family:
        raise required("spec.family")
    family = FAMILIES.get(spec.family)
    if family is None:
        why = f"{spec.family[:64]!r} is none of {', '.join(sorted(FAMILIES))}"
        raise _bad_blueprint(SpecError("spec.family", why), Reason.UNKNOWN_FAMILY)
    whole = blueprint_pb2.BlueprintSpec()
    whole.CopyFrom(spec)
    for name, value in family.defaults.items():
        if name not in spec.parameters:
            whole.parameters[name].CopyFrom(_write_value(value))
    if not spec.HasField("initialization"):
        whole.initialization.CopyFrom(_write_initialization(family.initialization))
    try:
        return blueprint_from_spec(whole)
    except SpecError as error:
        raise _bad_blueprint(error, Reason.BLUEPRINT_INVALID) from error


def _bad_blueprint(error: SpecError, reason: Reason) -> EsperError:
    violation = FieldViolation(error.field, error.why)
    return EsperError(str(error), reason=reason, metadata={"field": error.field}, violations=[violation])


def write_blueprint(record: BlueprintRecord) -> blueprint_pb2.Blueprint:
    """The blueprint as the contract has it."""
    blueprint = record.blueprint
    message = blueprint_pb2.Blueprint(
        name=f"blueprints/{record.id}",
        spec=blueprint_pb2.BlueprintSpec(
            family=blueprint.family,
            parameters={name: _write_value(value) for name, value in blueprint.parameters.items()},
            initialization=_write_initialization(blueprint.initialization),
        ),
        digest=digest_to_proto(blueprint.digest),
        display_name=record.display_name,
        description=record.description,
        tags=record.tags,
        parent=f"blueprints/{record.parent}" if record.parent else "",
        state=blueprint_pb2.BlueprintState.Value(_BLUEPRINT_STATE + record.state.value),
        create_time=_write_time(record.create_time),
        etag=write_etag(record.revision),
    )
    if record.archive_time is not None:
        message.archive_time.CopyFrom(_write_time(record.archive_time))
    return message


def _write_initialization(recipe: InitRecipe) -> blueprint_pb2.Initialization:
    return blueprint_pb2.Initialization(rule=recipe.rule.value, scale=recipe.scale)


def _write_value(value: Scalar) -> blueprint_pb2.ParameterValue:
    match value:
        case bool():
            return blueprint_pb2.ParameterValue(flag=value)
        case int():
            return blueprint_pb2.ParameterValue(integer=value)
        case float():
            return blueprint_pb2.ParameterValue(number=value)
        case _:
            return blueprint_pb2.ParameterValue(text=value)


def write_kernel(record: KernelRecord) -> kernel_pb2.Kernel:
    """The kernel as the contract has it; what was not measured is absent."""
    cost, outcomes = record.characterization, record.outcomes
    count = {result: outcomes.results.get(result, 0) for result in OutcomeResult}
    return kernel_pb2.Kernel(
        name=f"blueprints/{record.blueprint}/kernels/{record.id}",
        digest=digest_to_proto(record.digest),
        signature=record.signature,
        size_bytes=record.size_bytes,
        family=record.family,
        interface=interface_to_proto(record.interface),
        interface_signature=record.interface_signature,
        size=record.size,
        init_seed=record.init_seed,
        target=cost.target,
        status=kernel_pb2.KernelStatus.Value(_KERNEL_STATUS + record.status.value),
        status_reason=record.status_reason,
        cost=kernel_pb2.KernelCost(
            parameters=cost.parameters,
            flops=cost.flops,
            latency=None if cost.latency_seconds is None else _write_seconds(cost.latency_seconds),
            latency_batch=cost.latency_batch,
            memory_bytes=cost.memory_bytes,
        ),
        tags=record.tags,
        outcomes=kernel_pb2.KernelOutcomes(
            fossilized=count[OutcomeResult.FOSSILIZED],
            culled=count[OutcomeResult.CULLED],
            rolled_back=count[OutcomeResult.ROLLED_BACK],
            mean_contribution=outcomes.mean_contribution,
        ),
        create_time=_write_time(record.create_time),
        status_time=_write_time(record.status_time),
        etag=write_etag(record.revision),
    )


def read_status(status: kernel_pb2.KernelStatus.ValueType, field: str) -> KernelStatus:
    """The status of a request; raises EsperError (REQUIRED_FIELD, INVALID_FIELD)."""
    if status == kernel_pb2.KERNEL_STATUS_UNSPECIFIED:
        raise required(field)
    if status not in kernel_pb2.KernelStatus.values():
        raise invalid(field, f"{status} is no status", "see KernelStatus")
    return KernelStatus(kernel_pb2.KernelStatus.Name(status).removeprefix(_KERNEL_STATUS))


def read_statuses(statuses: Sequence[kernel_pb2.KernelStatus.ValueType]) -> tuple[KernelStatus, ...]:
    """The statuses of a query; raises as :func:`read_status` does."""
    return tuple(read_status(status, f"statuses[{index}]") for index, status in enumerate(statuses))


def read_outcome(message: kernel_pb2.KernelOutcome) -> Outcome:
    """The outcome of a request; raises EsperError (REQUIRED_FIELD, INVALID_FIELD)."""
    if not message.seed:
        raise required("outcome.seed")
    if len(message.seed) > MAX_NAME_CHARACTERS or not message.seed.isprintable():
        raise invalid("outcome.seed", "it is no resource name", 'give "runs/{r}/seeds/{s}"')
    if message.result == kernel_pb2.KERNEL_OUTCOME_RESULT_UNSPECIFIED:
        raise required("outcome.result")
    if message.result not in kernel_pb2.KernelOutcomeResult.values():
        raise invalid("outcome.result", f"{message.result} is no result", "see KernelOutcomeResult")
    result = OutcomeResult(kernel_pb2.KernelOutcomeResult.Name(message.result).removeprefix(_OUTCOME_RESULT))
    if not message.HasField("contribution"):
        return Outcome(message.seed, result)
    worth = message.contribution
    if not worth.low <= worth.value <= worth.high:  # false for NaN too
        raise invalid("outcome.contribution", "its value is not within its bounds", "leave out what was not measured")
    return Outcome(
        message.seed, result, Interval(worth.value, worth.low, worth.high, worth.confidence_ratio, worth.samples)
    )


def read_interface(message: common_pb2.Interface) -> Interface:
    """The interface of a request; raises EsperError (INVALID_FIELD) with the field's path."""
    try:
        return interface_from_proto(message)
    except SpecError as error:
        raise invalid(error.field, error.why, "describe the place as Kasmina does") from error


def read_digest(message: common_pb2.Digest, field: str) -> bytes:
    """The digest of a request; raises EsperError (INVALID_FIELD) with the field's path."""
    try:
        return digest_from_proto(message, field)
    except SpecError as error:
        raise invalid(error.field, error.why, "give the SHA-256 of the artifact") from error


def write_etag(revision: int) -> str:
    """The etag of a revision."""
    return f"r{revision}"


def read_etag(etag: str) -> int | None:
    """The revision of an etag, ``None`` if there is none, -1 (which no resource has) for one that is not ours."""
    if not etag:
        return None
    digits = etag.removeprefix("r")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1


def write_cursor(record: BlueprintRecord | KernelRecord) -> str:
    """The place behind a record in its list, for a page token."""
    return f"{record.create_time.isoformat()} {record.id}"


def read_cursor(text: str) -> Cursor:
    """The place of a page token; raises ValueError for a text that :func:`write_cursor` did not make."""
    time, _, record_id = text.partition(" ")
    return Cursor(datetime.fromisoformat(time).astimezone(UTC), record_id)


def read_seconds(duration: Duration) -> float:
    """Seconds of a duration."""
    return duration.seconds + duration.nanos * 1e-9


def _write_seconds(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def _write_time(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message

"""gRPC face of Tezzeret: translates, checks, and hands over to the compiler."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from grpc.aio import ServicerContext

from esper.common.v1.common_pb2 import ChangeType, Error
from esper.tezzeret.v1 import compile_job_pb2
from esper.tezzeret.v1 import compile_service_pb2 as pb
from esper.tezzeret.v1.compile_service_pb2_grpc import CompileServiceServicer
from services.blueprints.signature import interface_signature
from services.blueprints.spec import MAX_SEED, SpecError, check_size
from services.blueprints.vocabulary import DTYPES
from services.blueprints.wire import digest_to_proto, interface_from_proto, interface_to_proto
from services.chassis.errors import EsperError, Reason, invalid, required
from services.chassis.idempotency import RequestCache
from services.chassis.ids import parse_name
from services.chassis.pagination import decode_token, encode_token, page_size_of
from services.chassis.watch import WatchHub
from services.tezzeret.compiler import Compiler
from services.tezzeret.jobs import DEFAULT_TARGET, Job, JobBook, Spec, State

_TARGETS = {
    "cpu": compile_job_pb2.Target(
        name="cpu", description="one thread of this machine's processor", dtypes=sorted(DTYPES)
    )
}


class CompileServicer(CompileServiceServicer):
    """``esper.tezzeret.v1.CompileService``."""

    def __init__(self, compiler: Compiler, book: JobBook, hub: WatchHub[Job], *, draining: asyncio.Event) -> None:
        self._compiler = compiler
        self._book = book
        self._hub = hub
        self._draining = draining
        self._requests = RequestCache()

    async def CreateCompileJob(
        self,
        request: pb.CreateCompileJobRequest,
        context: ServicerContext[pb.CreateCompileJobRequest, pb.CreateCompileJobResponse],
    ) -> pb.CreateCompileJobResponse:
        """See the contract."""
        spec = _read_spec(request.spec)

        async def create() -> tuple[Job, bool]:
            return await self._compiler.create(spec)

        job, created = await self._requests.once("CreateCompileJob", request, create)
        return pb.CreateCompileJobResponse(job=write_job(self._book.find(job.name) or job), created=created)

    async def GetCompileJob(
        self,
        request: pb.GetCompileJobRequest,
        context: ServicerContext[pb.GetCompileJobRequest, pb.GetCompileJobResponse],
    ) -> pb.GetCompileJobResponse:
        """See the contract."""
        parse_name("compileJobs/{j}", request.name)
        return pb.GetCompileJobResponse(job=write_job(self._book.get(request.name)))

    async def ListCompileJobs(
        self,
        request: pb.ListCompileJobsRequest,
        context: ServicerContext[pb.ListCompileJobsRequest, pb.ListCompileJobsResponse],
    ) -> pb.ListCompileJobsResponse:
        """See the contract."""
        states = set(request.states)
        scope = {"states": sorted(states)}
        size = page_size_of(request.page_size)
        # A place in the order, not an offset: jobs that come meanwhile move nothing from one page to the next.
        after = decode_token(scope, request.page_token) if request.page_token else ""
        jobs = [job for job in self._book.jobs() if not states or _STATES[job.state] in states]
        jobs = [job for job in jobs if not after or _place(job) < after]
        token = encode_token(scope, _place(jobs[size - 1])) if len(jobs) > size else ""
        return pb.ListCompileJobsResponse(jobs=map(write_job, jobs[:size]), next_page_token=token)

    async def CancelCompileJob(
        self,
        request: pb.CancelCompileJobRequest,
        context: ServicerContext[pb.CancelCompileJobRequest, pb.CancelCompileJobResponse],
    ) -> pb.CancelCompileJobResponse:
        """See the contract."""
        parse_name("compileJobs/{j}", request.name)
        return pb.CancelCompileJobResponse(job=write_job(self._compiler.cancel(request.name)))

    async def WatchCompileJobs(
        self,
        request: pb.WatchCompileJobsRequest,
        context: ServicerContext[pb.WatchCompileJobsRequest, pb.WatchCompileJobsResponse],
    ) -> AsyncIterator[pb.WatchCompileJobsResponse]:
        """See the contract."""
        if request.name:
            parse_name("compileJobs/{j}", request.name)
        stream = self._hub.watch(
            snapshot=self._book.jobs,
            draining=self._draining,
            match=lambda job: request.name in ("", job.name),
            resume_token=request.resume_token or None,
        )
        async with contextlib.aclosing(stream):
            async for item in stream:
                yield pb.WatchCompileJobsResponse(
                    change=item.change,
                    job=None if item.item is None else write_job(item.item),
                    revision=item.revision,
                    resume_token=item.token,
                )

    async def ListTargets(
        self, request: pb.ListTargetsRequest, context: ServicerContext[pb.ListTargetsRequest, pb.ListTargetsResponse]
    ) -> pb.ListTargetsResponse:
        """See the contract."""
        return pb.ListTargetsResponse(targets=_TARGETS.values())


def change_of(*, created: bool) -> ChangeType.ValueType:
    """How a watch tells of a job."""
    return ChangeType.CHANGE_TYPE_ADDED if created else ChangeType.CHANGE_TYPE_MODIFIED


def _place(job: Job) -> str:
    """Where a job stands in the list, as text that sorts like it; the times have one format and one zone."""
    return f"{job.create_time} {job.name}"


def _read_spec(message: compile_job_pb2.CompileSpec) -> Spec:
    """The specification, checked; whether blueprint and interface fit is the job's to say."""
    parse_name("blueprints/{b}", message.blueprint, field="spec.blueprint")
    if not message.HasField("interface"):
        raise required("spec.interface")
    target = message.target or DEFAULT_TARGET
    if target not in _TARGETS:
        known = ", ".join(_TARGETS)
        raise EsperError(f"spec.target: {target!r} is none of {known}", reason=Reason.UNKNOWN_TARGET)
    if not 0 <= message.init_seed <= MAX_SEED:
        raise invalid("spec.init_seed", f"{message.init_seed} is negative", "give 0 or more")
    try:
        check_size(message.size, "spec.size")
        interface = interface_from_proto(message.interface, "spec.interface")
        interface_signature(interface)
    except SpecError as error:
        raise invalid(error.field, error.why, "see the contract") from error
    return Spec(message.blueprint, interface, message.size, message.init_seed, target)


_STATES = {state: compile_job_pb2.CompileState.Value(f"COMPILE_STATE_{state.name}") for state in State}


def write_job(job: Job) -> compile_job_pb2.CompileJob:
    """The job as its contract has it."""
    message = compile_job_pb2.CompileJob(
        name=job.name,
        spec=compile_job_pb2.CompileSpec(
            blueprint=job.spec.blueprint,
            interface=interface_to_proto(job.spec.interface),
            size=job.spec.size,
            init_seed=job.spec.init_seed,
            target=job.spec.target,
        ),
        state=_STATES[job.state],
        progress_ratio=job.progress,
        attempts=job.attempts,
        create_time=_timestamp(job.create_time),
        start_time=_timestamp(job.start_time),
        end_time=_timestamp(job.end_time),
    )
    if job.stage:
        message.stage = compile_job_pb2.CompileStage.Value(f"COMPILE_STAGE_{job.stage}")
    if job.kernel:
        digest = digest_to_proto(bytes.fromhex(job.digest))
        message.kernel.CopyFrom(compile_job_pb2.CompiledKernel(name=job.kernel, digest=digest))
    elif job.error_reason:
        message.error.CopyFrom(Error(reason=job.error_reason, message=job.error_message))
    return message


def _timestamp(text: str) -> Timestamp | None:
    if not text:
        return None
    moment = Timestamp()
    moment.FromDatetime(datetime.fromisoformat(text))
    return moment

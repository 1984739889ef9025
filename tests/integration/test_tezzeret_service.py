"""Tezzeret as a process among those it needs: kernels in Urza, events on Oona, and nothing takes it down."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest

from esper.common.v1.common_pb2 import ChangeType
from esper.oona.v1 import event_service_pb2 as oona
from esper.oona.v1.event_service_pb2_grpc import EventServiceStub
from esper.tezzeret.v1 import compile_job_pb2 as jobs
from esper.tezzeret.v1 import compile_service_pb2 as pb
from esper.tezzeret.v1.compile_service_pb2_grpc import CompileServiceStub
from esper.urza.v1 import blueprint_service_pb2 as urza
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from esper.urza.v1.kernel_pb2 import KERNEL_STATUS_VALIDATED
from services.blueprints import artifact
from services.blueprints.signature import load_public_key
from services.blueprints.spec import Interface
from services.blueprints.wire import interface_to_proto
from services.chassis.errors import Reason, from_rpc_error
from tests.infrastructure.mesh import LiveMesh, live_mesh
from tests.support.interfaces import SPAN, WIDTH

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]
_SERVICES = ("urza", "oona", "tezzeret")
_RUNNING = (jobs.COMPILE_STATE_QUEUED, jobs.COMPILE_STATE_RUNNING)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[LiveMesh]:
    async with live_mesh(tmp_path / "run", services=_SERVICES) as live:
        yield live


async def blueprint(mesh: LiveMesh, family: str) -> str:
    stub = BlueprintServiceStub(mesh.channel("urza"))
    answer = await stub.ListBlueprints(urza.ListBlueprintsRequest(family=family))
    return str(answer.blueprints[0].name)


def wanted(name: str, interface: Interface, seed: int = 0) -> jobs.CompileSpec:
    return jobs.CompileSpec(blueprint=name, interface=interface_to_proto(interface), size=2, init_seed=seed)


async def create(mesh: LiveMesh, spec: jobs.CompileSpec, request_id: str) -> jobs.CompileJob:
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    answer: pb.CreateCompileJobResponse = await stub.CreateCompileJob(
        pb.CreateCompileJobRequest(spec=spec, request_id=request_id)
    )
    return answer.job


async def ended(mesh: LiveMesh, name: str) -> jobs.CompileJob:
    """The job once it has ended, by watching it; watches again when the service restarts."""
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    while True:
        try:
            async for item in stub.WatchCompileJobs(pb.WatchCompileJobsRequest(name=name)):
                if item.change != ChangeType.CHANGE_TYPE_BOOKMARK and item.job.state not in _RUNNING:
                    job: jobs.CompileJob = item.job
                    return job
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        await asyncio.sleep(0.1)


async def kernel_of(mesh: LiveMesh, job: jobs.CompileJob) -> artifact.Kernel:
    """What a downloader gets: verified before it is parsed."""
    stub = BlueprintServiceStub(mesh.channel("urza"))
    data, header = b"", None
    async for part in stub.DownloadKernel(urza.DownloadKernelRequest(name=job.kernel.name)):
        if part.WhichOneof("part") == "header":
            header = part.header
        data += part.chunk
    assert header is not None
    assert header.status == KERNEL_STATUS_VALIDATED
    key = load_public_key(mesh.run_dir / "state" / "keys")
    return artifact.open_verified(data, header.digest.value, header.signature, key)


def workers(mesh: LiveMesh) -> list[psutil.Process]:
    pid = mesh.supervisor.services["tezzeret"].pid
    assert pid is not None
    return [
        child for child in psutil.Process(pid).children(recursive=True) if "forkserver" in " ".join(child.cmdline())
    ]


async def test_blueprints_become_kernels_that_urza_resolves_and_oona_tells_of(mesh: LiveMesh) -> None:
    widen, branch = await blueprint(mesh, "widen"), await blueprint(mesh, "residual_bottleneck")
    first = await create(mesh, wanted(widen, WIDTH), "r1")
    again = await create(mesh, wanted(widen, WIDTH), "r1-other-request")
    assert again.name == first.name
    second = await create(mesh, wanted(branch, SPAN, seed=7), "r2")
    done, other = await ended(mesh, first.name), await ended(mesh, second.name)
    assert (done.state, other.state) == (jobs.COMPILE_STATE_SUCCEEDED, jobs.COMPILE_STATE_SUCCEEDED)
    assert done.attempts == 1
    assert done.progress_ratio == 1
    kernel = await kernel_of(mesh, other)
    assert kernel.manifest.seed == 7
    assert kernel.manifest.characterization.latency_seconds is not None
    stub = BlueprintServiceStub(mesh.channel("urza"))
    resolve = urza.ResolveKernelRequest(blueprint=widen, interface=interface_to_proto(WIDTH), size=2, target="cpu")
    assert (await stub.ResolveKernel(resolve)).kernel.name == done.kernel.name
    listed = await CompileServiceStub(mesh.channel("tezzeret")).ListCompileJobs(
        pb.ListCompileJobsRequest(states=[jobs.COMPILE_STATE_SUCCEEDED], page_size=1)
    )
    assert listed.jobs[0].name == second.name
    assert listed.next_page_token
    assert await topics(mesh) == {
        "topics/compilation.blueprint.submitted": 2,
        "topics/compilation.kernel.ready": 2,
        "topics/validation.kernel.characterized": 2,
    }


async def topics(mesh: LiveMesh) -> dict[str, int]:
    """Events on Tezzeret's topics, once two kernels were announced."""
    stub = EventServiceStub(mesh.channel("oona"))
    found: dict[str, int] = {}
    names = ("compilation.blueprint.submitted", "compilation.kernel.ready", "validation.kernel.characterized")
    request = oona.TailRequest(topics=[f"topics/{name}" for name in names], last=100)
    call = stub.Tail(request, timeout=20)
    async for item in call:
        topic = item.stored_event.event.topic
        found[topic] = found.get(topic, 0) + 1
        if sum(found.values()) == 6:
            break
    call.cancel()
    return found


async def test_what_cannot_be_compiled_is_refused_or_fails_with_its_reason(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    misfit = await ended(mesh, (await create(mesh, wanted(widen, SPAN), "r1")).name)
    unknown = await ended(mesh, (await create(mesh, wanted("blueprints/nobody", WIDTH), "r2")).name)
    assert misfit.error.reason == Reason.BLUEPRINT_DOES_NOT_FIT
    assert "SPAN" in misfit.error.message
    assert unknown.error.reason in (Reason.UNKNOWN_BLUEPRINT, Reason.NOT_FOUND, "BLUEPRINT_NOT_FOUND")
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    bad: list[tuple[Any, str, Reason]] = [
        (jobs.CompileSpec(), "spec.blueprint", Reason.REQUIRED_FIELD),
        (jobs.CompileSpec(blueprint=widen), "spec.interface", Reason.REQUIRED_FIELD),
        (wanted("widen", WIDTH), "spec.blueprint", Reason.INVALID_NAME),
    ]
    negative, sizeless, elsewhere, shapeless = (wanted(widen, WIDTH) for _ in range(4))
    negative.init_seed, sizeless.size, elsewhere.target = -1, 0, "abacus"
    shapeless.interface.ClearField("output_shape")
    bad += [
        (negative, "spec.init_seed", Reason.INVALID_FIELD),
        (sizeless, "spec.size", Reason.INVALID_FIELD),
        (shapeless, "spec.interface.output_shape", Reason.INVALID_FIELD),
        (elsewhere, "spec.target", Reason.UNKNOWN_TARGET),
    ]
    for number, (spec, field, reason) in enumerate(bad):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CreateCompileJob(pb.CreateCompileJobRequest(spec=spec, request_id=f"bad{number}"))
        error = from_rpc_error(caught.value)
        assert error.reason is reason
        assert field in error.message
    for call in (stub.GetCompileJob(pb.GetCompileJobRequest(name="compileJobs/none")),):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert from_rpc_error(caught.value).reason is Reason.COMPILE_JOB_NOT_FOUND
    assert [target.name for target in (await stub.ListTargets(pb.ListTargetsRequest())).targets] == ["cpu"]


async def test_killed_workers_and_a_killed_service_lose_no_job(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    warm = await ended(mesh, (await create(mesh, wanted(widen, WIDTH), "warm")).name)
    assert warm.state == jobs.COMPILE_STATE_SUCCEEDED
    names = [(await create(mesh, wanted(widen, WIDTH, seed=seed), f"r{seed}")).name for seed in range(1, 13)]
    for process in workers(mesh):
        process.send_signal(signal.SIGKILL)
    assert (await ended(mesh, names[0])).state in (jobs.COMPILE_STATE_SUCCEEDED, jobs.COMPILE_STATE_FAILED)
    mesh.kill("tezzeret")
    done = [await ended(mesh, name) for name in names]
    failed = [job.error.reason for job in done if job.state != jobs.COMPILE_STATE_SUCCEEDED]
    assert failed in ([], [Reason.WORKER_CRASHED])
    assert mesh.supervisor.services["tezzeret"].restarts == 1


async def test_a_cancelled_job_never_becomes_a_kernel(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    names = [(await create(mesh, wanted(widen, WIDTH, seed=seed), f"r{seed}")).name for seed in range(3)]
    for name in names:
        cancelled = (await stub.CancelCompileJob(pb.CancelCompileJobRequest(name=name))).job
        assert cancelled.state in (jobs.COMPILE_STATE_CANCELLED, jobs.COMPILE_STATE_SUCCEEDED)
    again = (await stub.CancelCompileJob(pb.CancelCompileJobRequest(name=names[-1]))).job
    assert again.state == jobs.COMPILE_STATE_CANCELLED
    job = await ended(mesh, (await create(mesh, wanted(widen, WIDTH, seed=2), "again")).name)
    assert job.state == jobs.COMPILE_STATE_SUCCEEDED


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("services.tezzeret.job_timeout_seconds=0.001", Reason.JOB_TIMEOUT),
        ("services.tezzeret.worker_memory_bytes=268435456", Reason.MEMORY_LIMIT),
    ],
)
async def test_a_job_that_takes_too_much_ends_with_its_reason(tmp_path: Path, override: str, reason: Reason) -> None:
    async with live_mesh(tmp_path / "run", [override], services=_SERVICES) as mesh:
        # Torch with a large branch is far above the least memory a worker can be given.
        large = Interface(SPAN.kind, (512, 64, 64), (512, 64, 64))
        spec = wanted(await blueprint(mesh, "residual_bottleneck"), large)
        spec.size = 256
        job = await ended(mesh, (await create(mesh, spec, "r")).name)
        assert job.error.reason == reason
        assert not workers(mesh) or all(process.is_running() for process in workers(mesh))


async def test_urza_may_restart_under_a_job(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    warm = await ended(mesh, (await create(mesh, wanted(widen, WIDTH), "warm")).name)
    assert warm.state == jobs.COMPILE_STATE_SUCCEEDED
    names = [(await create(mesh, wanted(widen, WIDTH, seed=seed), f"r{seed}")).name for seed in range(1, 5)]
    mesh.kill("urza")
    for name in names:
        job = await ended(mesh, name)
        assert job.state == jobs.COMPILE_STATE_SUCCEEDED, job.error
    records = [json.loads(path.read_text()) for path in (mesh.run_dir / "state/tezzeret/jobs").glob("*.json")]
    assert len(records) == 5
    assert (mesh.run_dir / "addresses.json").exists()


async def test_a_killed_service_leaves_no_worker_behind_even_in_the_middle_of_a_job(mesh: LiveMesh) -> None:
    widen, branch = await blueprint(mesh, "widen"), await blueprint(mesh, "residual_bottleneck")
    await ended(mesh, (await create(mesh, wanted(widen, WIDTH), "warm")).name)
    spec = wanted(branch, Interface(SPAN.kind, (512, 64, 64), (512, 64, 64)))
    spec.size = 256
    job = await create(mesh, spec, "long")
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    async for item in stub.WatchCompileJobs(pb.WatchCompileJobsRequest(name=job.name)):
        if item.job.stage == jobs.COMPILE_STAGE_VALIDATING:
            break
    before = workers(mesh)
    assert len(before) >= 2, "the fork server and its worker"
    mesh.kill("tezzeret")
    _, alive = await asyncio.to_thread(psutil.wait_procs, before, timeout=5)
    assert alive == []


async def test_pages_neither_repeat_nor_skip_jobs_that_come_meanwhile(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    stub = CompileServiceStub(mesh.channel("tezzeret"))
    names = [(await create(mesh, wanted(widen, WIDTH, seed=seed), f"r{seed}")).name for seed in range(3)]
    first = await stub.ListCompileJobs(pb.ListCompileJobsRequest(page_size=2))
    await create(mesh, wanted(widen, WIDTH, seed=9), "meanwhile")
    rest = await stub.ListCompileJobs(pb.ListCompileJobsRequest(page_size=2, page_token=first.next_page_token))
    assert [job.name for job in (*first.jobs, *rest.jobs)] == names[::-1]
    assert rest.next_page_token == ""
    await asyncio.gather(*(ended(mesh, name) for name in names))


async def test_a_kernel_that_urza_lost_is_compiled_again(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    first = await ended(mesh, (await create(mesh, wanted(widen, WIDTH), "r")).name)
    shutil.rmtree(mesh.run_dir / "state/urza")
    mesh.kill("urza")
    library = BlueprintServiceStub(mesh.channel("urza"))
    back = await library.GetBlueprint(urza.GetBlueprintRequest(name=widen), wait_for_ready=True, timeout=30)
    assert back.blueprint.name == widen
    again = await create(mesh, wanted(widen, WIDTH), "r2")
    assert again.state != jobs.COMPILE_STATE_SUCCEEDED
    second = await ended(mesh, again.name)
    assert (second.name, second.state) == (first.name, jobs.COMPILE_STATE_SUCCEEDED)
    assert (await library.GetKernel(urza.GetKernelRequest(name=second.kernel.name))).kernel.name == second.kernel.name


async def test_while_urza_hangs_a_finished_job_is_given_as_it_is(mesh: LiveMesh) -> None:
    widen = await blueprint(mesh, "widen")
    done = await ended(mesh, (await create(mesh, wanted(widen, WIDTH), "r")).name)
    pid = mesh.supervisor.services["urza"].pid
    assert pid is not None
    urza_process = psutil.Process(pid)
    urza_process.suspend()
    try:
        again = await create(mesh, wanted(widen, WIDTH), "r2")
    finally:
        urza_process.resume()
    assert again.kernel == done.kernel

"""The compiler with real worker processes, over a library in memory that says what the test wants."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from services.blueprints.signature import generate_keypair
from services.blueprints.spec import Blueprint, Interface
from services.chassis import telemetry
from services.chassis.config.schema import TelemetryConfig
from services.chassis.errors import EsperError, Reason
from services.tezzeret import compiler
from services.tezzeret.compiler import Compiler, SignedKernel
from services.tezzeret.jobs import ENDED, Job, JobBook, Spec, State
from services.tezzeret.worker import CancelledJobError, Worker, context, serve
from services.tezzeret.workers import Workers
from tests.infrastructure.kernels import signed_kernel
from tests.support.interfaces import SPAN, WIDTH, builtin

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(120)]
_GIB = 2**30
#: Half a second of work and more, so that something can happen meanwhile.
LARGE = Interface(SPAN.kind, (256, 32, 32), (256, 32, 32))
#: A branch for it has more weights than a worker may have memory.
HUGE = Interface(SPAN.kind, (8192, 4, 4), (8192, 4, 4))


class MemoryLibrary:
    """A library that is a dictionary; ``away`` counts calls that find nobody."""

    def __init__(self) -> None:
        self.kernels: dict[str, SignedKernel] = {}
        self.away = 0
        self.asked = asyncio.Event()

    async def blueprint(self, name: str) -> Blueprint:
        self.asked.set()
        self._knock()
        return builtin(name)

    async def holds(self, kernel: str) -> bool:
        return kernel in self.kernels

    async def register(self, kernel: SignedKernel) -> str:
        self._knock()
        name = f"blueprints/b/kernels/{kernel.digest.hex()[:32]}"
        self.kernels[name] = kernel
        return name

    def _knock(self) -> None:
        if self.away:
            self.away -= 1
            raise EsperError("restarting", reason=Reason.UNAVAILABLE)


class Announcements:
    """Remembers what it was told; ``refuse`` makes the next characterization fail as no code foresees."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuse = False

    def submitted(self, job: Job) -> None:
        self.told.append(f"submitted {job.state}")

    def ended(self, job: Job) -> None:
        self.told.append(f"ended {job.state}")

    def characterized(self, kernel: SignedKernel, name: str) -> None:
        if self.refuse:
            self.refuse = False
            raise ZeroDivisionError("nobody foresaw this")
        self.told.append("characterized")


class Bench:
    """A compiler on a folder, and a way to wait for its jobs."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder / "jobs"
        self.book = JobBook(self.folder, queue_limit=8)
        self.library, self.announcements = MemoryLibrary(), Announcements()
        self._changed = asyncio.Event()
        self.workers = Workers(count, 2 * _GIB)
        self.compiler = Compiler(
            self.book,
            self.library,
            self.announcements,
            generate_keypair(folder / "keys").private_key,
            telemetry=telemetry.setup("test", TelemetryConfig(), None, None),
            workers=self.workers,
            timeout=60,
            on_change=lambda job, created: self._changed.set(),
        )

    async def until(self, name: str, reached: Callable[[Job], bool]) -> Job:
        """The job once it is as wanted."""
        while not reached(self.book.get(name)):
            self._changed.clear()
            await self._changed.wait()
        return self.book.get(name)

    async def end(self, spec: Spec) -> Job:
        """The job of a specification once it has ended."""
        job, _ = await self.compiler.create(spec)
        return await self.until(job.name, lambda job: job.state in ENDED)


@pytest.fixture
async def bench(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    made = Bench(tmp_path, getattr(request, "param", 1))
    await made.compiler.start()
    yield made
    await made.compiler.stop()


def small(seed: int = 0) -> Spec:
    return Spec("widen", WIDTH, 2, seed)


def large(seed: int = 0) -> Spec:
    return Spec("residual_bottleneck", LARGE, 64, seed)


async def test_a_kernel_that_the_library_lost_is_compiled_again(bench: Bench) -> None:
    first = await bench.end(small())
    assert (await bench.compiler.create(small()))[1] is False
    bench.library.kernels.clear()
    again, fresh = await bench.compiler.create(small())
    assert fresh
    second = await bench.until(again.name, lambda job: job.state in ENDED)
    assert (first.state, second.state) == (State.SUCCEEDED, State.SUCCEEDED)
    assert second.kernel in bench.library.kernels
    assert bench.announcements.told == ["submitted QUEUED", "characterized", "ended SUCCEEDED"] * 2


async def test_a_library_that_is_away_for_a_moment_is_waited_for(bench: Bench) -> None:
    bench.library.away = 2
    assert (await bench.end(small())).state is State.SUCCEEDED


async def test_a_job_that_waits_for_the_library_can_be_cancelled(bench: Bench) -> None:
    bench.library.away = 10**6
    job, _ = await bench.compiler.create(small())
    await bench.library.asked.wait()
    assert bench.compiler.cancel(job.name).state is State.CANCELLED
    bench.library.away = 0
    assert (await bench.end(small(1))).state is State.SUCCEEDED
    assert bench.book.get(job.name).state is State.CANCELLED
    assert len(bench.library.kernels) == 1


async def test_what_nobody_foresaw_fails_one_job_and_not_the_next(bench: Bench) -> None:
    bench.announcements.refuse = True
    failed = await bench.end(small())
    assert (failed.state, failed.error_reason) == (State.FAILED, Reason.INTERNAL)
    assert "ZeroDivisionError" in failed.error_message
    assert (await bench.end(small(1))).state is State.SUCCEEDED


async def test_a_full_disk_refuses_new_jobs_and_lets_running_ones_end(bench: Bench) -> None:
    job, _ = await bench.compiler.create(small())
    for path in bench.folder.iterdir():
        path.unlink()
    bench.folder.rmdir()
    assert (await bench.until(job.name, lambda job: job.state in ENDED)).state is State.SUCCEEDED
    with pytest.raises(EsperError) as caught:
        await bench.compiler.create(small(1))
    assert caught.value.reason is Reason.STORAGE_FAILED
    bench.folder.mkdir()
    assert (await bench.end(small(1))).state is State.SUCCEEDED


@pytest.mark.parametrize("bench", [2], indirect=True)
async def test_a_job_cancelled_and_created_again_under_way_succeeds_once(bench: Bench) -> None:
    await bench.end(small())  # the workers are warm
    job, _ = await bench.compiler.create(large())
    await bench.until(job.name, lambda job: job.stage == "VALIDATING")
    bench.compiler.cancel(job.name)
    again, fresh = await bench.compiler.create(large())
    assert (again.name, fresh) == (job.name, True)
    done = await bench.until(job.name, lambda job: job.state in ENDED)
    assert done.state is State.SUCCEEDED, done
    assert sum(kernel.job.name == job.name for kernel in bench.library.kernels.values()) == 1
    assert (await bench.end(small(5))).state is State.SUCCEEDED


async def test_a_worker_killed_under_a_job_is_replaced_and_a_second_death_ends_the_job(bench: Bench) -> None:
    await bench.end(small())
    (worker,) = bench.workers
    job, _ = await bench.compiler.create(large())
    for attempt in (1, 2):
        await bench.until(job.name, lambda job: (job.stage, job.attempts) == ("VALIDATING", attempt))  # noqa: B023  # awaited in its turn
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    ended = await bench.until(job.name, lambda job: job.state in ENDED)
    assert (ended.error_reason, ended.attempts) == (Reason.WORKER_CRASHED, 2)
    assert "-9" in ended.error_message
    assert (await bench.end(small(1))).state is State.SUCCEEDED


async def test_a_worker_that_dies_under_a_cancelled_job_is_not_tried_again(bench: Bench) -> None:
    await bench.end(small())
    (worker,) = bench.workers
    job, _ = await bench.compiler.create(large())
    await bench.until(job.name, lambda job: job.stage == "VALIDATING")
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    assert bench.compiler.cancel(job.name).attempts == 1
    assert (await bench.end(small(1))).state is State.SUCCEEDED
    assert bench.book.get(job.name).state is State.CANCELLED
    assert bench.book.get(job.name).attempts == 1


async def test_stopping_under_a_job_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    bench = Bench(tmp_path, 1)
    await bench.compiler.start()
    job, _ = await bench.compiler.create(large())
    await bench.until(job.name, lambda job: job.stage == "BUILDING")
    pids = [worker.pid for worker in bench.workers]
    await bench.compiler.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid is not None)
    assert JobBook(bench.folder, queue_limit=1).queued()[0].name == job.name


async def test_only_the_kernel_that_was_ordered_is_signed(bench: Bench, tmp_path: Path) -> None:
    ordered = Job("compileJobs/j", Spec("residual_bottleneck", SPAN, 2, 7))
    made = signed_kernel(tmp_path / "others", interface=SPAN, size=2, seed=7)
    assert bench.compiler._sign(ordered, made.manifest.blueprint, made.data).digest == made.digest
    for spec in (Spec("b", SPAN, 3, 7), Spec("b", SPAN, 2, 8), Spec("b", LARGE, 2, 7)):
        with pytest.raises(EsperError, match="another kernel") as caught:
            bench.compiler._sign(replace(ordered, spec=spec), made.manifest.blueprint, made.data)
        assert caught.value.reason is Reason.VALIDATION_FAILED
    with pytest.raises(EsperError, match="well-formed"):
        bench.compiler._sign(ordered, made.manifest.blueprint, made.data[:-1])


def order(interface: Interface, size: int) -> dict[str, object]:
    return {
        "blueprint": builtin("residual_bottleneck").to_json(),
        "interface": interface.to_json(),
        "size": size,
        "init_seed": 0,
        "target": "cpu",
    }


def test_memory_that_is_refused_at_once_is_the_memory_limit_and_the_worker_lives() -> None:
    worker = Worker(context(), _GIB)
    try:
        for size, reason in ((8192, Reason.MEMORY_LIMIT), (0, Reason.BLUEPRINT_DOES_NOT_FIT)):
            with pytest.raises(EsperError) as caught:
                worker.run(
                    order(HUGE, size),  # type: ignore[arg-type]  # JSON by construction
                    stage=lambda stage: None,
                    cancelled=threading.Event(),
                    timeout=60,
                )
            assert caught.value.reason is reason
        pid = worker.pid
        worker.warm()
        assert worker.pid == pid
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(CancelledJobError):
            worker.run({}, stage=lambda stage: None, cancelled=cancelled, timeout=60)
        assert worker.pid is None
        with pytest.raises(EsperError) as caught:
            worker.run({}, stage=lambda stage: None, cancelled=threading.Event(), timeout=60)
        assert caught.value.reason is Reason.WORKER_CRASHED
    finally:
        worker.close()


def test_a_worker_answers_every_order_and_ends_in_order_with_its_pipe() -> None:
    forkserver = context()
    ours, theirs = forkserver.Pipe()
    process = forkserver.Process(target=serve, args=(theirs, _GIB))
    process.start()
    theirs.close()
    endings = []
    for request in (order(SPAN, 2), order(HUGE, 8192), order(SPAN, 0)):
        ours.send_bytes(json.dumps(request).encode())
        answer = ours.recv_bytes()
        while answer[:1] == b"M" and "stage" in json.loads(answer[1:]):
            answer = ours.recv_bytes()
        endings.append("kernel" if answer[:1] == b"K" else json.loads(answer[1:])["reason"])
    ours.close()
    process.join(30)
    assert endings == ["kernel", Reason.MEMORY_LIMIT, Reason.BLUEPRINT_DOES_NOT_FIT]
    assert process.exitcode == 0


async def test_patience_with_a_library_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_PATIENCE_SECONDS", 0.0)
    bench.library.away = 10**6
    failed = await bench.end(small())
    assert (failed.state, failed.error_reason) == (State.FAILED, Reason.UNAVAILABLE)

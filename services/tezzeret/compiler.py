"""The compiler: takes jobs from the book, runs them in workers, registers what they make.

Everything here runs on the service's event loop except the workers' threads, which wait for their processes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.blueprints import artifact
from services.blueprints.artifact import Kernel
from services.blueprints.digest import JsonValue, sha256
from services.blueprints.signature import attest_status, sign
from services.blueprints.spec import Blueprint
from services.chassis.errors import EsperError, Reason
from services.chassis.telemetry import Telemetry, context_from, current_traceparent
from services.tezzeret.jobs import ENDED, Job, JobBook, Spec, State, now
from services.tezzeret.worker import CancelledJobError, Worker
from services.tezzeret.workers import Workers

_VALIDATED: Final = "VALIDATED"
_REGISTER_SECONDS: Final = 30.0
_REGISTER_PAUSE_SECONDS: Final = 0.5
_MAX_ATTEMPTS: Final = 2


@dataclass(frozen=True)
class SignedKernel:
    """A kernel that is ready for the library: its file, who vouches for it, and the validator's word."""

    job: Job
    data: bytes
    digest: bytes
    signature: bytes
    attestation: bytes
    kernel: Kernel


class Library(Protocol):
    """Where blueprints come from and kernels go: Urza."""

    async def blueprint(self, name: str) -> Blueprint:
        """A blueprint; EsperError UNKNOWN_BLUEPRINT."""

    async def register(self, kernel: SignedKernel) -> str:
        """Upload a kernel and mark it as validated; returns its name."""


class Announcer(Protocol):
    """Who is told what happens to jobs; must not wait."""

    def submitted(self, job: Job) -> None:
        """A job was accepted."""

    def ended(self, job: Job) -> None:
        """A job succeeded or failed."""

    def characterized(self, kernel: SignedKernel, name: str) -> None:
        """What was measured of a kernel."""


class Compiler:
    """Runs the jobs of a book. For one event loop."""

    def __init__(
        self,
        book: JobBook,
        library: Library,
        announcer: Announcer,
        key: Ed25519PrivateKey,
        *,
        telemetry: Telemetry,
        workers: Workers,
        timeout: float,
        on_change: Callable[[Job, bool], None],
    ) -> None:
        self._book = book
        self._library = library
        self._announcer = announcer
        self._key = key
        self._telemetry = telemetry
        self._timeout = timeout
        self._on_change = on_change
        self._workers = workers
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._cancels: dict[str, threading.Event] = {}
        #: Traceparent of the call that asked for a job that waits; jobs of an earlier life have none.
        self._causes: dict[str, str | None] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up the jobs that wait."""
        for job in self._book.queued():
            self._queue.put_nowait(job.name)
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]

    async def stop(self) -> None:
        """End the workers; a job that is under way is queued again at the next start."""
        for cancel in self._cancels.values():
            cancel.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._workers.close()

    def create(self, spec: Spec) -> tuple[Job, bool]:
        """Queue a job unless an equal one is there; see :meth:`JobBook.create`."""
        job, fresh = self._book.create(spec)
        if fresh:
            self._causes[job.name] = current_traceparent()
            self._on_change(job, True)
            self._announcer.submitted(job)
            self._queue.put_nowait(job.name)
        return job, fresh

    def cancel(self, name: str) -> Job:
        """Withdraw a job; one that has ended stays as it is.

        Raises:
            EsperError: COMPILE_JOB_NOT_FOUND.
        """
        job = self._book.get(name)
        if job.state in ENDED:
            return job
        if name in self._cancels:
            self._cancels[name].set()
        return self._put(replace(job, state=State.CANCELLED, end_time=now()))

    async def _work(self, worker: Worker) -> None:
        await self._workers.warm()
        while True:
            name = await self._queue.get()
            cause = self._causes.pop(name, None)
            job = self._book.get(name)
            if job.state is State.QUEUED:
                await self._run(worker, job, cause)

    async def _run(self, worker: Worker, job: Job, cause: str | None) -> None:
        self._cancels[job.name] = threading.Event()
        running = replace(job, state=State.RUNNING, stage="CHECKING", start_time=now(), attempts=job.attempts + 1)
        running = self._put(running)
        try:
            with self._telemetry.span(
                "compile",
                {"esper.compile_job": job.name, "esper.blueprint": job.spec.blueprint},
                parent=context_from(cause),
            ):
                await self._compile(worker, running)
        except CancelledJobError:
            pass  # cancel() has said so in the book, or the service stops and the job waits for its next start
        except EsperError as error:
            self._fail(job.name, error)
        finally:
            del self._cancels[job.name]

    async def _compile(self, worker: Worker, job: Job) -> None:
        blueprint = await self._library.blueprint(job.spec.blueprint)
        data = await self._forge(worker, job, blueprint)
        self._stage(job.name, "SIGNING")
        digest = sha256(data)
        signed = SignedKernel(
            job=job,
            data=data,
            digest=digest,
            signature=sign(self._key, digest),
            attestation=attest_status(self._key, digest, _VALIDATED),
            # The worker is a sandbox: what it made is looked at as if it came from a stranger.
            kernel=artifact.unpack(data),
        )
        self._stage(job.name, "REGISTERING")
        kernel = await self._register(signed)
        ended = replace(
            self._book.get(job.name), state=State.SUCCEEDED, kernel=kernel, digest=digest.hex(), end_time=now()
        )
        if self._cancels[job.name].is_set():
            return
        self._announcer.characterized(signed, kernel)
        self._announcer.ended(self._put(ended))

    async def _forge(self, worker: Worker, job: Job, blueprint: Blueprint) -> bytes:
        """The kernel's file, from a second worker if the first one died under it."""
        request: dict[str, JsonValue] = {
            "blueprint": blueprint.to_json(),
            "interface": job.spec.interface.to_json(),
            "size": job.spec.size,
            "init_seed": job.spec.init_seed,
            "target": job.spec.target,
        }
        loop = asyncio.get_running_loop()

        def stage(name: str) -> None:
            loop.call_soon_threadsafe(self._stage, job.name, name)

        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await self._workers.call(
                    lambda: worker.run(request, stage=stage, cancelled=self._cancels[job.name], timeout=self._timeout)
                )
            except EsperError as error:
                if error.reason is not Reason.WORKER_CRASHED or attempt == _MAX_ATTEMPTS:
                    raise
                current = self._book.get(job.name)
                self._put(replace(current, attempts=current.attempts + 1))
        raise AssertionError("the last attempt returns or raises")

    async def _register(self, signed: SignedKernel) -> str:
        """Register with patience: Urza may be restarting."""
        deadline = asyncio.get_running_loop().time() + _REGISTER_SECONDS
        while True:
            try:
                return await self._library.register(signed)
            except EsperError as error:
                passing = error.reason in (Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DRAINING)
                if not passing or asyncio.get_running_loop().time() > deadline:
                    raise
            await asyncio.sleep(_REGISTER_PAUSE_SECONDS)

    def _stage(self, name: str, stage: str) -> None:
        job = self._book.get(name)
        if job.state is State.RUNNING:
            self._put(replace(job, stage=stage), durable=False)

    def _fail(self, name: str, error: EsperError) -> None:
        job = self._book.get(name)
        if job.state is State.CANCELLED:
            return
        failed = replace(
            job, state=State.FAILED, error_reason=str(error.reason), error_message=error.message, end_time=now()
        )
        self._announcer.ended(self._put(failed))

    def _put(self, job: Job, *, durable: bool = True) -> Job:
        self._book.put(job, durable=durable)
        self._on_change(job, False)
        return job

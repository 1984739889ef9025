"""The compiler: takes jobs from the book, runs them in workers, registers what they make.

Everything here runs on the service's event loop except the workers' threads, which wait for their processes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.blueprints import artifact, families
from services.blueprints.artifact import ArtifactError, Kernel
from services.blueprints.digest import JsonValue, sha256
from services.blueprints.signature import attest_status, interface_signature, sign
from services.blueprints.spec import Blueprint, SpecError
from services.chassis.errors import EsperError, Reason
from services.chassis.telemetry import Telemetry, context_from, current_traceparent
from services.tezzeret.jobs import ENDED, Job, JobBook, Spec, State, now
from services.tezzeret.worker import CancelledJobError, Worker
from services.tezzeret.workers import Workers

_LOG: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
_VALIDATED: Final = "VALIDATED"
_PATIENCE_SECONDS: Final = 30.0
"""How long a job waits for a library that is away."""
_PAUSE_SECONDS: Final = 0.5
_PASSING: Final = frozenset({Reason.UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.DRAINING})
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

    async def holds(self, kernel: str) -> bool:
        """Whether it has a kernel; yes where it cannot be asked."""

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
        self._news = asyncio.Event()
        self._cancels: dict[str, threading.Event] = {}
        #: Traceparent of the call that asked for a job that waits; jobs of an earlier life have none.
        self._causes: dict[str, str | None] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up the jobs that wait."""
        self._tasks = [asyncio.create_task(self._work(worker)) for worker in self._workers]

    async def stop(self) -> None:
        """End the workers; a job that is under way is queued again at the next start."""
        for cancel in self._cancels.values():
            cancel.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._workers.close()

    async def create(self, spec: Spec) -> tuple[Job, bool]:
        """Queue a job unless an equal one is there, see :meth:`JobBook.create`; one whose kernel is lost runs again.

        Raises:
            EsperError: COMPILE_QUEUE_FULL, STORAGE_FULL, STORAGE_FAILED.
        """
        known = self._book.find(spec.job_name)
        if known is not None and known.state is State.SUCCEEDED and not await self._library.holds(known.kernel):
            # Else whoever asks Urza, is told to compile, and is given this job would go round in circles.
            self._book.forget(known)
        job, fresh = self._book.create(spec)
        if fresh:
            self._causes[job.name] = current_traceparent()
            self._on_change(job, True)
            self._announcer.submitted(job)
            self._news.set()
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
        self._causes.pop(name, None)
        return self._put(replace(job, state=State.CANCELLED, end_time=now()))

    async def _work(self, worker: Worker) -> None:
        await self._workers.warm()
        while True:
            waiting = self._book.queued()
            if waiting:
                await self._run(worker, waiting[0])
            else:
                self._news.clear()
                await self._news.wait()

    async def _run(self, worker: Worker, job: Job) -> None:
        cancelled = self._cancels[job.name] = threading.Event()
        parent = context_from(self._causes.pop(job.name, None))
        running = replace(job, state=State.RUNNING, stage="CHECKING", start_time=now(), attempts=job.attempts + 1)
        running = self._put(running)
        try:
            with self._telemetry.span(
                "compile", {"esper.compile_job": job.name, "esper.blueprint": job.spec.blueprint}, parent=parent
            ):
                await self._compile(worker, running, cancelled)
        except CancelledJobError:
            pass  # cancel() has said so in the book, or the service stops and the job waits for its next start
        except EsperError as error:
            self._fail(job.name, cancelled, error)
        except Exception as error:  # noqa: BLE001  # a bug met by one job must not end the loop that serves the others
            _LOG.exception("%s failed in a way that nobody foresaw", job.name)
            unforeseen = EsperError(f"{type(error).__name__}; the log of tezzeret says more", reason=Reason.INTERNAL)
            self._fail(job.name, cancelled, unforeseen)
        finally:
            # A job that was cancelled and created again may be under way in another worker: its event stays.
            if self._cancels.get(job.name) is cancelled:
                del self._cancels[job.name]

    async def _compile(self, worker: Worker, job: Job, cancelled: threading.Event) -> None:
        blueprint = await self._patiently(lambda: self._library.blueprint(job.spec.blueprint), cancelled)
        data = await self._forge(worker, job, blueprint, cancelled)
        self._stage(job.name, cancelled, "SIGNING")
        signed = await self._workers.call(lambda: self._sign(job, blueprint, data))
        self._stage(job.name, cancelled, "REGISTERING")
        kernel = await self._patiently(lambda: self._library.register(signed), cancelled)
        if cancelled.is_set():
            raise CancelledJobError
        ended = replace(
            self._book.get(job.name), state=State.SUCCEEDED, kernel=kernel, digest=signed.digest.hex(), end_time=now()
        )
        self._announcer.characterized(signed, kernel)
        self._announcer.ended(self._put(ended))

    def _sign(self, job: Job, blueprint: Blueprint, data: bytes) -> SignedKernel:
        """Vouch for a kernel. The worker is a sandbox: what it made is looked at as if it came from a stranger.

        Raises:
            EsperError: VALIDATION_FAILED, it is not the kernel that was asked for.
        """
        spec = job.spec
        try:
            kernel = artifact.unpack(data)
            families.check_kernel(kernel)
        except (ArtifactError, SpecError) as error:
            raise EsperError(f"well-formed: {error}", reason=Reason.VALIDATION_FAILED) from error
        manifest = kernel.manifest
        made = (manifest.blueprint, manifest.interface_signature, manifest.size, manifest.seed)
        if made != (blueprint, interface_signature(spec.interface), spec.size, spec.init_seed):
            raise EsperError("as ordered: the worker made another kernel", reason=Reason.VALIDATION_FAILED)
        digest = sha256(data)
        return SignedKernel(
            job=job,
            data=data,
            digest=digest,
            signature=sign(self._key, digest),
            attestation=attest_status(self._key, digest, _VALIDATED),
            kernel=kernel,
        )

    async def _forge(self, worker: Worker, job: Job, blueprint: Blueprint, cancelled: threading.Event) -> bytes:
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
            loop.call_soon_threadsafe(self._stage, job.name, cancelled, name)

        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await self._workers.call(
                    lambda: worker.run(request, stage=stage, cancelled=cancelled, timeout=self._timeout)
                )
            except EsperError as error:
                if error.reason is not Reason.WORKER_CRASHED or attempt == _MAX_ATTEMPTS:
                    raise
                if cancelled.is_set():
                    raise CancelledJobError from error
                current = self._book.get(job.name)
                self._put(replace(current, stage="CHECKING", attempts=current.attempts + 1))
        raise AssertionError("the last attempt returns or raises")

    async def _patiently(self, call: Callable[[], Awaitable[_T]], cancelled: threading.Event) -> _T:
        """Call the library again while it is away: it may be restarting."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _PATIENCE_SECONDS
        while not cancelled.is_set():
            try:
                return await call()
            except EsperError as error:
                if error.reason not in _PASSING or clock() > deadline:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)
        raise CancelledJobError

    def _stage(self, name: str, cancelled: threading.Event, stage: str) -> None:
        if not cancelled.is_set():
            self._book.put(replace(self._book.get(name), stage=stage), durable=False)
            self._on_change(self._book.get(name), False)

    def _fail(self, name: str, cancelled: threading.Event, error: EsperError) -> None:
        if not cancelled.is_set():
            failed = replace(
                self._book.get(name),
                state=State.FAILED,
                error_reason=str(error.reason),
                error_message=error.message,
                end_time=now(),
            )
            self._announcer.ended(self._put(failed))

    def _put(self, job: Job) -> Job:
        """Remember a job's new state, in memory alone where the disk is full: the work goes on."""
        try:
            self._book.put(job)
        except EsperError as error:
            _LOG.warning("%s: a restart would not remember that it is %s: %s", job.name, job.state, error.message)
            self._book.put(job, durable=False)
        self._on_change(job, False)
        return job

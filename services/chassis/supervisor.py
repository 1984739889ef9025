"""Starts the services of a run and its training process, keeps them alive, and takes them down.

The supervisor lives in the launcher (``train.py``), without torch, on one asyncio loop:

    async with Supervisor(config, run_dir) as mesh:
        await mesh.start(job)          # returns when every service is serving
        exit_code = await mesh.wait()  # of the job; crashes of both kinds have been dealt with meanwhile

* Services that the configuration points elsewhere are health-checked; the others are started, all at once. Nothing
  sleeps: a child says its address, then its health is watched.
* A service that dies is started again on the same port, after a wait that doubles from ``restart_backoff_seconds``, at
  most ``max_restarts`` times; then the run goes on without it.
* Logs of the children are bounded (:mod:`services.chassis.log_files`).
* Every child leads a process group of its own, which is killed with it; a pipe tells the children when the supervisor
  has died, whatever killed it (:mod:`services.chassis.process`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from services.chassis.channel import ADDRESSES_DIR, wait_until_serving
from services.chassis.child import Child
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.files import write_atomically
from services.chassis.log_files import LogFiles
from services.chassis.placement import Placement, device_interrupts, place

#: The services of a run, and what each calls: they all start at once, and one that needs another waits for its address
#: (:meth:`services.chassis.channel.ChannelFactory.until_known`) beside whatever else it has to make ready. They stop in
#: the opposite order.
NEEDS: Final[Mapping[str, tuple[str, ...]]] = {
    "urza": (),
    "oona": (),
    "tamiyo": (),
    "kasmina": (),
    "tolaria": (),
    "tezzeret": ("urza", "oona"),
}

#: Niceness of services and of what they start; the job has none.
SERVICE_NICENESS: Final = 10

#: Longest wait before a restart, seconds.
MAX_BACKOFF_SECONDS: Final = 5.0

#: What a service gets beyond its drain time before it is killed, seconds.
_STOP_MARGIN_SECONDS: Final = 3.0

#: How often the lengths of the logs are looked at, seconds: nothing tells of them.
_LOG_LOOK_SECONDS: Final = 5.0


class State(enum.StrEnum):
    """Of a service, as the supervisor sees it."""

    WAITING = "waiting"
    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    EXTERNAL = "external"
    DOWN = "down"
    STOPPED = "stopped"


@dataclasses.dataclass(slots=True)
class ServiceStatus:
    """What is known of one service now."""

    name: str
    state: State = State.WAITING
    address: str | None = None
    pid: int | None = None
    restarts: int = 0
    #: Seconds from the supervisor's start to its process, and to its first SERVING.
    spawned_after: float | None = None
    serving_after: float | None = None
    #: How the process last ended: exit code, negative for a signal.
    last_exit: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a child: for the live view and the report."""

    #: ``time.time()``.
    time: float
    #: Service, or name of the job.
    name: str
    #: "started", "serving", "exited", "restarting", "gave_up", "stopped".
    kind: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The process that the services are there for."""

    name: str
    command: Sequence[str]
    #: Given exit code (negative for a signal) and restarts so far: the command to go on with, or None to leave it.
    restart: Callable[[int, int], Sequence[str] | None]
    #: Called in the supervisor's loop with each object that the job sends (:class:`services.chassis.process.Progress`).
    on_progress: Callable[[dict[str, Any]], None]
    #: Threads it computes with: so many cores become its own, where others are left for the services.
    threads: int = 1
    #: Seconds from SIGTERM to SIGKILL: a checkpoint is written meanwhile.
    stop_seconds: float = 30.0


def _program(name: str) -> Sequence[str]:
    return (sys.executable, "-m", f"services.{name}")


class Supervisor:
    """See the module. Belongs to the loop it is made in.

    ``program`` says how a service is started (the chassis's arguments follow it); ``on_event`` is called in the loop
    with each :class:`Event`. The configuration that the services get is ``config_file``, by default the run folder's.
    ``services`` are those of :data:`NEEDS` that are wanted: all of them, none, or some with what they need.
    """

    def __init__(
        self,
        config: EsperConfig,
        run_dir: Path,
        *,
        config_file: Path | None = None,
        on_event: Callable[[Event], None] | None = None,
        program: Callable[[str], Sequence[str]] = _program,
        services: Collection[str] = tuple(NEEDS),
    ) -> None:
        self.run_dir: Final = run_dir
        #: What is known of each service now.
        self.services: Final = {name: ServiceStatus(name) for name in services}
        #: Restarts of the job.
        self.job_restarts = 0
        #: All that happened, oldest first; bounded by the restarts allowed.
        self.events: Final[list[Event]] = []
        #: Who computes where; decided when all services are serving.
        self.placement = Placement(frozenset(), frozenset())
        self._config = config.services
        self._config_file = config_file if config_file is not None else run_dir / "config.yaml"
        logs = config.telemetry
        self._logs = LogFiles(run_dir / "logs", max_bytes=logs.log_max_bytes, files=logs.log_files)
        self._on_event = on_event
        self._program = program
        self._settled = False
        self._started = time.monotonic()
        self._stopping = asyncio.Event()
        self._now = asyncio.Event()
        self._children: dict[str, Child] = {}
        self._jobs: dict[str, Child] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._job: asyncio.Task[int] | None = None
        # The writing end is never written to and never inherited: it closes when this process dies.
        self._lifeline, self._life = os.pipe()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    async def start(self, job: Job | None = None) -> None:
        """Start everything; returns when all services are serving and ``addresses.json`` says where.

        The job is started first: it has much to load before it needs a service. Returns early when a stop is requested
        meanwhile. Raises EsperError, naming service and address: SERVICE_UNREACHABLE (configured elsewhere and not
        serving), SERVICE_START_FAILED (with its last words). Leaving the ``async with`` block stops what has started.
        """
        threads = job.threads if job is not None else 1
        self.placement = place(frozenset(os.sched_getaffinity(0)), threads, device_interrupts())
        self._keepers.append(asyncio.create_task(self._keep_logs()))
        if job is not None:
            self._job = asyncio.create_task(self._keep_job(job))
        # A stale one, of an earlier launch, would send the job to services that are gone.
        (self.run_dir / "addresses.json").unlink(missing_ok=True)
        starting = asyncio.create_task(self._start_services())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                return
            await starting
        finally:
            stopping.cancel()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        # Only now: while everything loads, all cores are welcome to all, and nobody is nice. But before the job goes
        # on: threads of its that step aside then stay where they went.
        self._settled = True
        for child in self._children.values():
            child.settle(cores=self.placement.services, niceness=SERVICE_NICENESS)
        for child in self._jobs.values():
            child.settle(cores=self.placement.job)
        addresses = {name: status.address for name, status in self.services.items()}
        write_atomically(self.run_dir / "addresses.json", json.dumps(addresses, indent=2) + "\n")

    async def _start_services(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for name in self.services:
                    group.create_task(self._first_start(name))
        except ExceptionGroup as failures:
            # The first to fail has ended the others; one clear reason is better than a tree of them.
            raise failures.exceptions[0] from None

    async def wait(self) -> int:
        """Exit code of the job once it has ended for good; without a job, 0 once a stop is requested."""
        if self._job is None:
            await self._stopping.wait()
            return 0
        return await asyncio.shield(self._job)

    def request_stop(self, *, now: bool = False) -> None:
        """For a signal handler of the loop: the job gets SIGTERM and :meth:`wait` returns; ``now`` kills everything."""
        self._stopping.set()
        if now:
            self._now.set()

    async def stop(self, *, now: bool = False) -> None:
        """Stop the job, then the services; returns when no child is left. Idempotent."""
        self.request_stop(now=now)
        if self._job is not None:
            await asyncio.wait({self._job})
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        # The other way round: who needs another service goes before it.
        dependent = [name for name in self._children if NEEDS.get(name)]
        for wave in (dependent, [name for name in self._children if name not in dependent]):
            await asyncio.gather(*(self._stop_service(name) for name in wave))
        self._children.clear()
        self._close_lifeline()

    async def _stop_service(self, name: str) -> None:
        child = self._children[name]
        await child.stop(self._config.drain_seconds + _STOP_MARGIN_SECONDS, self._now)
        status = self.services[name]
        if status.state is not State.DOWN:
            status.state, status.pid, status.last_exit = State.STOPPED, None, child.ended.result()
            self._emit(name, "stopped", _describe(child.ended.result()))

    def _close_lifeline(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)
            os.close(self._life)

    async def _first_start(self, name: str) -> None:
        status = self.services[name]
        external: str | None = getattr(self._config, name).address
        if external is not None:
            status.state, status.address = State.EXTERNAL, external
            await self._until_serving(name, external)
        else:
            child = await self._launch(name)
            self._keepers.append(asyncio.create_task(self._keep(name, child)))
        status.serving_after = self._elapsed()

    async def _launch(self, name: str) -> Child:
        """A new process for ``name``, serving. Raises EsperError (SERVICE_START_FAILED); the process has ended then."""
        status = self.services[name]
        status.state = State.STARTING
        announced: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        command = [*self._program(name), "--config", str(self._config_file), "--run-dir", str(self.run_dir)]
        command += ["--address-file", str(self.run_dir / ADDRESSES_DIR / name)]
        if status.address is not None:  # everybody knows this address: the service must be found there again
            command += ["--port", status.address.rpartition(":")[2]]
        child = Child(command, log=self._log(name), lifeline=self._lifeline, on_message=announced.put_nowait)
        self._children[name] = child
        status.pid = child.pid
        if status.spawned_after is None:
            status.spawned_after = self._elapsed()
        if self._settled:  # beside a training process; before, all that loads is in somebody's way to the first step
            child.settle(cores=self.placement.services, niceness=SERVICE_NICENESS)
        self._emit(name, "started", f"pid {child.pid}")

        async def serving() -> str:
            address = str((await announced.get())["address"])
            await self._until_serving(name, address)
            return address

        ready = asyncio.create_task(serving())
        # Another service's failure may end this wait: then nobody asks how it went, and asyncio would print a trace.
        ready.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.wait(
                {ready, child.ended}, timeout=self._config.startup_timeout_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
        if child.ended.done() or not ready.done() or ready.exception() is not None:
            how = _describe(child.ended.result()) if child.ended.done() else "not serving in time"
            await child.stop(0.0, self._now)
            raise EsperError(
                f"{name} could not start ({how}): {_last_line(self._log(name))}",
                reason=Reason.SERVICE_START_FAILED,
                metadata={"service": name, "log": str(self._log(name))},
            )
        status.address, status.state = ready.result(), State.SERVING
        self._emit(name, "serving", status.address)
        return child

    async def _until_serving(self, name: str, address: str) -> None:
        await wait_until_serving(
            name, address, tls_config=self._config.tls, timeout=self._config.startup_timeout_seconds
        )

    async def _keep(self, name: str, child: Child) -> None:
        """Start ``name`` again whenever it ends, until it has used up its restarts."""
        status = self.services[name]
        failures = 0
        while True:
            status.last_exit, status.pid = await asyncio.shield(child.ended), None
            self._emit(name, "exited", _describe(status.last_exit))
            if status.restarts >= self._config.max_restarts:
                status.state = State.DOWN
                self._emit(name, "gave_up", f"after {status.restarts} restarts; the run goes on without it")
                return
            status.state = State.RESTARTING
            await asyncio.sleep(self._backoff(failures))
            status.restarts += 1
            self._emit(name, "restarting", f"restart {status.restarts} of at most {self._config.max_restarts}")
            try:
                child = await self._launch(name)
                failures = 0
            except EsperError:  # it has ended: the loop sees to it
                child = self._children[name]
                failures += 1

    async def _keep_logs(self) -> None:
        while True:
            await asyncio.sleep(_LOG_LOOK_SECONDS)
            await asyncio.to_thread(self._logs.rotate)  # a copy of megabytes: the loop has others to serve

    async def _keep_job(self, job: Job) -> int:
        command: Sequence[str] | None = job.command
        code = 0
        stopping = asyncio.create_task(self._stopping.wait())
        while command is not None:
            child = Child(
                command,
                log=self._log(job.name),
                lifeline=self._lifeline,
                on_message=job.on_progress,
                background=self.placement.services,
            )
            if self._settled:
                child.settle(cores=self.placement.job)
            self._jobs[job.name] = child
            self._emit(job.name, "started", f"pid {child.pid}")
            await asyncio.wait({child.ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if self._stopping.is_set():
                await child.stop(job.stop_seconds, self._now)
            code = child.ended.result()
            self._emit(job.name, "exited", _describe(code))
            command = None if code == 0 or self._stopping.is_set() else job.restart(code, self.job_restarts)
            if command is not None:
                await asyncio.wait({stopping}, timeout=self._backoff(self.job_restarts))
                self.job_restarts += 1
        stopping.cancel()
        return code

    def _backoff(self, failures: int) -> float:
        return float(min(MAX_BACKOFF_SECONDS, self._config.restart_backoff_seconds * 2**failures))

    def _log(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _emit(self, name: str, kind: str, detail: str) -> None:
        event = Event(time.time(), name, kind, detail)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)


def _describe(code: int) -> str:
    """An exit code in words."""
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _last_line(log: Path) -> str:
    """The last line a child wrote, where its reason is."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")

"""Compile jobs: their states, their identity, and the folder that remembers them. Transport-free."""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from services.blueprints.digest import JsonValue, canonical_json, resource_id, sha256
from services.blueprints.signature import interface_signature
from services.blueprints.spec import Interface
from services.chassis.errors import EsperError, Reason, not_found
from services.chassis.files import write_atomically

DEFAULT_TARGET: Final = "cpu"
_LOG: Final = logging.getLogger(__name__)
_RETRY_SECONDS: Final = 1.0
_MAX_ATTEMPTS: Final = 5
"""A job that was under way that often when the service died is taken for the cause."""


class State(enum.StrEnum):
    """States of a job."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED: Final = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})

STAGES: Final = ("CHECKING", "BUILDING", "COMPILING", "VALIDATING", "CHARACTERIZING", "SIGNING", "REGISTERING")


@dataclass(frozen=True)
class Spec:
    """What to compile. Equal specifications are one job; where a layer sits in its network does not count."""

    blueprint: str
    interface: Interface
    size: int
    init_seed: int
    target: str = DEFAULT_TARGET

    @property
    def job_name(self) -> str:
        """``compileJobs/{j}`` by content."""
        identity: dict[str, JsonValue] = {
            "blueprint": self.blueprint,
            "interface_signature": interface_signature(self.interface),
            "size": self.size,
            "init_seed": self.init_seed,
            "target": self.target,
        }
        return f"compileJobs/{resource_id(sha256(canonical_json(identity)))}"


@dataclass(frozen=True)
class Job:
    """One job; a change of state makes a new object. Times are UTC."""

    name: str
    spec: Spec
    state: State = State.QUEUED
    stage: str = ""
    kernel: str = ""
    digest: str = ""
    error_reason: str = ""
    error_message: str = ""
    create_time: str = ""
    start_time: str = ""
    end_time: str = ""
    attempts: int = 0

    @property
    def progress(self) -> float:
        """Share of the stages that are done, 0..1."""
        if self.state is State.SUCCEEDED:
            return 1.0
        return STAGES.index(self.stage) / len(STAGES) if self.stage else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "spec": {**asdict(self.spec), "interface": self.spec.interface.to_json()}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """The job that :meth:`to_json` described."""
        spec = document["spec"]
        interface = Interface.from_json(spec["interface"])
        fields = {**document, "spec": Spec(**{**spec, "interface": interface}), "state": State(document["state"])}
        return cls(**fields)


def now() -> str:
    """This moment, ISO 8601."""
    return datetime.now(UTC).isoformat()


class JobBook:
    """All jobs, in a folder with a file each, so that a killed service goes on where it was.

    Args:
        folder: made when it is not there.
        queue_limit: jobs that may wait; one more is COMPILE_QUEUE_FULL.
        keep: ended jobs kept; the oldest go first.
    """

    def __init__(self, folder: Path, *, queue_limit: int, keep: int = 2000) -> None:
        self._folder = folder
        self._queue_limit = queue_limit
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)
        found = [job for path in folder.glob("*.json") if (job := _read(path)) is not None]
        self._jobs = {job.name: job for job in sorted(found, key=lambda job: job.create_time)}
        for job in found:
            if job.state is State.RUNNING:  # by a process that is gone
                self.put(_interrupted(job))

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return sorted(self._jobs.values(), key=lambda job: (job.create_time, job.name), reverse=True)

    def queued(self) -> list[Job]:
        """Jobs that wait, oldest first."""
        return [job for job in reversed(self.jobs()) if job.state is State.QUEUED]

    def find(self, name: str) -> Job | None:
        """One job, if it is known."""
        return self._jobs.get(name)

    def get(self, name: str) -> Job:
        """One job.

        Raises:
            EsperError: COMPILE_JOB_NOT_FOUND.
        """
        if name not in self._jobs:
            raise not_found("compile job", name, reason=Reason.COMPILE_JOB_NOT_FOUND)
        return self._jobs[name]

    def create(self, spec: Spec) -> tuple[Job, bool]:
        """The job of a specification, and whether it is to be run: one that failed or was cancelled runs again.

        Raises:
            EsperError: COMPILE_QUEUE_FULL, STORAGE_FULL, STORAGE_FAILED; the job is not created.
        """
        known = self._jobs.get(spec.job_name)
        if known is not None and known.state not in (State.FAILED, State.CANCELLED):
            return known, False
        if len(self.queued()) >= self._queue_limit:
            raise EsperError(
                f"{self._queue_limit} jobs wait already", reason=Reason.COMPILE_QUEUE_FULL, retry_after=_RETRY_SECONDS
            )
        attempts = known.attempts if known is not None else 0
        return self.put(Job(spec.job_name, spec, create_time=now(), attempts=attempts)), True

    def put(self, job: Job, *, durable: bool = True) -> Job:
        """Remember a job as it is now; ``durable=False`` for what a crash may forget, like a stage.

        Raises:
            EsperError: STORAGE_FULL, STORAGE_FAILED; what was known of the job stays.
        """
        if durable:
            write_atomically(self._path(job), json.dumps(job.to_json()))
        self._jobs[job.name] = job
        if job.state in ENDED:
            ended = [job for job in self.jobs() if job.state in ENDED]
            for oldest in ended[self._keep :]:
                self.forget(oldest)
        return job

    def forget(self, job: Job) -> None:
        """Know nothing of a job any more."""
        self._jobs.pop(job.name, None)
        self._path(job).unlink(missing_ok=True)

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.name.removeprefix('compileJobs/')}.json"


def _read(path: Path) -> Job | None:
    """The job in a file; one that another version wrote or that rotted is left alone, the others are served."""
    try:
        return Job.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is no job that this version reads, it is passed over: %r", path.name, error)
        return None


def _interrupted(job: Job) -> Job:
    """What becomes of a job that was under way when the service died: it waits again, but not for ever."""
    if job.attempts < _MAX_ATTEMPTS:
        return replace(job, state=State.QUEUED, stage="")
    message = f"the service died {job.attempts} times while the job was under way"
    return replace(
        job, state=State.FAILED, error_reason=Reason.WORKER_CRASHED.value, error_message=message, end_time=now()
    )

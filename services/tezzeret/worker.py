"""Worker processes: forked from a server that has torch loaded, watched from a thread each, replaced when they fail.

What crosses the pipe is JSON and the bytes of kernels; nothing that came from outside is ever unpickled. A worker that
takes too long, grows too large or dies takes its job with it, never the service.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Final

import psutil

from services.blueprints.artifact import MAX_ARTIFACT_BYTES
from services.blueprints.digest import JsonValue
from services.blueprints.spec import SpecError
from services.chassis.errors import EsperError, Reason, reason_named

_POLL_SECONDS: Final = 0.05
_OPEN_FILES: Final = 256
_NO_MEMORY: Final = "DefaultCPUAllocator"
"""What torch's only sign of a failed allocation on a processor, a RuntimeError, has in its text."""
_PR_SET_PDEATHSIG: Final = 1
_KERNEL: Final = b"K"
_MESSAGE: Final = b"M"


class CancelledJobError(Exception):
    """The job was withdrawn while it ran."""


def context() -> ForkServerContext:
    """The context that workers come from: its server loads torch once, then each worker starts in a moment."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["services.tezzeret.forge"])
    return made


def serve(connection: Connection, memory_bytes: int) -> None:
    """``main`` of a worker: jobs come in as JSON, stages, kernels and failures go out; the end of the pipe ends it."""
    import torch

    from services.tezzeret.forge import ValidationError, forge

    if sys.platform == "linux":
        # Between jobs the end of the pipe says that the service is gone; a job under way would only see it at its end.
        # The parent is the fork server, which leaves when the service does, whatever killed it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)  # niceness comes with the service's process group
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    # Address space is no measure (torch reserves gigabytes at import); data is what a runaway job would fill.
    resource.setrlimit(resource.RLIMIT_DATA, (2 * memory_bytes, 2 * memory_bytes))

    def say(message: Mapping[str, JsonValue]) -> None:
        connection.send_bytes(_MESSAGE + json.dumps(message).encode())

    while True:
        try:
            request: dict[str, JsonValue] = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            connection.send_bytes(_KERNEL + forge(request, lambda stage: say({"stage": stage})))
        except SpecError as error:
            say({"reason": Reason.BLUEPRINT_DOES_NOT_FIT.value, "message": str(error)})
        except ValidationError as error:
            say({"reason": Reason.VALIDATION_FAILED.value, "message": str(error)})
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _NO_MEMORY not in str(error):
                raise  # nothing foreseen: the process ends, its trace is in the service's log
            say({"reason": Reason.MEMORY_LIMIT.value, "message": "the worker ran out of the memory it may use"})


class Worker:
    """One worker process and the pipe to it. Its methods block: they belong to the worker's thread."""

    def __init__(self, forkserver: ForkServerContext, memory_bytes: int) -> None:
        self._forkserver = forkserver
        self._memory_bytes = memory_bytes
        self._process: ForkServerProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    def warm(self) -> None:
        """Have a process ready."""
        if self._process is None or not self._process.is_alive():
            self.close()
            ours, theirs = self._forkserver.Pipe()
            self._process = self._forkserver.Process(target=serve, args=(theirs, self._memory_bytes), daemon=True)
            self._process.start()
            theirs.close()
            self._connection = ours

    def run(
        self,
        request: Mapping[str, JsonValue],
        *,
        stage: Callable[[str], None],
        cancelled: threading.Event,
        timeout: float,
    ) -> bytes:
        """The kernel of a request.

        Raises:
            EsperError: what the job said, or WORKER_CRASHED, JOB_TIMEOUT, MEMORY_LIMIT.
            CancelledJobError: ``cancelled`` was set meanwhile.
        """
        deadline = time.monotonic() + timeout
        self.warm()
        connection = self._connection
        if connection is None:  # warm() has just set it; said for the type checker and for whoever changes warm()
            raise _crashed("it did not start")
        try:
            connection.send_bytes(json.dumps(request).encode())
            while True:
                self._check(deadline, timeout, cancelled)
                if not connection.poll(_POLL_SECONDS):
                    continue
                answer = connection.recv_bytes(
                    MAX_ARTIFACT_BYTES + 1
                )  # the worker is not trusted: no more than a kernel
                if answer[:1] == _KERNEL:
                    return answer[1:]
                message = json.loads(answer[1:])
                if "stage" not in message:
                    raise EsperError(message["message"], reason=reason_named(message["reason"]))
                stage(message["stage"])
        except (EOFError, OSError) as error:
            code = self._exit_code()
            self.close()
            raise _crashed(f"exit code {code}") from error

    def _check(self, deadline: float, timeout: float, cancelled: threading.Event) -> None:
        """Kill the process and raise when it may not go on."""
        if cancelled.is_set():
            self.close()
            raise CancelledJobError
        if time.monotonic() > deadline:
            self.close()
            raise EsperError(f"the job took longer than {timeout:g} s", reason=Reason.JOB_TIMEOUT)
        used = self._resident_bytes()
        if used > self._memory_bytes:
            self.close()
            raise EsperError(
                f"the worker used {used >> 20} MiB, more than {self._memory_bytes >> 20} MiB",
                reason=Reason.MEMORY_LIMIT,
            )

    def _resident_bytes(self) -> int:
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                return int(psutil.Process(self.pid).memory_info().rss)
        return 0  # it has ended: the pipe says so next

    def _exit_code(self) -> int | None:
        if self._process is None:
            return None
        self._process.join(timeout=1.0)
        return self._process.exitcode

    def close(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._connection is not None:
            self._connection.close()
        self._process, self._connection = None, None


def _crashed(how: str) -> EsperError:
    return EsperError(f"the worker process died ({how})", reason=Reason.WORKER_CRASHED)

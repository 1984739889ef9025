"""What a child process of the launcher does about its parent: die with it, and tell it how the work goes.

A child gets two file descriptors by environment variable: a *lifeline*, the reading end of a pipe on which the parent
never writes, and, for a job, the writing end of a *progress* pipe that takes JSON lines. The kernel closes the parent's
ends whatever kills it, so the end of the lifeline is the one sign of its death that cannot be missed; the parent-death
signal is only the belt (it follows the parent's thread, and no grandchild hears it).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

import psutil

#: Environment variable with the number of the lifeline's descriptor.
LIFELINE_FD: Final = "ESPER_LIFELINE_FD"
#: Environment variable with the number of the progress pipe's descriptor.
PROGRESS_FD: Final = "ESPER_PROGRESS_FD"
#: Environment variable with the cores, by number, of those threads of a job that compute nothing; empty: not divided.
BACKGROUND_CORES: Final = "ESPER_BACKGROUND_CORES"

_PR_SET_PDEATHSIG: Final = 1
_PIPE_BYTES: Final = 2**20


def bind_to_parent(*, grace: float) -> bool:
    """End this process, and its process group if it leads one, ``grace`` seconds after its parent died at the latest.

    First comes SIGTERM, so that what is under way can be put in order. Call it early in a child's ``main``; in a
    process that nobody supervises it does nothing. Returns whether there is a parent to be bound to.
    """
    # Taken out of the environment: the number means nothing to a grandchild.
    number = os.environ.pop(LIFELINE_FD, None)
    if number is None:
        return False
    lifeline = int(number)
    os.set_inheritable(lifeline, False)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(lifeline, grace), name="lifeline", daemon=True).start()
    return True


def step_aside() -> None:
    """Move the calling thread, and the threads it will start, off the cores that this process computes on.

    A job's threads are all on its own cores. One that talks to the services would take turns there with the computing
    thread, and cost it all that it uses; beside the services it costs little. Nothing happens in a process that nobody
    supervises.
    """
    if cores := os.environ.get(BACKGROUND_CORES):
        with contextlib.suppress(OSError):  # taken from us since: then everything is where it can be
            os.sched_setaffinity(0, {int(core) for core in cores.split(",")})


def _watch(lifeline: int, grace: float) -> None:
    while os.read(lifeline, 1):  # pragma: no branch  # nobody writes: the read returns at the end only
        pass
    # Nobody is left to end this process's own children when it leaves in good order.
    atexit.register(_kill_rest_of_group)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(grace)
    _kill_rest_of_group()
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_rest_of_group() -> None:
    """End the other members of the group this process leads; a group led by another is none of its business."""
    own = os.getpid()
    if os.getpgrp() != own:
        return
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):  # gone since it was listed
            if pid != own and os.getpgid(pid) == own:
                os.kill(pid, signal.SIGKILL)


class Progress:
    """Sends JSON lines to the parent and never waits for it: what does not fit into the pipe is dropped and counted.

    For one thread. In a process without a progress pipe every message counts as dropped.
    """

    def __init__(self) -> None:
        number = os.environ.pop(PROGRESS_FD, None)
        self._fd = int(number) if number is not None else None
        #: Messages not sent.
        self.dropped = 0
        self._rest = b""
        if self._fd is not None:
            os.set_inheritable(self._fd, False)
            os.set_blocking(self._fd, False)
            with contextlib.suppress(OSError):  # an unprivileged user may be over the limit: the default size works too
                fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send one object; False where it was dropped (pipe full, parent gone, no pipe)."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        # The rest of a line cut by a full pipe goes first, or the lines would run into each other.
        if self._fd is None or not self._write(self._rest):
            self.dropped += 1
            return False
        self._write(line)
        if self._rest == line:
            self._rest = b""
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Close the pipe; the parent reads its end. Later messages are dropped."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, data: bytes) -> bool:
        """Write what fits, keep the rest; True if nothing is left."""
        assert self._fd is not None, "only called with a pipe"
        written = 0
        if data:
            try:
                written = os.write(self._fd, data)
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.close()
        self._rest = data[written:]
        return not self._rest

"""One child process: its group, its pipes, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from services.chassis.process import BACKGROUND_CORES, LIFELINE_FD, PROGRESS_FD

#: Longest message of a child, bytes; a longer one is skipped.
MAX_MESSAGE_BYTES: Final = 2**20

# What a child wrote before it died is in the pipe; only a stray grandchild can keep the pipe open after that.
_LAST_WORDS_SECONDS: Final = 1.0

_ROOT: Final = Path(__file__).resolve().parents[2]


class Child:
    """A process that leads a group of its own. Make it inside the running loop that is to hear of it.

    Its output is appended to ``log``; each JSON object that it sends (:class:`services.chassis.process.Progress`) is
    passed to ``on_message`` in the loop. ``lifeline`` is the reading end of a pipe on whose end the child ends itself;
    ``background`` are the cores for those of its threads that step aside (:func:`services.chassis.process.step_aside`).
    Raises OSError where ``command`` cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        lifeline: int,
        on_message: Callable[[dict[str, Any]], None],
        background: frozenset[int] = frozenset(),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._exited: asyncio.Future[int] = self._loop.create_future()
        receive, send = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("ab") as output:
                # No preexec_fn: it would run Python between fork and exec, under the locks of other threads.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(lifeline, send, background),
                    pass_fds=(lifeline, send),
                    process_group=0,
                )
        except OSError:
            os.close(receive)
            raise
        finally:
            os.close(send)
        self.pid: Final = self._process.pid
        #: Done when the process has ended, its group is gone and its messages are read; the exit code, -N for signal N.
        self.ended: Final = self._loop.create_task(self._end(receive, on_message))
        # A thread per child and none from the loop's pool, which has too few on a small machine.
        threading.Thread(target=self._reap, name=f"reap-{self.pid}", daemon=True).start()

    async def stop(self, grace: float, now: asyncio.Event) -> None:
        """SIGTERM; SIGKILL to the group after ``grace`` seconds or once ``now`` is set. Returns when it has ended."""
        hurry = asyncio.create_task(now.wait())
        if not (now.is_set() or self.ended.done()):
            self._process.send_signal(signal.SIGTERM)
            await asyncio.wait({self.ended, hurry}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not self._exited.done():
            self._kill_group()
        await asyncio.wait({self.ended})

    def settle(self, *, cores: frozenset[int] = frozenset(), niceness: int = 0) -> None:
        """Put the process, its threads and its descendants on ``cores`` (empty: leave them) and make them nice."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it died meanwhile: nothing to settle
            process = psutil.Process(self.pid)
            for each in (process, *process.children(recursive=True)):
                for thread in each.threads():
                    os.setpriority(os.PRIO_PROCESS, thread.id, niceness)
                    if cores:
                        os.sched_setaffinity(thread.id, cores)

    def _reap(self) -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed under a child that nobody waited for
            self._loop.call_soon_threadsafe(self._exited.set_result, code)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def _end(self, receive: int, on_message: Callable[[dict[str, Any]], None]) -> int:
        reading = asyncio.create_task(_read_messages(receive, on_message))
        code = await self._exited
        self._kill_group()  # what it started and did not end
        read, stuck = await asyncio.wait({reading}, timeout=_LAST_WORDS_SECONDS)
        for task in stuck:
            task.cancel()
        for task in read:
            task.result()  # an error of on_message is an error of its owner: it must not be lost
        return code


def _environment(lifeline: int, progress: int, background: frozenset[int]) -> dict[str, str]:
    # ESPER__ variables are a layer of the configuration, and already in the effective one that a child is given:
    # applied again they would win over --set.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("ESPER__")}
    paths = [str(_ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(paths),
        LIFELINE_FD: str(lifeline),
        PROGRESS_FD: str(progress),
        BACKGROUND_CORES: ",".join(str(core) for core in sorted(background)),
    }


async def _read_messages(descriptor: int, on_message: Callable[[dict[str, Any]], None]) -> None:
    reader = asyncio.StreamReader(limit=MAX_MESSAGE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        while True:
            try:
                line = await reader.readline()
                message = json.loads(line) if line else None
            except ValueError:  # cut short by a kill, or longer than the limit
                continue
            if message is None:
                return
            on_message(message)
    finally:
        transport.close()

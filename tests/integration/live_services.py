"""The six services as real processes, supervised from a thread, for tests that are not asynchronous."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.chassis.config.schema import EsperConfig
from services.chassis.supervisor import Supervisor

#: No test waits for less on purpose: this is long for a machine that is busy with other tests.
SECONDS = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll what another process is about to do."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)
    return found


class Services:
    """The six services, supervised from a thread of its own."""

    def __init__(self, config: EsperConfig, run_dir: Path) -> None:
        self.config = config
        self.run_dir = run_dir
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self.supervisor: Supervisor | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    async def _main(self) -> None:
        try:
            async with Supervisor(self.config, self.run_dir) as self.supervisor:
                await self.supervisor.start()
                self._ready.set()
                await self.supervisor.wait()
        except BaseException as error:
            self._failed = error
            self._ready.set()
            raise

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        assert self._failed is None, f"the services did not start: {self._failed}"

    def stop(self) -> None:
        assert self.supervisor is not None
        self._loop.call_soon_threadsafe(self.supervisor.request_stop)
        self._thread.join()

    def address(self, name: str) -> str:
        assert self.supervisor is not None
        return str(self.supervisor.services[name].address)

    def kill(self, name: str) -> None:
        assert self.supervisor is not None
        status = self.supervisor.services[name]
        assert status.pid is not None
        restarts = status.restarts
        os.kill(status.pid, signal.SIGKILL)
        until(lambda: status.restarts > restarts and status.state == "serving", f"{name} is back")

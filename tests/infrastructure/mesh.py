"""A mesh of real service processes for a test."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any

from services.blueprints.signature import generate_keypair
from services.chassis import telemetry
from services.chassis.channel import ChannelFactory
from services.chassis.config.loader import dump, load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.supervisor import NEEDS, Supervisor


@dataclasses.dataclass(frozen=True)
class LiveMesh:
    """Services that are serving, and channels to them."""

    config: EsperConfig
    run_dir: Path
    supervisor: Supervisor
    channels: ChannelFactory

    def channel(self, service: str) -> Any:
        """A channel as the platform's own processes use it."""
        return self.channels.channel(service)

    def kill(self, service: str) -> None:
        """Kill -9; the supervisor starts it again."""
        pid = self.supervisor.services[service].pid
        assert pid is not None, f"{service} is not running"
        os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def live_mesh(
    run_dir: Path, overrides: Sequence[str] = (), *, services: Collection[str] = tuple(NEEDS)
) -> AsyncIterator[LiveMesh]:
    """Services as processes, in a run folder of their own; stopped in the end."""
    config = load_config(None, overrides=overrides, environ={}).config
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump(config), encoding="utf-8")
    generate_keypair(run_dir / "state" / "keys")
    tracer = telemetry.setup("test", config.telemetry, None, None)
    async with Supervisor(config, run_dir, services=services) as supervisor:
        await supervisor.start()
        channels = ChannelFactory(config.services, tracer, run_dir=run_dir, run_id=run_dir.name)
        try:
            yield LiveMesh(config, run_dir, supervisor, channels)
        finally:
            await channels.close()
            tracer.shutdown()

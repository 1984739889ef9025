"""``main`` of every service: arguments, configuration, telemetry, server, drain.

A service's ``__main__`` is ``sys.exit(run_service("urza", build))``. Exit codes: 0 after a drain, 1 for a failure of
its own, 2 for bad configuration or usage, 3 when it cannot start (port in use, a file or a peer that is not there), 130
when a second Ctrl-C cut the drain short.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from services.chassis import logs, process, telemetry
from services.chassis.channel import ADDRESSES_DIR, ChannelFactory
from services.chassis.config.errors import ConfigError
from services.chassis.config.loader import load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.chassis.server import ServiceServer
from services.chassis.telemetry import Telemetry

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_CANNOT_START: Final = 3
EXIT_INTERRUPTED: Final = 130

#: Where a service started by hand, without a run folder, keeps its state.
DEFAULT_STATE_DIR: Final = Path("esper-state")

_LOGGER: Final = logging.getLogger("esper.service")


class Component(Protocol):
    """The working part of a service, between server and core."""

    async def start(self) -> None:
        """Get ready for calls; called before the server accepts any."""

    async def stop(self) -> None:
        """Release everything; called after the server has drained, and after a failed start."""


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceContext:
    """What the chassis gives a service to build itself from."""

    name: str
    config: EsperConfig
    #: Folder of the run this service belongs to; None when started by hand.
    run_dir: Path | None
    #: Folder of this service's own state; it exists.
    state_dir: Path
    #: Folder of the signing keys, shared by the services that need them; it may not exist.
    keys_dir: Path
    server: ServiceServer
    channels: ChannelFactory
    telemetry: Telemetry

    @property
    def draining(self) -> asyncio.Event:
        """Set when the server drains: open streams must end themselves."""
        return self.server.draining

    def health(self, service: str, serving: bool) -> None:  # noqa: FBT001, RUF100  # reads as a sentence: health(name, False)
        """Set the health of ``service`` (full name), e.g. while its database is away."""
        self.server.health.set(service, serving=serving)


Build = Callable[[ServiceContext], Awaitable[Component]]


def run_service(name: str, build: Build, argv: Sequence[str] | None = None) -> int:
    """Run service ``name`` until SIGTERM or SIGINT; returns the exit code.

    On standard output it prints one JSON line, ``{"service", "address", "pid"}``, once it is SERVING; problems go to
    standard error in one line, logs there as JSON.
    """
    arguments = _parser(name).parse_args(argv)
    try:
        config = load_config(arguments.config, profile=None, overrides=[], environ=os.environ).config
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USAGE
    # Within this time a drain is through: its grace, and the component's own putting in order.
    process.bind_to_parent(grace=config.services.drain_seconds + 3.0)
    run_dir: Path | None = arguments.run_dir
    logs.setup(name, config.telemetry.log_level)
    tracer = telemetry.setup(name, config.telemetry, run_dir, run_dir.name if run_dir is not None else None)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(name, build, config, arguments, tracer))
    except EsperError as error:
        sys.stderr.write(f"esper {name}: cannot start: {error.message} [{error.reason}]\n")
        return EXIT_CANNOT_START
    except Exception:
        _LOGGER.exception("the service failed")
        return EXIT_FAILED
    finally:
        tracer.shutdown()


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m services.{name}", description=f"Esper's service {name}.")
    parser.add_argument("--config", type=Path, help="configuration file; without it the defaults")
    parser.add_argument("--run-dir", type=Path, help="folder of the run this service belongs to")
    parser.add_argument("--address-file", type=Path, help="write host:port here once serving")
    parser.add_argument("--port", type=int, help="listen here instead of on services.<name>.port")
    return parser


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The faster loop where it is installed (+15 to 39 % calls/s), else None for the standard one."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _serve(name: str, build: Build, config: EsperConfig, arguments: argparse.Namespace, tracer: Telemetry) -> int:
    stopping = _stop_signals()
    run_dir: Path | None = arguments.run_dir
    state = config.run.state_dir or (run_dir / "state" if run_dir is not None else DEFAULT_STATE_DIR)
    state_dir = state / name
    state_dir.mkdir(parents=True, exist_ok=True)
    port: int = arguments.port if arguments.port is not None else getattr(config.services, name).port
    server = ServiceServer(config.services, tracer, port=port)
    run_id = run_dir.name if run_dir is not None else None
    async with contextlib.AsyncExitStack() as stack:
        channels = ChannelFactory(config.services, tracer, run_dir=run_dir, run_id=run_id)
        stack.push_async_callback(channels.close)
        component = await build(
            ServiceContext(name, config, run_dir, state_dir, state / "keys", server, channels, tracer)
        )
        stack.push_async_callback(component.stop)
        await component.start()
        address = await server.start()
        stack.push_async_callback(server.stop)
        server.ready()
        _announce(name, address, arguments.address_file or (run_dir and run_dir / ADDRESSES_DIR / name))
        _LOGGER.info("serving", extra={"fields": {"address": address}})
        await stopping.wait()
        _LOGGER.info("draining")
    return 0


def _stop_signals() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; a second Ctrl-C ends the process on the spot.

    A second SIGTERM does not: an orphan gets two, one from the kernel and one from its lifeline.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        stopping.set()
        loop.add_signal_handler(signal.SIGINT, os._exit, EXIT_INTERRUPTED)

    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stopping


def _announce(name: str, address: str, address_file: Path | None) -> None:
    if address_file is not None:
        address_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(address_file, address + "\n", fsync=False)
    announcement = {"service": name, "address": address, "pid": os.getpid()}
    progress = process.Progress()
    progress.send(announcement)
    progress.close()
    # Whoever read the address may go away and leave the pipe closed.
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(announcement) + "\n")
        sys.stdout.flush()

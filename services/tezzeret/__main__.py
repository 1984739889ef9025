"""``python -m services.tezzeret``: the compiler in a process of its own; torch is in its workers only."""

from __future__ import annotations

import sys

from esper.tezzeret.v1.compile_service_pb2_grpc import add_CompileServiceServicer_to_server
from services.blueprints.signature import generate_keypair
from services.chassis.events import EventPublisher
from services.chassis.service_main import ServiceContext, run_service
from services.chassis.watch import WatchHub
from services.tezzeret.clients import EventAnnouncer, UrzaLibrary
from services.tezzeret.compiler import Compiler
from services.tezzeret.jobs import Job, JobBook
from services.tezzeret.servicer import CompileServicer, change_of
from services.tezzeret.workers import Workers


class Tezzeret:
    """The component: a book of jobs, the compiler that runs them, and their servicer."""

    def __init__(self, context: ServiceContext, workers: Workers) -> None:
        settings = context.config.services.tezzeret
        book = JobBook(context.state_dir / "jobs", queue_limit=settings.queue_limit)
        hub: WatchHub[Job] = WatchHub()

        def on_change(job: Job, created: bool) -> None:
            hub.publish(job, change_of(created=created))

        self._publisher = EventPublisher(
            context.channels.channel("oona"), "tezzeret", context.telemetry, context.config.telemetry.event_queue_size
        )
        self._compiler = Compiler(
            book,
            UrzaLibrary(context.channels.channel("urza")),
            EventAnnouncer(self._publisher),
            generate_keypair(context.keys_dir).private_key,
            telemetry=context.telemetry,
            workers=workers,
            timeout=settings.job_timeout_seconds,
            on_change=on_change,
        )
        servicer = CompileServicer(self._compiler, book, hub, draining=context.draining)
        context.server.add(add_CompileServiceServicer_to_server, servicer, "esper.tezzeret.v1.CompileService")

    async def start(self) -> None:
        """Take up what waits."""
        await self._publisher.start()
        await self._compiler.start()

    async def stop(self) -> None:
        """End the workers, then send the events that wait."""
        await self._compiler.stop()
        await self._publisher.stop()


async def build(context: ServiceContext) -> Tezzeret:
    """Tezzeret for the chassis. Its workers load torch while the services it needs come up."""
    settings = context.config.services
    workers = Workers(settings.tezzeret.workers, settings.tezzeret.worker_memory_bytes)
    try:
        for need in ("urza", "oona"):
            await context.channels.until_known(need, timeout=settings.startup_timeout_seconds)
        return Tezzeret(context, workers)
    except BaseException:
        await workers.close()
        raise


if __name__ == "__main__":
    sys.exit(run_service("tezzeret", build))

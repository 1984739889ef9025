"""``python -m services.kasmina``: the control gateway of the execution layer, without torch."""

from __future__ import annotations

import sys

from esper.kasmina.v1.execution_link_service_pb2_grpc import add_ExecutionLinkServiceServicer_to_server
from esper.kasmina.v1.kasmina_service_pb2_grpc import add_KasminaServiceServicer_to_server
from services.chassis.service_main import ServiceContext, run_service
from services.kasmina.gateway import KasminaGateway
from services.kasmina.servicer import ExecutionLinkServicer, KasminaServicer


class Kasmina:
    """The component: all its state comes from the training processes that attach."""

    def __init__(self, context: ServiceContext) -> None:
        gateway = KasminaGateway(command_limit=context.config.services.kasmina.command_queue_limit)
        control = KasminaServicer(gateway, draining=context.draining)
        link = ExecutionLinkServicer(gateway, draining=context.draining)
        context.server.add(add_KasminaServiceServicer_to_server, control, "esper.kasmina.v1.KasminaService")
        context.server.add(add_ExecutionLinkServiceServicer_to_server, link, "esper.kasmina.v1.ExecutionLinkService")

    async def start(self) -> None:
        """Nothing to wait for."""

    async def stop(self) -> None:
        """Nothing to keep."""


async def build(context: ServiceContext) -> Kasmina:
    """Kasmina's gateway for the chassis."""
    return Kasmina(context)


if __name__ == "__main__":
    sys.exit(run_service("kasmina", build))

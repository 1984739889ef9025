"""``python -m services.tolaria``: the control gateway of the training process, without torch."""

from __future__ import annotations

import sys

from esper.tolaria.v1.training_link_service_pb2_grpc import add_TrainingLinkServiceServicer_to_server
from esper.tolaria.v1.training_service_pb2_grpc import add_TrainingServiceServicer_to_server
from services.chassis.service_main import ServiceContext, run_service
from services.tolaria.gateway import TolariaGateway
from services.tolaria.servicer import TrainingLinkServicer, TrainingServicer


class Tolaria:
    """The component: all its state comes from the training processes that attach."""

    def __init__(self, context: ServiceContext) -> None:
        gateway = TolariaGateway(command_limit=context.config.services.tolaria.command_queue_limit)
        control = TrainingServicer(gateway, draining=context.draining)
        link = TrainingLinkServicer(gateway, draining=context.draining)
        context.server.add(add_TrainingServiceServicer_to_server, control, "esper.tolaria.v1.TrainingService")
        context.server.add(add_TrainingLinkServiceServicer_to_server, link, "esper.tolaria.v1.TrainingLinkService")

    async def start(self) -> None:
        """Nothing to wait for."""

    async def stop(self) -> None:
        """Nothing to keep."""


async def build(context: ServiceContext) -> Tolaria:
    """Tolaria's gateway for the chassis."""
    return Tolaria(context)


if __name__ == "__main__":
    sys.exit(run_service("tolaria", build))

"""Puts the service together: bus, core, servicer."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Final

from esper.events.v1 import events_pb2
from esper.oona.v1.event_service_pb2_grpc import add_EventServiceServicer_to_server
from services.chassis.config.schema import OonaConfig
from services.chassis.service_main import ServiceContext
from services.oona.bus import Bus
from services.oona.exchange import EventExchange
from services.oona.servicer import SERVICE_NAME, EventServicer

_LOG: Final = logging.getLogger(__name__)

#: Loaded so that reflection can explain the payloads of events to grpcurl; Oona itself never looks into them.
PAYLOADS: Final = events_pb2.DESCRIPTOR


class OonaComponent:
    """The event bus between start and stop."""

    def __init__(self, exchange: EventExchange) -> None:
        self._exchange = exchange

    async def start(self) -> None:
        """Opens the log or reaches the broker; raises EsperError (BUS_UNAVAILABLE)."""
        await self._exchange.start()

    async def stop(self) -> None:
        """Stores what is under way and closes the bus."""
        await self._exchange.stop()
        _LOG.info("stopped", extra={"fields": asdict(self._exchange.counters)})


def open_bus(config: OonaConfig, state_dir: Path) -> Bus:
    """The bus that the configuration names; not started."""
    if config.backend == "kafka":
        from services.oona.kafka.bus import KafkaBus  # only a mesh with Kafka pays for the client

        return KafkaBus(
            config.kafka.bootstrap_servers,
            prefix=config.kafka.topic_prefix,
            replication_factor=config.kafka.replication_factor,
        )
    from services.oona.embedded.bus import EmbeddedBus

    return EmbeddedBus(state_dir)


async def build(context: ServiceContext) -> OonaComponent:
    """For :func:`services.chassis.service_main.run_service`."""
    config = context.config.services.oona
    exchange = EventExchange(
        open_bus(config, context.state_dir),
        partitions=config.partitions,
        retention_bytes=config.retention_bytes,
        max_attempts=config.max_delivery_attempts,
    )
    context.server.add(add_EventServiceServicer_to_server, EventServicer(exchange, context.draining), SERVICE_NAME)
    return OonaComponent(exchange)

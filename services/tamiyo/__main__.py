"""``python -m services.tamiyo``: the policy service in a process of its own."""

from __future__ import annotations

import sys

from esper.tamiyo.v1.policy_service_pb2_grpc import add_PolicyServiceServicer_to_server
from services.chassis.service_main import ServiceContext, run_service
from services.tamiyo.decisions import DecisionMaker
from services.tamiyo.registry import PolicyRegistry
from services.tamiyo.servicer import PolicyServicer
from services.tamiyo.store import Store, sqlite_url


class Tamiyo:
    """The component: a store, the registry and decision maker on it, and their servicer."""

    def __init__(self, context: ServiceContext) -> None:
        settings = context.config.services.tamiyo
        url = settings.database_url or sqlite_url(context.state_dir)
        self._store = Store(url, decision_limit=settings.decision_log_limit)
        registry = PolicyRegistry(self._store)
        maker = DecisionMaker(self._store, registry)
        self._servicer = PolicyServicer(self._store, registry, maker, draining=context.draining)
        context.server.add(add_PolicyServiceServicer_to_server, self._servicer, "esper.tamiyo.v1.PolicyService")

    async def start(self) -> None:
        """Nothing to wait for: the store is open."""

    async def stop(self) -> None:
        """Finish the core's last call, then close the store."""
        self._servicer.close()
        self._store.close()


async def build(context: ServiceContext) -> Tamiyo:
    """Tamiyo for the chassis."""
    return Tamiyo(context)


if __name__ == "__main__":
    sys.exit(run_service("tamiyo", build))

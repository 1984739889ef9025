"""Channels to the services of one mesh."""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from google.rpc import error_details_pb2  # registers ErrorInfo, so that grpclib decodes the details of errors
from grpclib.client import Channel
from grpclib.exceptions import GRPCError

from esper_client._gen.esper.kasmina.v1 import KasminaServiceStub
from esper_client._gen.esper.oona.v1 import EventServiceStub
from esper_client._gen.esper.tamiyo.v1 import PolicyServiceStub
from esper_client._gen.esper.tezzeret.v1 import CompileServiceStub
from esper_client._gen.esper.tolaria.v1 import TrainingServiceStub
from esper_client._gen.esper.urza.v1 import BlueprintServiceStub


class Mesh:
    """The services of a mesh, each behind a channel that connects with its first call.

    Use it as an asynchronous context manager, or call `close`. It belongs to one event loop.

    Args:
        addresses: ``host:port`` of each service by name ("urza", "tolaria"...).
        tls: context for servers with TLS; None: plain text, as on loopback.
    """

    def __init__(self, addresses: Mapping[str, str], *, tls: ssl.SSLContext | None = None) -> None:
        self._addresses = dict(addresses)
        self._tls = tls
        self._channels: dict[str, Channel] = {}

    @classmethod
    def from_file(cls, path: str | Path, *, tls: ssl.SSLContext | None = None) -> Self:
        """The mesh of a run, by the ``addresses.json`` of its folder.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not JSON.
        """
        return cls(json.loads(Path(path).read_text(encoding="utf-8")), tls=tls)

    def channel(self, service: str) -> Channel:
        """The channel to a service, for stubs of one's own.

        Raises:
            KeyError: the mesh has no such service.
        """
        if service not in self._channels:
            host, _, port = self._addresses[service].rpartition(":")
            self._channels[service] = Channel(host.strip("[]"), int(port), ssl=self._tls)
        return self._channels[service]

    @property
    def blueprints(self) -> BlueprintServiceStub:
        """Urza: the library of blueprints and kernels."""
        return BlueprintServiceStub(self.channel("urza"))

    @property
    def compiler(self) -> CompileServiceStub:
        """Tezzeret: compile jobs."""
        return CompileServiceStub(self.channel("tezzeret"))

    @property
    def policy(self) -> PolicyServiceStub:
        """Tamiyo: decisions and policies."""
        return PolicyServiceStub(self.channel("tamiyo"))

    @property
    def seeds(self) -> KasminaServiceStub:
        """Kasmina: seeds, slots and adaptations of the attached runs."""
        return KasminaServiceStub(self.channel("kasmina"))

    @property
    def events(self) -> EventServiceStub:
        """Oona: topics and events."""
        return EventServiceStub(self.channel("oona"))

    @property
    def training(self) -> TrainingServiceStub:
        """Tolaria: runs."""
        return TrainingServiceStub(self.channel("tolaria"))

    def close(self) -> None:
        """Closes all channels; calls under way fail."""
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    async def __aenter__(self) -> Self:
        """The mesh itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all channels."""
        self.close()


def reason_of(error: GRPCError) -> str | None:
    """The reason of an error, e.g. ``RUN_NOT_FOUND`` (a row of the platform's table); None where it names none."""
    for detail in error.details or ():
        if isinstance(detail, error_details_pb2.ErrorInfo) and detail.domain == "esper":
            return str(detail.reason)
    return None

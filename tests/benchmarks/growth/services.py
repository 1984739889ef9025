"""The mesh as the runs of a benchmark share it: the real one for figures, one in this process for checks of code."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import grpc

from esper.tamiyo.v1 import observation_pb2, policy_service_pb2
from esper.tamiyo.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.blueprints import signature
from services.blueprints.signature import load_public_key
from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import Telemetry
from services.kasmina.kernel_cache import KernelCache
from services.tamiyo import wire
from services.tamiyo.policies import ALGORITHMS
from services.tamiyo.policies.planning import closed
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.mesh import MeshClient
from services.tolaria.ports import Decision, Mesh, NoDecision, PlannedChange
from tests.integration.trainer_harness import ScriptedMesh

_CACHE_BYTES = 1 << 24
_SECONDS = 30.0


class Services(Protocol):
    """Where a run gets its decisions and its kernels."""

    def policy(self, algorithm: str, parameters: Mapping[str, Any]) -> str:
        """Name of a policy version with these parameters, for ``growth.policy``."""
        ...

    def shelf(self, folder: Path) -> KernelShelf:
        """For the kernels of one run."""
        ...

    def mesh(
        self, config: EsperConfig, run: str, shelf: KernelShelf, telemetry: Telemetry
    ) -> contextlib.AbstractContextManager[Mesh]:
        """The mesh as one run sees it."""
        ...


class SharedServices:
    """The services that the runner started; ``folder`` holds their addresses and keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def policy(self, algorithm: str, parameters: Mapping[str, Any]) -> str:
        """Made anew; version 1 is that of the defaults. Raises grpc.RpcError."""
        if not parameters:
            return f"policies/{algorithm}@1"
        address = json.loads((self._folder / "addresses.json").read_bytes())["tamiyo"]
        request = policy_service_pb2.CreatePolicyRequest(algorithm=algorithm, request_id=str(time.time_ns()))
        request.parameters.update(dict(parameters))
        with grpc.insecure_channel(address) as channel:
            return PolicyServiceStub(channel).CreatePolicy(request, timeout=_SECONDS).policy.name

    def shelf(self, folder: Path) -> KernelShelf:
        """Trusts the key of these services."""
        keys = load_public_key(self._folder / "state" / "keys")
        return KernelShelf(folder / "kernels", KernelCache(_CACHE_BYTES), keys)

    @contextlib.contextmanager
    def mesh(self, config: EsperConfig, run: str, shelf: KernelShelf, telemetry: Telemetry) -> Iterator[Mesh]:
        """Connected inside the block."""
        incarnation = time.time_ns() // 1_000_000
        mesh = MeshClient(
            config=config, run=run, run_dir=self._folder, shelf=shelf, telemetry=telemetry, incarnation=incarnation
        )
        mesh.start()
        try:
            yield mesh
        finally:
            mesh.stop()


class _LocalMesh(ScriptedMesh):
    """Tamiyo's policies and Tezzeret's builders, called."""

    def __init__(self, parameters: Mapping[str, Any], keys: signature.KeyPair, shelf: KernelShelf) -> None:
        super().__init__(lambda _: (), keys, shelf, polls=0)
        self._parameters = parameters

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """As Tamiyo does."""
        algorithm = ALGORITHMS[policy.removeprefix("policies/").partition("@")[0]]
        seen = wire.read_observation(observation)
        if (reason := closed(seen)) is not None:
            return Decision(f"decision-{request_id}", policy, (), (), reason, 0.0)
        plan = algorithm.decide(seen, {**algorithm.DEFAULTS, **self._parameters}, {})
        changes = tuple(
            PlannedChange(
                change.slot.rsplit("/", 1)[-1], change.blueprint.rsplit("/", 1)[-1], change.size, change.reason
            )
            for change in plan.changes
        )
        return Decision(f"decision-{request_id}", policy, changes, (), plan.explanation, 0.0)


class LocalServices:
    """No processes: for tests, and for asking whether two versions of the code train alike."""

    def __init__(self, folder: Path) -> None:
        self._keys = signature.generate_keypair(folder / "keys")
        self._parameters: Mapping[str, Any] = {}

    def policy(self, algorithm: str, parameters: Mapping[str, Any]) -> str:
        """Remembered for the next mesh."""
        self._parameters = parameters
        return f"policies/{algorithm}@1"

    def shelf(self, folder: Path) -> KernelShelf:
        """Trusts its own key."""
        return KernelShelf(folder / "kernels", KernelCache(_CACHE_BYTES), self._keys.public_key)

    @contextlib.contextmanager
    def mesh(self, config: EsperConfig, run: str, shelf: KernelShelf, telemetry: Telemetry) -> Iterator[Mesh]:
        """One with the parameters last asked for."""
        yield _LocalMesh(self._parameters, self._keys, shelf)

"""What the training loop needs from the mesh, in its own terms and the messages of the contracts. Torch-free; no gRPC.

Everything here is called from the training thread and returns at once, but for :meth:`Mesh.decide`, which has a
deadline. ``services.tolaria.mesh`` implements it over gRPC and ``services.tolaria.mesh_link``, which is what runs have,
with that in a process of its own; :class:`OfflineMesh` is for runs without growth.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from google.protobuf.message import Message

from esper.kasmina.v1 import kasmina_service_pb2, seed_pb2, topology_pb2
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from esper.tolaria.v1 import run_pb2
from services.blueprints.spec import Blueprint, Interface

#: What the gateways are told, so that they can answer for the run.
Picture = (
    topology_pb2.Topology
    | seed_pb2.Seed
    | kasmina_service_pb2.HealthReport
    | kasmina_service_pb2.CacheStats
    | run_pb2.Run
)


class KernelUnavailableError(Exception):
    """There will be no kernel: the compile failed, the artifact was refused, or the mesh did not answer."""


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """One change of a plan. ``slot`` and ``blueprint`` are bare ids, without their collection's prefix."""

    slot: str
    blueprint: str
    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What Tamiyo answered. ``evidence`` has one JSON object per slot; ``latency_ms`` is the whole call."""

    decision: str
    policy: str
    plan: tuple[PlannedChange, ...]
    evidence: tuple[Mapping[str, Any], ...]
    explanation: str
    latency_ms: float

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Decision:
        """The inverse of ``dataclasses.asdict``, out of another process."""
        plan = tuple(PlannedChange(**change) for change in content["plan"])
        return Decision(**{**content, "plan": plan, "evidence": tuple(content["evidence"])})


@dataclass(frozen=True, slots=True)
class NoDecision:
    """Why there is no answer; training goes on without an adaptation."""

    reason: str
    latency_ms: float


@dataclass(frozen=True, slots=True)
class KernelFile:
    """A kernel as stored: ``digest`` is the SHA-256 of ``data`` in hex, ``signature`` Tezzeret's Ed25519 over it."""

    name: str
    digest: str
    signature: bytes
    data: bytes


class KernelRequest(Protocol):
    """A kernel on its way."""

    @property
    def done(self) -> bool:
        """Whether :meth:`result` answers without waiting. Cheap: asked at every step."""
        ...

    def result(self, timeout: float | None = None) -> str:
        """Digest of the kernel, verified and on the shelf. Raises KernelUnavailableError with the reason."""
        ...

    def cancel(self) -> None:
        """Nobody needs it any more."""
        ...


class PendingKernel:
    """A kernel that a thread is after (``KernelRequest``): ``future`` is of its digest."""

    def __init__(self, future: concurrent.futures.Future[str]) -> None:
        self.future = future

    @property
    def done(self) -> bool:
        """See ``KernelRequest``."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> str:
        """See ``KernelRequest``."""
        try:
            return self.future.result(timeout)
        except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
            raise KernelUnavailableError("its kernel was not there in time") from None

    def cancel(self) -> None:
        """See ``KernelRequest``."""
        self.future.cancel()


class CommandKind(StrEnum):
    """What a caller of the gateways may ask of a run."""

    GERMINATE = "germinate"
    CULL = "cull"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    CHECKPOINT = "checkpoint"
    ROLLBACK = "rollback"


#: Commands that go to Kasmina's gateway; the others go to Tolaria's.
ADAPTATION_COMMANDS = frozenset({CommandKind.GERMINATE, CommandKind.CULL})


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of a caller. Bare ids; which fields mean something depends on ``kind``."""

    command_id: str
    kind: CommandKind
    reason: str = ""
    requester: str = ""
    slot: str = ""
    blueprint: str = ""
    size: int = 0
    seed: str = ""
    checkpoint: str = ""

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Command:
        """The inverse of ``dataclasses.asdict``, out of the journal."""
        return Command(**{**content, "kind": CommandKind(content["kind"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandResult:
    """What became of a command; ``error_reason`` is empty when it was applied."""

    command: Command
    step: int
    seed: str = ""
    checkpoint_step: int | None = None
    error_reason: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class EventCounts:
    """Events handed to Oona, and events dropped because the queue was full or Oona refused them."""

    published: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class KernelTarget:
    """What a kernel is wanted for: identity of the compile job."""

    blueprint: Blueprint
    interface: Interface
    size: int
    init_seed: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "blueprint": self.blueprint.to_json(),
            "interface": self.interface.to_json(),
            "size": self.size,
            "init_seed": self.init_seed,
        }

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> KernelTarget:
        """The inverse of :meth:`to_json`, out of another process."""
        return KernelTarget(
            Blueprint.from_json(content["blueprint"]),
            Interface.from_json(content["interface"]),
            content["size"],
            content["init_seed"],
        )


class Mesh(Protocol):
    """The services, as seen from the training loop."""

    def candidates(self) -> Sequence[Blueprint]:
        """Blueprints that Urza holds and the configuration allows; empty while Urza does not answer."""
        ...

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """Ask Tamiyo's ``policy``: "utilization", or "policies/<p>@<version>". Returns within ``deadline`` seconds."""
        ...

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        """Resolve a kernel at Urza, or have Tezzeret compile one; asynchronous."""
        ...

    def report_outcome(self, outcome: outcome_pb2.Outcome, kernel: str) -> None:
        """Tell Tamiyo what a seed turned out to be worth, and Urza about its ``kernel`` (empty: it had none)."""
        ...

    def publish(self, topic: str, key: str, payload: Message) -> None:
        """Queue one event for Oona; dropped and counted when the queue is full."""
        ...

    def show(self, picture: Picture) -> None:
        """Let the gateways know how the run is doing; of each thing only the newest picture counts."""
        ...

    def commands(self) -> Sequence[Command]:
        """Commands that arrived since the last call, oldest first, each id once."""
        ...

    def answer(self, result: CommandResult) -> None:
        """Tell the gateway what became of a command."""
        ...

    def wait(self, timeout: float) -> None:
        """Sleep until a command may have arrived, at most ``timeout`` seconds."""
        ...

    def event_counts(self) -> EventCounts:
        """What became of the events so far."""
        ...


class NoKernel:
    """A request that nobody will answer."""

    done = True

    def result(self, timeout: float | None = None) -> str:
        """Raises KernelUnavailableError."""
        raise KernelUnavailableError("there is no mesh to ask for a kernel")

    def cancel(self) -> None:
        """Nothing to withdraw."""


class OfflineMesh:
    """No services: nobody to ask, nobody to tell. For control arms, and for runs that are replayed without a mesh."""

    def candidates(self) -> Sequence[Blueprint]:
        """None."""
        return ()

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """Nobody decides."""
        return NoDecision("there is no mesh", 0.0)

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        """A request that has failed already."""
        return NoKernel()

    def report_outcome(self, outcome: outcome_pb2.Outcome, kernel: str) -> None:
        """Nobody listens."""

    def publish(self, topic: str, key: str, payload: Message) -> None:
        """Nobody listens."""

    def show(self, picture: Picture) -> None:
        """Nobody looks."""

    def commands(self) -> Sequence[Command]:
        """None."""
        return ()

    def answer(self, result: CommandResult) -> None:
        """Nobody asked."""

    def wait(self, timeout: float) -> None:
        """Nothing will come."""

    def event_counts(self) -> EventCounts:
        """No events."""
        return EventCounts()


class AskingMesh(OfflineMesh):
    """Asks the services as the run does and tells them nothing: for a control that grows beside the run's story."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def candidates(self) -> Sequence[Blueprint]:
        """Those of the run."""
        return self._mesh.candidates()

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """Tamiyo's."""
        return self._mesh.decide(observation, policy=policy, request_id=request_id, deadline=deadline)

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        """Urza's, or Tezzeret's."""
        return self._mesh.obtain_kernel(target)

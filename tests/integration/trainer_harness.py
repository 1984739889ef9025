"""A trainer in this process, with the mesh's part played by the real cores: real kernels, signed, on a real shelf.

What stands in for Tamiyo and Tezzeret here answers at once and by rote; the tests that need the services start them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import Message
from torch import nn

from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from services.blueprints import families, signature
from services.blueprints.artifact import Characterization, Manifest, pack
from services.blueprints.builder.branches import build_branch
from services.blueprints.spec import Blueprint
from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import setup
from services.kasmina.kernel_cache import KernelCache
from services.tolaria import models, task
from services.tolaria.checkpoint import CheckpointStore
from services.tolaria.data import splits
from services.tolaria.data.splits import DataSet
from services.tolaria.interrupt import Interrupt
from services.tolaria.journal import Journal
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.names import bare
from services.tolaria.ports import (
    Command,
    CommandResult,
    Decision,
    EventCounts,
    KernelFile,
    KernelRequest,
    KernelTarget,
    KernelUnavailableError,
    Mesh,
    NoDecision,
    OfflineMesh,
    Picture,
    PlannedChange,
)
from services.tolaria.progress import Progress, ProgressWriter, decode
from services.tolaria.reporting import RunReporter
from services.tolaria.trainer import TolariaTrainer

_BUILTIN = {blueprint.family: blueprint for blueprint in families.builtin_blueprints()}
WIDEN, BRANCH = _BUILTIN["widen"], _BUILTIN["residual_bottleneck"]
Policy = Callable[[observation_pb2.Observation], Sequence[tuple[str, Blueprint, int]]]


def compile_kernel(target: KernelTarget, keys: signature.KeyPair) -> KernelFile:
    """What Tezzeret does: build, pack, sign."""
    family = families.check_fit(target.blueprint, target.interface, target.size)
    tensors = {}
    if family.path == "branch":
        branch = build_branch(target.blueprint, target.interface, target.size, target.init_seed)
        tensors = {name: tensor.detach().numpy() for name, tensor in branch.named_parameters()}
    parameters = family.parameters(target.blueprint.parameters, target.interface, target.size)
    manifest = Manifest(
        blueprint=target.blueprint,
        interface=target.interface,
        interface_signature=signature.interface_signature(target.interface),
        size=target.size,
        seed=target.init_seed,
        characterization=Characterization("cpu", parameters),
    )
    data = pack(manifest, tensors)
    digest = hashlib.sha256(data)
    return KernelFile(
        name=f"blueprints/{target.blueprint.id}/kernels/{digest.hexdigest()[:32]}",
        digest=digest.hexdigest(),
        signature=signature.sign(keys.private_key, digest.digest()),
        data=data,
    )


class ReadyKernel:
    """A request that is answered once ``ready`` says so, or somebody waits."""

    def __init__(self, answer: Callable[[], str], ready: Callable[[], bool]) -> None:
        self._answer = answer
        self._ready = ready
        self.cancelled = False

    @property
    def done(self) -> bool:
        return self._ready()

    def result(self, timeout: float | None = None) -> str:
        if not self._ready() and not timeout:
            raise KernelUnavailableError("it is not there yet")
        return self._answer()

    def cancel(self) -> None:
        self.cancelled = True


class ScriptedMesh(OfflineMesh):
    """Decides by ``policy`` and compiles at once; remembers what it was told."""

    def __init__(self, policy: Policy, keys: signature.KeyPair, shelf: KernelShelf, *, polls: int = 3) -> None:
        self.policy = policy
        self.keys = keys
        self.shelf = shelf
        #: Safe points until a kernel is there; ``looks`` counts them.
        self.polls = polls
        self.looks = 0
        self.blueprints: Sequence[Blueprint] = families.builtin_blueprints()
        self.asked: list[observation_pb2.Observation] = []
        self.outcomes: list[outcome_pb2.Outcome] = []
        self.events: list[tuple[str, Message]] = []
        self.pictures: list[Picture] = []
        self.answers: list[CommandResult] = []
        self.waiting_commands: list[Command] = []
        self.on_wait: Callable[[], None] = lambda: None
        self.targets: list[KernelTarget] = []
        self.refuse_kernels = ""

    def candidates(self) -> Sequence[Blueprint]:
        return self.blueprints

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        self.asked.append(observation)
        plan = tuple(
            PlannedChange(bare(slot), blueprint.id, size, "by rote")
            for slot, blueprint, size in self.policy(observation)
        )
        return Decision(f"decision-{request_id}", "policies/rote@1", plan, (), "by rote", 1.0)

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        self.targets.append(target)

        def answer() -> str:
            if self.refuse_kernels:
                raise KernelUnavailableError(self.refuse_kernels)
            return self.shelf.admit(compile_kernel(target, self.keys))

        ready_at = self.looks + self.polls
        return ReadyKernel(answer, lambda: self.looks >= ready_at)

    def report_outcome(self, outcome: outcome_pb2.Outcome, kernel: str) -> None:
        self.outcomes.append(outcome)

    def publish(self, topic: str, key: str, payload: Message) -> None:
        self.events.append((topic, payload))

    def show(self, picture: Picture) -> None:
        self.pictures.append(picture)

    def commands(self) -> Sequence[Command]:
        self.looks += 1
        found, self.waiting_commands = self.waiting_commands, []
        return found

    def answer(self, result: CommandResult) -> None:
        self.answers.append(result)

    def wait(self, timeout: float) -> None:
        self.on_wait()

    def event_counts(self) -> EventCounts:
        return EventCounts(len(self.events), 0)


def grow_once(*changes: tuple[str, Blueprint, int]) -> Policy:
    """Plans ``changes`` at the first decision and nothing later."""

    def policy(observation: observation_pb2.Observation) -> Sequence[tuple[str, Blueprint, int]]:
        return changes if not any(slot.seeds for slot in observation.slots) and observation.decisions_left > 1 else ()

    return policy


def config_of(**sections: Any) -> EsperConfig:
    """A short digits run; ``sections`` override by section."""
    base: dict[str, Any] = {
        "data": {"limit": 400, "batch_size": 40},
        "model": {"widths": [2, 3]},
        "training": {"epochs": 6, "device": "cpu", "optimizer": {"learning_rate": 0.2}},
        "growth": {"window": [0.1, 0.6], "decisions": 2, "health_samples": 128, "evaluation": {"min_epochs": 1}},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return EsperConfig.model_validate(base)


class HeardProgress:
    """Takes what would go to the launcher."""

    def __init__(self) -> None:
        self.heard: list[Progress] = []

    def send(self, message: Mapping[str, Any]) -> bool:
        decoded = decode(json.dumps(message))
        assert decoded is not None
        self.heard.append(decoded)
        return True


class Harness:
    """Everything a trainer needs, in one folder; ``trainer()`` makes one, again after a "crash" too."""

    def __init__(self, folder: Path, config: EsperConfig, policy: Policy = lambda _: (), *, polls: int = 3) -> None:
        self.folder = folder
        self.config = config
        self.policy = policy
        self.polls = polls
        self.data: DataSet = splits.load(config.data, config.run.seed, task.load(config.task))
        self.keys = signature.generate_keypair(folder / "keys")
        self.interrupt = Interrupt()
        self.progress = HeardProgress()
        self.mesh: Mesh = OfflineMesh()

    @property
    def scripted(self) -> ScriptedMesh:
        assert isinstance(self.mesh, ScriptedMesh)
        return self.mesh

    def build_host(self) -> nn.Module:
        return models.build_host(self.config.model, self.data, self.config.run.seed)

    def trainer(
        self, *, arm: str = "grown", grow: bool = True, mesh: Mesh | None = None, **changes: Any
    ) -> TolariaTrainer:
        shelf = KernelShelf(self.folder / "kernels", KernelCache(1 << 20), self.keys.public_key)
        self.mesh = mesh or ScriptedMesh(self.policy, self.keys, shelf, polls=self.polls)
        self.interrupt = Interrupt()
        config = self.config
        arguments: dict[str, Any] = {
            "config": config,
            "data": self.data,
            "arm": arm,
            "run": "run-1",
            "folder": self.folder,
            "build_host": self.build_host,
            "grow": grow,
            "mesh": self.mesh,
            "journal": Journal(self.folder / "journal.jsonl"),
            "checkpoints": CheckpointStore(self.folder / "checkpoints", config.training.checkpoint_keep),
            "shelf": shelf,
            "reporter": RunReporter(
                run="run-1",
                arm=arm,
                folder=self.folder,
                epochs=config.training.epochs,
                mesh=self.mesh,
                progress=ProgressWriter(self.progress),
            ),
            "telemetry": setup("training", config.telemetry, None, "run-1"),
            "interrupt": self.interrupt,
            "device": torch.device("cpu"),
        }
        return TolariaTrainer(**{**arguments, **changes})


def weights(trainer: TolariaTrainer) -> dict[str, torch.Tensor]:
    """A copy of the network's state."""
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

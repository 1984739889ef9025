"""What a graft may touch, what every arm sees, kernels for another place, and training that dies calmly.

Whole runs of the trainer; kernels are real, the mesh is scripted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from services.blueprints.spec import Interface
from services.kasmina.lifecycle import SeedState
from services.tolaria import controls
from services.tolaria.export import changes
from services.tolaria.governor import Instability
from services.tolaria.journal import Journal
from services.tolaria.ports import KernelRequest, KernelTarget, OfflineMesh
from services.tolaria.trainer import TolariaTrainer
from tests.integration.trainer_harness import (
    BRANCH,
    WIDEN,
    Harness,
    Policy,
    config_of,
    grow_once,
    same,
    weights,
)

pytestmark = pytest.mark.parallel

#: Keeps whatever was measured, so that what is tested does not depend on luck with 40 images.
KEEP = {"threshold": -100.0, "min_epochs": 1}
ONCE = grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv1", WIDEN, 3))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")


def before_each_step(trainer: TolariaTrainer, look: Callable[[], None]) -> None:
    """Call ``look`` before every step that is made."""
    make = trainer.train_step

    def looking() -> None:
        look()
        make()

    trainer.train_step = looking  # type: ignore[method-assign]  # a look between two steps


# ---- the moment of a graft ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Held:
    """What training keeps for one parameter: itself, its gradient, its optimizer state by name; copies."""

    value: Tensor
    gradient: Tensor | None
    state: dict[str, Tensor]


def held(trainer: TolariaTrainer) -> dict[nn.Parameter, Held]:
    """Of every parameter there is now."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in trainer.optimizer.state().items():
        owner, _, name = key.rpartition("/")
        states.setdefault(owner, {})[name] = tensor.clone()
    return {
        parameter: Held(
            parameter.detach().clone(),
            None if parameter.grad is None else parameter.grad.clone(),
            states.get(f"{group.name}/{index}", {}),
        )
        for group in trainer.engine.parameter_groups()
        for index, parameter in enumerate(group.parameters)
    }


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(grow_once(("groups.0.conv1", WIDEN, 2)), id="widening"),
        pytest.param(grow_once(("span:groups.2", BRANCH, 2)), id="branch"),
    ],
)
def test_a_graft_leaves_every_tensor_that_was_there_alone(tmp_path: Path, policy: Policy, rule: str) -> None:
    """Weights, gradients, optimizer state and statistics: the same objects with the same bits, in the plan or not."""
    config = config_of(
        model={"widths": [3, 3, 3]},
        training={"epochs": 3, "optimizer": {"name": rule, "learning_rate": 0.01}},
        growth={"evaluation": KEEP},
    )
    trainer = Harness(tmp_path, config, policy).trainer()
    load = trainer.engine.load
    kept: list[tuple[int, dict[nn.Parameter, Held], dict[int, Tensor]]] = []
    compared: list[int] = []

    def keeping(*arguments: Any, **named: Any) -> Any:
        statistics = {id(buffer): buffer.clone() for buffer in trainer.model.buffers()}
        kept.append((trainer.step, held(trainer), statistics))
        return load(*arguments, **named)

    def comparing() -> None:
        # Between the graft and the next step the optimizer has followed the network.
        if not kept or compared:
            return
        step, before, statistics = kept[0]
        after = held(trainer)
        assert step == trainer.step
        assert len(after) > len(before) > 0, "it was grafted"
        for parameter, was in before.items():
            now = after[parameter]
            assert torch.equal(now.value, was.value)
            assert (now.gradient is None) == (was.gradient is None)
            if was.gradient is not None:
                assert now.gradient is not None
                assert torch.equal(now.gradient, was.gradient)
            assert now.state.keys() == was.state.keys()
            assert all(torch.equal(now.state[name], value) for name, value in was.state.items())
        assert any(was.gradient is not None for was in before.values()), "there were gradients to disturb"
        assert {len(was.state) for was in before.values() if was.gradient is not None} == {1 if rule == "sgd" else 3}
        there = {id(buffer): buffer for buffer in trainer.model.buffers()}
        assert statistics
        assert all(torch.equal(there[key], value) for key, value in statistics.items())
        compared.append(step)

    trainer.engine.load = keeping  # type: ignore[method-assign]  # a look at the graft
    before_each_step(trainer, comparing)
    trainer.train()
    assert compared


# ---- what every arm sees -----------------------------------------------------------------------------------------


def watch_batches(trainer: TolariaTrainer) -> list[str]:
    """A digest of each batch that is trained on, images and labels, in their order."""
    seen: list[str] = []
    step = trainer.objective.step

    def watching(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        digest = hashlib.sha256(inputs.numpy().tobytes())
        digest.update(targets.numpy().tobytes())
        seen.append(digest.hexdigest())
        return step(model, inputs, targets)

    trainer.objective.step = watching  # type: ignore[method-assign]  # what the network is really given
    return seen


def test_all_arms_train_on_the_same_batches(tmp_path: Path) -> None:
    """Grown, its three controls, a run that looks at its layers and decides nothing, and one without growth."""
    config = config_of(data={"flip": True, "translate": 1}, growth={"evaluation": KEEP})
    harness = Harness(tmp_path, config, ONCE)
    grown = harness.trainer()
    batches = {"grown": watch_batches(grown)}
    grown.train()
    assert [record.outcome for record in grown.engine.seeds()] == [SeedState.FOSSILIZED] * 2
    arms: dict[str, tuple[Harness, dict[str, Any]]] = {
        "deciding nothing": (Harness(tmp_path / "nothing", config), {}),
        "off": (Harness(tmp_path / "off", config), {"grow": False, "mesh": OfflineMesh()}),
        "uniform": (Harness(tmp_path / "uniform", config, grow_once(("groups.0.conv2", WIDEN, 1))), {"arm": "uniform"}),
    }
    table = changes(grown.engine)
    for name in ("host", "bigger"):
        control = Harness(tmp_path / name, config)
        build = controls.builder(name, control.build_host, table, config.run.seed)
        arms[name] = control, {
            "arm": name, "grow": False, "mesh": OfflineMesh(), "build_host": build, "checkpoints": None,
            "journal": Journal(tmp_path / f"{name}.jsonl"),
        }  # fmt: skip
    measured: dict[str, float] = {}
    for name, (arm, arguments) in arms.items():
        trainer = arm.trainer(**arguments)
        batches[name] = watch_batches(trainer)
        trainer.train()
        measured[name] = trainer.account.health_flops
    assert len(batches["grown"]) == len(set(batches["grown"])) == grown.total_steps
    assert all(seen == batches["grown"] for seen in batches.values()), "the arms are paired"
    assert measured["deciding nothing"] > 0, "health was sampled"
    assert measured["off"] == 0


# ---- kernels that do not fit -------------------------------------------------------------------------------------


def test_a_kernel_for_another_place_is_refused_alone_and_leaves_no_trace(tmp_path: Path) -> None:
    """Signed and whole, but made for another interface: its seed ends with the reason, the rest of its plan grows."""
    plan = grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv2", WIDEN, 3))
    alone = grow_once(("groups.0.conv1", WIDEN, 2))
    config = config_of(model={"widths": [2, 3]}, growth={"evaluation": KEEP, "wait_for_kernel": True})
    harness = Harness(tmp_path / "both", config, plan)
    trainer = harness.trainer()
    obtain = harness.scripted.obtain_kernel
    wanted: list[Interface] = []

    def elsewhere(target: KernelTarget) -> KernelRequest:
        wanted.append(target.interface)
        return obtain(dataclasses.replace(target, interface=wanted[0]))

    harness.scripted.obtain_kernel = elsewhere  # type: ignore[method-assign]  # a compiler that mixes up two jobs
    trainer.train()
    good, bad = trainer.engine.seeds()
    assert (good.outcome, bad.outcome) == (SeedState.FOSSILIZED, SeedState.CULLED)
    assert "interface" in trainer.coordinator.reason(bad)
    expected = Harness(tmp_path / "one", config, alone).trainer()
    expected.train()
    assert same(weights(trainer), weights(expected))


# ---- training that dies without a bang ---------------------------------------------------------------------------

#: 900 images in 22 steps an epoch, 100 to validate on.
LONGER = {"data": {"limit": 1000}, "model": {"name": "mlp", "widths": [16, 16]}, "training": {"epochs": 14}}
#: Where it begins: the end of the fourth epoch.
AT = 88


def rollbacks(folder: Path) -> list[dict[str, Any]]:
    """What the run's story says of its rollbacks."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["kind"] == "rollback"]


def hear_losses(trainer: TolariaTrainer) -> list[float]:
    """The loss of every step, as the governor is told it."""
    losses: list[float] = []
    observe = trainer.governor.observe_loss

    def hearing(loss: float) -> Instability | None:
        losses.append(loss)
        return observe(loss)

    trainer.governor.observe_loss = hearing  # type: ignore[method-assign]  # hears what it is told
    return losses


def test_a_loss_that_creeps_up_to_that_of_guessing_is_rolled_back_and_told(tmp_path: Path) -> None:
    """All weights fade, a little at every step: no spike, no NaN, and in the end a network that says one class."""
    harness = Harness(tmp_path, config_of(**LONGER))
    trainer = harness.trainer()
    losses = hear_losses(trainer)

    def fading() -> None:
        if trainer.step >= AT and trainer.governor.rollbacks == 0:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(0.87)

    before_each_step(trainer, fading)
    result = trainer.train()
    (told,) = rollbacks(tmp_path)
    assert "which is chance" in told["reason"]
    assert told["from_step"] % trainer.batches.per_epoch == 0, "validation found it, no loss was alarming"
    faded = losses[AT : told["from_step"]]
    guessing = math.log(10)
    assert statistics.fmean(losses[AT - 20 : AT]) < 0.7 * guessing
    assert abs(faded[-1] - guessing) < 0.1
    assert max(faded) < 1.1 * guessing, "it crept and stayed: it never exploded"
    assert any(topic == "system.events.rollback" for topic, _ in harness.scripted.events)
    assert trainer.governor.rollbacks == 1
    assert result.test_accuracy > 40, "it went on from the last good state"


def test_a_loss_that_rises_for_a_while_is_no_divergence(tmp_path: Path) -> None:
    """Labels that are partly wrong for some steps: worse for as long as it lasts, and nothing to go back for."""
    trainer = Harness(tmp_path, config_of(**LONGER)).trainer()
    losses = hear_losses(trainer)
    step = trainer.objective.step

    def disturbed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if AT <= trainer.step < AT + 15:
            targets = torch.where(torch.arange(len(targets)) % 10 == 0, (targets + 1) % 10, targets)
        return step(model, inputs, targets)

    trainer.objective.step = disturbed  # type: ignore[method-assign]  # a bad stretch of data
    result = trainer.train()
    before, during = statistics.fmean(losses[AT - 15 : AT]), statistics.fmean(losses[AT : AT + 15])
    assert during > 1.2 * before, "the loss did rise"
    assert statistics.fmean(losses[-15:]) < before
    assert rollbacks(tmp_path) == []
    assert len(losses) == trainer.total_steps
    assert result.test_accuracy > 40

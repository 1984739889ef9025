"""Runs with averaged weights, in bfloat16 and under AdamW: grown, killed and resumed like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from services.kasmina.lifecycle import SeedState
from services.kasmina.model import ParameterGroup, Replacement
from services.tolaria.averaging import WeightAverage
from services.tolaria.export import export
from services.tolaria.trainer import TolariaTrainer
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, config_of, grow_once, same, weights

pytestmark = pytest.mark.parallel

BOTH = grow_once(("groups.0.conv1", WIDEN, 2), ("span:groups.2", BRANCH, 2))
GROWTH = {
    "evaluation": {"threshold": -100.0, "min_epochs": 1},
    "isolation_steps": 5,
    "blend_steps": 5,
    "stabilization_steps": 2,
    "fine_tuning_steps": 5,
}


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")


def whole_and_killed(folder: Path, step: int, training: dict[str, Any]) -> tuple[TolariaTrainer, TolariaTrainer]:
    """A run, and its twin that died without a word at ``step`` and went on."""
    found = []
    for name in ("whole", "killed"):
        harness = Harness(folder / name, config_of(training=training, growth=GROWTH, model={"widths": [2, 3, 3]}), BOTH)
        trainer = harness.trainer()
        if name == "killed":
            make = trainer.train_step

            def dying(trainer: TolariaTrainer = trainer, make: Any = make) -> None:
                if trainer.step == step:
                    raise KeyboardInterrupt
                make()

            trainer.train_step = dying  # type: ignore[method-assign]  # kill -9
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.journal.close()
            trainer = harness.trainer()
            trainer.resume()
        trainer.train()
        found.append(trainer)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("step", "training"),
    [
        (22, {"precision": "bfloat16"}),
        (31, {"optimizer": {"name": "adamw", "learning_rate": 0.03}}),
        (22, {"ema_decay": 0.95}),
        (33, {"ema_decay": 0.95, "precision": "bfloat16", "optimizer": {"name": "adamw", "learning_rate": 0.03}}),
    ],
)
def test_killed_and_resumed_equals_its_twin(tmp_path: Path, step: int, training: dict[str, Any]) -> None:
    whole, resumed = whole_and_killed(tmp_path, step, training)
    assert [record.outcome for record in whole.engine.seeds()] == [SeedState.FOSSILIZED] * 2
    assert same(weights(whole), weights(resumed))
    assert whole.test is not None
    assert resumed.test is not None
    assert torch.equal(whole.test.scores, resumed.test.scores)
    assert whole.test.accuracy > 20, "it did not learn: 10 % is chance"


@pytest.mark.parametrize(("precision", "expected"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_the_precision_is_that_of_the_computation_not_of_the_weights(
    tmp_path: Path, precision: str, expected: torch.dtype
) -> None:
    trainer = Harness(tmp_path, config_of(training={"precision": precision})).trainer(grow=False)
    seen: list[torch.dtype] = []
    layer = trainer.model.get_submodule("groups.0.conv1")
    layer.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs.dtype))
    trainer.train_step()
    assert seen == [expected]
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_the_average_is_evaluated_and_exported_but_not_trained_on(tmp_path: Path) -> None:
    plain = Harness(tmp_path / "plain", config_of(growth=GROWTH, model={"widths": [2, 3, 3]}), BOTH).trainer()
    plain.train()
    harness = Harness(
        tmp_path / "average", config_of(training={"ema_decay": 0.9}, growth=GROWTH, model={"widths": [2, 3, 3]}), BOTH
    )
    trainer = harness.trainer()
    finish, trained = trainer._finish, {}

    def finishing(started: float) -> Any:
        trained.update(weights(trainer))
        return finish(started)

    trainer._finish = finishing  # type: ignore[method-assign]  # what it was trained to, before the average is installed
    trainer.train()
    assert same(trained, weights(plain)), "averaging changed the training"
    assert not same(weights(trainer), weights(plain))
    export(trainer.engine, tmp_path / "export", harness.config.model, harness.data)
    exported = safetensors.torch.load_file(tmp_path / "export" / "weights.safetensors")
    assert torch.equal(exported["groups.0.conv1.weight"], trainer.model.state_dict()["groups.0.conv1.weight"])


def group(name: str, birth: int, *parameters: torch.nn.Parameter) -> ParameterGroup:
    return ParameterGroup(name, birth, parameters)


def test_an_average_follows_by_its_definition_through_growth_and_fusion() -> None:
    host = torch.nn.Parameter(torch.zeros(2))
    average = WeightAverage(0.5)
    average.sync([group("host", 0, host)])
    expected = torch.zeros(2)
    for step in (1, 2, 3):
        host.data += 1.0
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * host.data
    assert torch.allclose(average.state()["host/0"], expected)

    newborn = torch.nn.Parameter(torch.full((1,), 9.0))
    average.sync([group("host", 0, host), group("seed-1", 3, newborn)])
    assert average.state()["seed-1/0"].item() == 9.0, "a newborn's average begins with its weight"
    newborn.data += 1.0
    average.update(4)
    young = average.state()["seed-1/0"].clone()
    assert young.item() == pytest.approx(9.0 + (1 - 2 / 11)), "at age 1 whatever the age of the host"

    old = average.state()["host/0"].clone()
    fused = torch.nn.Parameter(torch.cat([host.data, newborn.data]))
    part = Replacement(fused, ((host, (slice(0, 2),)), (newborn, (slice(2, 3),))))
    average.sync([group("host", 0, fused)], [part])
    assert torch.equal(average.state()["host/0"], torch.cat([old, young]))
    live = fused.data.clone()
    with average.applied():
        assert torch.equal(fused.data, torch.cat([old, young]))
    assert torch.equal(fused.data, live)

    unseen = torch.nn.Parameter(torch.full((1,), 5.0))
    whole = torch.nn.Parameter(torch.cat([fused.data, unseen.data]))
    parts = Replacement(whole, ((fused, (slice(0, 3),)), (unseen, (slice(3, 4),))))
    average.sync([group("host", 0, whole)], [parts])
    assert torch.equal(average.state()["host/0"], torch.cat([old, young, unseen.data])), "born and fused at once"

    average.sync([group("host", 0, host)])  # culled: what is gone is forgotten
    assert list(average.state()) == ["host/0"]
    other = WeightAverage(0.5)
    other.sync([group("host", 0, host)])
    other.load_state(average.state())
    assert torch.equal(other.state()["host/0"], average.state()["host/0"])

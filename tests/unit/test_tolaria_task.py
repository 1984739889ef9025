"""A user's own loss and score: what is asked of it, what is refused, and runs that are trained by it."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from services.chassis.config.schema import EsperConfig, TaskConfig
from services.kasmina.lifecycle import SeedState
from services.tolaria import task
from services.tolaria.data import splits
from services.tolaria.errors import FactoryError
from services.tolaria.task import UserTask
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, config_of, grow_once, same, weights

MINE = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

rng = np.random.default_rng(0)
inputs = rng.normal(size=(500, 6)).astype("float32")


def regression_data(data_dir):
    targets = np.tanh(inputs @ rng.normal(size=(6, 2))).astype("float32")
    return inputs[:400], targets[:400], inputs[400:], targets[400:]


def label_data(data_dir):
    targets = (inputs @ rng.normal(size=(6, 3)) > 0).astype("float32")
    return inputs[:400], targets[:400], inputs[400:], targets[400:]


def network(input_shape, outputs):
    return nn.Sequential(nn.Linear(input_shape[0], 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, outputs))


class Regression:
    outputs = 2
    chance = 0.0

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets)

    def score(self, outputs, targets):
        return torch.exp(-(outputs - targets).square().mean(dim=1))


class Labels:
    outputs = 3
    chance = 0.5

    def loss(self, outputs, targets):
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def score(self, outputs, targets):
        return ((outputs > 0) == (targets > 0.5)).float().mean(dim=1)

    def step(self, model, inputs, targets):
        penalty = sum(parameter.square().sum() for parameter in model.parameters())
        return self.loss(model(inputs), targets) + 1e-4 * penalty


class Digits:
    outputs = 10
    chance = 0.1

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)

    def score(self, outputs, targets):
        return outputs.argmax(dim=1) == targets
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_task.py").write_text(textwrap.dedent(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_task", raising=False)
    return "my_own_task"


def own_run(mine: str, data: str, kind: str) -> EsperConfig:
    return config_of(
        data={"name": "factory", "factory": f"{mine}:{data}", "limit": None},
        model={"name": "factory", "factory": f"{mine}:network"},
        task={"factory": f"{mine}:{kind}"},
        growth={"isolation_steps": 5, "blend_steps": 5, "stabilization_steps": 2, "fine_tuning_steps": 5},
    )


@pytest.mark.parametrize(
    ("data", "kind", "better_than"), [("regression_data", "Regression", 60), ("label_data", "Labels", 65)]
)
def test_a_network_grows_for_a_users_own_task(
    tmp_path: Path, mine: str, data: str, kind: str, better_than: float
) -> None:
    config = own_run(mine, data, kind)
    harness = Harness(tmp_path, config, grow_once(("0", WIDEN, 2), ("2", BRANCH, 2)))
    harness.data.check_task(harness.build_host(), 40)
    trainer = harness.trainer()
    result = trainer.train()
    assert better_than < result.test_accuracy <= 100
    ended = {record.family: record for record in trainer.engine.seeds()}
    # The branch learned alone by the task's own loss; all were judged by the task's score.
    assert all(record.contribution is not None for record in ended.values()), ended
    assert {record.outcome for record in ended.values()} <= {SeedState.FOSSILIZED, SeedState.CULLED}
    outputs = trainer.model(harness.data.normalization(harness.data.training.images[:3]))
    assert outputs.shape == (3, harness.data.classes)


def test_cross_entropy_as_a_task_is_the_default_bit_for_bit(tmp_path: Path, mine: str) -> None:
    found = []
    for name, factory in (("default", None), ("own", f"{mine}:Digits")):
        harness = Harness(
            tmp_path / name,
            config_of(task={"factory": factory}, training={"epochs": 3}, growth={"window": [0.1, 0.9]}),
            grow_once(("groups.0.conv1", WIDEN, 1)),
        )
        trainer = harness.trainer()
        result = trainer.train()
        assert [record.outcome for record in trainer.engine.seeds()] != [], "nothing was grafted: this compares little"
        found.append((weights(trainer), result.test_accuracy, result.validation_accuracy))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


class Good:
    outputs: Any = 3
    chance: Any = 0.2

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return (outputs - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> Any:
        return torch.ones(len(targets))


class NoOutputs(Good):
    outputs = 0


class Truth(Good):
    outputs = True


class SureGuess(Good):
    chance = 1.0


class NoChance(Good):
    chance = None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (object(), r"a object without loss\(outputs, targets\)"),
        (NoOutputs(), "outputs must be a whole number from 1, what the network puts out, not 0"),
        (Truth(), "outputs must be a whole number from 1, what the network puts out, not True"),
        (SureGuess(), r"chance must be the score of guessing, 0 <= chance < 1, not 1\.0"),
        (NoChance(), "chance must be the score of guessing, 0 <= chance < 1, not None"),
    ],
)
def test_what_is_no_task_is_refused(made: object, message: str) -> None:
    with pytest.raises(FactoryError, match=rf"task\.factory m:f: {message}"):
        UserTask("m:f", made)


class Vector(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return (outputs - targets).square()


class Number(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return 1.0


class NotANumber(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return outputs.sum() * float("nan")


class Detached(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return outputs.detach().sum()


class Elsewhere(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return (outputs * 0).sum()


class RootOfNothing(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return (outputs - outputs).abs().sum().sqrt()


class Fails(Good):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        raise KeyError("nothing")


class Total(Good):
    def score(self, outputs: Tensor, targets: Tensor) -> Any:
        return torch.ones(())


class Percent(Good):
    def score(self, outputs: Tensor, targets: Tensor) -> Any:
        return torch.full((len(targets),), 70.0)


class NoScore(Good):
    def score(self, outputs: Tensor, targets: Tensor) -> Any:
        return torch.full((len(targets),), float("nan"))


class Plain(Good):
    def score(self, outputs: Tensor, targets: Tensor) -> Any:
        return 0.5


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Vector(), r"the loss of a batch is of shape \(4, 3\), not one number"),
        (Number(), "the loss of a batch is a float, not one number"),
        (NotANumber(), "the loss of the first batch is nan"),
        (Detached(), "the loss has no gradient"),
        (Elsewhere(), "the loss does not depend on the network"),
        (RootOfNothing(), "the gradient of the first batch is not finite"),
        (Fails(), "step failed: KeyError: 'nothing'"),
        (Total(), r"score returned of shape \(\), not one number per sample, \(4,\)"),
        (Plain(), r"score returned a float, not one number per sample, \(4,\)"),
        (Percent(), "a score of 70: scores lie between 0"),
        (NoScore(), "a score of nan: scores lie between 0"),
    ],
)
def test_a_task_that_answers_nonsense_is_refused_before_training(made: object, message: str) -> None:
    with pytest.raises(FactoryError, match=rf"task\.factory m:f: {message}"):
        UserTask("m:f", made).check(nn.Linear(2, 3), torch.ones(4, 2), torch.zeros(4, 3))


def test_a_task_is_tried_on_the_first_images_as_the_network_will_see_them(mine: str) -> None:
    config = own_run(mine, "regression_data", "Regression")
    data = splits.load(config.data, 1, task.load(config.task))
    seen: list[Tensor] = []

    class Watching(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return super().forward(inputs)

    data.check_task(Watching(6, 2), 40)
    assert torch.equal(seen[0], data.normalization(data.training.images[:40]))


def test_a_good_task_passes_and_draws_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
    before = torch.get_rng_state()
    UserTask("m:f", Good()).check(model, torch.ones(4, 2), torch.zeros(4, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_the_factory_is_named_in_errors(mine: str) -> None:
    with pytest.raises(FactoryError, match=r"task\.factory: my_own_task has no callable 'nothing'"):
        task.load(TaskConfig(factory=f"{mine}:nothing"))
    assert task.load(TaskConfig()) is None


def test_targets_are_of_any_shape_but_as_many_as_images(mine: str, tmp_path: Path) -> None:
    config = own_run(mine, "regression_data", "Regression")
    assert splits.load(config.data, 0, task.load(config.task)).training.labels.shape[1:] == (2,)
    (tmp_path / "my_short_targets.py").write_text(
        "import torch\ndef data(folder): return *(torch.zeros(n, 2) for n in (4, 3, 4, 4)),\n"
    )
    wrong = config.data.model_copy(update={"factory": "my_short_targets:data"})
    with pytest.raises(FactoryError, match=r"training targets must be int64 or float32 \[4, \.\.\.\]"):
        splits.load(wrong, 0, task.load(config.task))


def test_label_smoothing_is_the_default_tasks() -> None:
    with pytest.raises(ValidationError, match="belongs to the default task"):
        config_of(task={"factory": "a:b"}, training={"optimizer": {"label_smoothing": 0.1}})

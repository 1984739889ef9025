"""``train.py --diagnose`` as people and scripts start it: no service, a starved layer found, every way to end."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from services.chassis.config.loader import dump
from services.kasmina.engine import GrowthEngine
from services.tolaria import models
from services.tolaria.data import splits
from services.tolaria.diagnosis import nothing
from tests.infrastructure.documented import differences, documented, fields
from tests.integration.test_main_entrypoint import Ended, running, train
from tests.integration.trainer_harness import config_of

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]

#: Its second convolution is an eighth of what its neighbours are.
_STARVED = """
from torch import nn

def convolution(inputs, width):
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())

class Starved(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.wide, self.narrow, self.after = convolution(channels, 12), convolution(12, 2), convolution(2, 12)
        self.pool, self.last = nn.MaxPool2d(2), convolution(12, 12)
        self.head = nn.Linear(12, classes)

    def forward(self, images):
        return self.head(self.last(self.pool(self.after(self.narrow(self.wide(images))))).amax((2, 3)))

def make(shape, classes):
    return Starved(shape[0], classes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("diagnose")
    (made / "starved.py").write_text(_STARVED, encoding="utf-8")
    return made


def diagnose(folder: Path, *arguments: str, sets: tuple[str, ...] = ()) -> Ended:
    model = ("model.name=factory", "model.factory=starved:make", "training.device=cpu")
    return train(
        *("--quick-start", "digits", "--diagnose", "--output", str(folder / "runs"), *arguments),
        sets=(*model, *sets),
        env={"PYTHONPATH": str(folder)},
    )


@pytest.fixture(scope="module")
def starved(folder: Path) -> Ended:
    return diagnose(folder, "--json", sets=("diagnose.epochs=4",))


def figures(told: dict[str, Any]) -> dict[str, Any]:
    """What does not name the folder."""
    return {key: value for key, value in told.items() if key not in ("run_id", "run_dir", "report")}


def test_the_starved_layer_is_the_tightest_and_gets_more_at_equal_flops(starved: Ended) -> None:
    assert starved.code == 0, starved.err
    told = starved.json
    assert told["status"] == "succeeded"
    assert told["tightest"] == "narrow.0"
    layers = {layer["layer"]: layer for layer in told["layers"]}
    assert list(layers) == ["wide.0", "narrow.0", "after.0", "last.0"]
    narrow = layers["narrow.0"]
    assert (narrow["width"], narrow["judgment"], narrow["samples"]) == (2, "short", 512)
    assert narrow["suggested_width"] > 2
    assert narrow["gradient_norm"] > 0
    assert min(layers.values(), key=lambda layer: layer["suggested_width"] - layer["width"])["layer"] != "narrow.0"
    assert 0.9 < told["flops"]["suggested"] / told["flops"]["present"] <= 1
    assert [item["layer"] for item in told["refused"]] == ["head"]
    assert told["validation_accuracy"] > 50
    assert told["cost"]["training_flops"] > told["cost"]["measuring_flops"] > 0
    assert told.keys() == nothing().keys() | {"status", "reason", "run_id", "run_dir", "report"}


def test_the_guide_documents_every_field(starved: Ended) -> None:
    told = documented("docs/user_guide.md", "field of a diagnosis")
    assert differences(told, fields(starved.json, {})) == (set(), set())


def test_the_folder_holds_the_diagnosis_and_no_service_was_there(starved: Ended) -> None:
    made = Path(starved.json["run_dir"])
    assert json.loads((made / "diagnosis.json").read_text()) == starved.json
    assert "Layer narrow.0 is the tightest" in (made / "report.html").read_text(encoding="utf-8")
    assert "Layer narrow.0 is the tightest" in starved.err
    assert "suggestion that was not tried" in starved.err
    assert {path.name for path in (made / "logs").iterdir()} == {"training.log"}
    assert not (made / "addresses").exists()
    assert {line["arm"] for line in map(json.loads, (made / "metrics.jsonl").read_text().splitlines())} == {"host"}


def test_the_same_seed_gives_the_same_diagnosis_and_quiet_prints_it_alone(folder: Path, starved: Ended) -> None:
    again = diagnose(folder, "--quiet", sets=("diagnose.epochs=4", "run.name=again"))
    assert again.code == 0, again.err
    assert "epoch " not in again.out.replace("epochs", "")
    assert "Layer narrow.0 is the tightest" in again.out
    told = json.loads((folder / "runs" / "again" / "diagnosis.json").read_text())
    assert figures(told) == figures(starved.json)
    refused = train("--resume", "again", "--output", str(folder / "runs"))
    assert (refused.code, "it is a diagnosis, which is not resumed" in refused.err) == (2, True)


def test_a_trained_network_is_measured_at_once(tmp_path: Path) -> None:
    config = config_of(run={"seed": 3})
    data = splits.load(config.data, config.run.seed)
    model = models.build_host(config.model, data, config.run.seed)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    torch.save(model.state_dict(), tmp_path / "host.pt")
    file = tmp_path / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    sets = ("diagnose.epochs=0", f"model.weights={tmp_path / 'host.pt'}")
    done = train("--config", str(file), "--diagnose", "--json", "--output", str(tmp_path), sets=sets)
    assert done.code == 0, done.err
    told = done.json
    assert (told["epochs"], told["cost"]["training_flops"]) == (0, 0.0)
    assert told["layers"][0]["gradient_norm"] is None
    engine = GrowthEngine(
        model, data.normalization(data.training.images[:2]), run="r", settings=config.growth, outputs=10, seed=0
    )
    images = data.normalization(data.training.images[: told["samples"]])
    expected = {slot.slot: slot.effective_rank for slot in engine.measure_health([images]).slots}
    assert {layer["layer"]: layer["effective_rank"] for layer in told["layers"]} == pytest.approx(expected)


@pytest.mark.fast
def test_nothing_trained_and_nothing_to_train_is_2(tmp_path: Path) -> None:
    done = train("--diagnose", "--output", str(tmp_path), sets=("diagnose.epochs=0",))
    assert done.code == 2
    assert "--set: diagnose.epochs: 0 epochs measure what is trained already" in done.err
    assert "set model.weights" in done.err
    done = train("--diagnose", "--resume")
    assert (done.code, "--diagnose: not allowed with argument --resume" in done.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_built_is_1_with_its_reason(folder: Path) -> None:
    done = diagnose(folder, "--json", sets=("model.factory=starved:nothing",))
    assert done.code == 1
    told = done.json
    assert told["status"] == "failed"
    assert "starved" in told["reason"]
    assert f"train.py: the diagnosis failed: {told['reason']}" in done.err
    assert figures(told) == {**nothing(), "status": "failed", "reason": told["reason"]}
    assert "No diagnosis" in Path(told["report"]).read_text(encoding="utf-8")


LONG = ("diagnose.epochs=3000", "training.device=cpu", "model.widths=[2, 3]")


def test_an_interrupt_is_130_and_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with running("--quick-start", "digits", "--diagnose", "--json", "--output", str(tmp_path), sets=LONG) as run:
        run.until("[host] epoch")
        run.signal(signal.SIGINT)
        done = run.end()
    assert done.code == 130
    assert done.json["status"] == "interrupted"
    assert "a diagnosis is not resumed: start it again" in done.err
    assert "checkpoint" not in done.err


def test_a_killed_process_is_1_and_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with running("--quick-start", "digits", "--diagnose", "--json", "--output", str(tmp_path), sets=LONG) as run:
        run.until("[host] epoch")
        made = next(path.parent for path in tmp_path.glob("*/config.yaml") if not path.parent.is_symlink())
        (made / "report.html").mkdir()
        psutil.Process(run.process.pid).children()[0].kill()
        done = run.end()
    assert done.code == 1
    assert done.json["reason"] == "the training process was ended by SIGKILL"
    assert done.json["report"] is None
    assert "no report: " in done.err

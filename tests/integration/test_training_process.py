"""The training process against the real services: whole runs, resumed runs, interrupts, and every way to end badly."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from esper.tolaria.v1 import run_pb2, training_service_pb2
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from services.blueprints import signature
from services.chassis.config.loader import dump
from services.chassis.errors import EsperError
from services.chassis.process import PROGRESS_FD
from services.tolaria import training_process
from services.tolaria.device import choose
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.progress import StatusProgress, SummaryProgress, decode
from services.tolaria.training_process import main, wait_for_services
from tests.integration.live_services import Services, until
from tests.integration.trainer_harness import config_of

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("services")
    config = config_of()
    (folder / "config.yaml").write_text(dump(config))
    signature.generate_keypair(folder / "state" / "keys")
    running = Services(config, folder)
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """``main`` is the program: it takes the signals and the root logger."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def run_folder(services: Services, tmp_path: Path, run: str = "run-1", **sections: Any) -> Path:
    """A run folder as the launcher makes it, that shares the services of this module."""
    folder = tmp_path / run
    folder.mkdir()
    growth = {
        "wait_for_kernel": True,
        "evaluation": {"threshold": -100.0, "min_epochs": 1},
        **sections.pop("growth", {}),
    }
    (folder / "config.yaml").write_text(dump(config_of(growth=growth, **sections)))
    shutil.copytree(services.run_dir / "state" / "keys", folder / "state" / "keys")
    shutil.copytree(services.run_dir / "addresses", folder / "addresses")
    shutil.copy(services.run_dir / "addresses.json", folder)
    return folder


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[Any]]:
    """Run ``main`` here; returns its exit code and what it told its launcher."""
    reader, writer = os.pipe()
    monkeypatch.setenv(PROGRESS_FD, str(writer))
    heard: list[bytes] = []

    def listen() -> None:
        while chunk := os.read(reader, 65536):
            heard.append(chunk)

    listener = threading.Thread(target=listen)
    listener.start()
    code = main(["--run-dir", str(folder), *arguments])
    os.close(writer)
    listener.join()
    os.close(reader)
    return code, [decode(line) for line in b"".join(heard).splitlines()]


def test_a_whole_run_with_its_controls(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(
        services,
        tmp_path,
        compare=["host", "bigger", "uniform"],
        compare_at="flops",
        export={"formats": ["safetensors", "torch_export"]},
    )
    code, told = train(folder, monkeypatch)
    assert code == 0
    summary = told[-1].summary
    assert isinstance(told[-1], SummaryProgress)
    assert summary["status"] == "succeeded"
    assert summary["epochs"] == 6
    assert summary["adaptations"]["started"] > 0
    assert summary["adaptations"]["fossilized"] == summary["adaptations"]["started"]
    assert summary["parameters"]["final"] > summary["parameters"]["host"]
    arms = summary["arms"]
    assert list(arms) == ["grown", "host", "bigger", "uniform"]
    assert all(0 <= summary["accuracy"][arm] <= 100 for arm in arms)
    spent = {name: arm["training_flops"] + arm["growth_flops"] for name, arm in arms.items()}
    for name in ("host", "bigger"):
        step = 3 * arms[name]["flops"] * 40
        assert abs(spent[name] - spent["grown"]) <= step / 2
    assert arms["host"]["steps"] > arms["grown"]["steps"] > arms["bigger"]["steps"]
    # Grown by itself, alike in all layers, to no more than the run's final cost.
    assert arms["uniform"]["steps"] == arms["grown"]["steps"]
    assert arms["host"]["flops"] < arms["uniform"]["flops"] <= arms["grown"]["flops"]
    lines = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    policies = {line["arm"]: line["policy"] for line in lines if line["decision"]}
    assert policies == {"grown": "policies/utilization@1", "uniform": "policies/uniform@1"}
    # The run's own story is not touched.
    assert len(json.loads((folder / "lineage.json").read_text())["seeds"]) == summary["adaptations"]["started"]
    assert (folder / "lineage-uniform.json").exists()
    assert summary["start_accuracy"] is None
    timed = {name: arm["growth_seconds"] is not None for name, arm in arms.items()}
    assert timed == {"grown": True, "host": False, "bigger": False, "uniform": True}
    flops = summary["flops"]
    assert flops["growth"] == flops["health"] + flops["counterfactuals"] > flops["health"] > 0
    assert flops["total"] == flops["training"] + flops["growth"] + flops["validation"]
    assert (flops["culled_seeds"], flops["discarded"]) == (0, 0)
    assert set(summary["comparisons"]) == {"host", "bigger", "uniform"}
    for name, found in summary["comparisons"].items():
        assert found["points"] == pytest.approx(summary["accuracy"]["grown"] - summary["accuracy"][name])
        assert found["low"] < found["points"] < found["high"]
        assert found["samples"] == arms[name]["test_samples"] > 0
    assert all(arm["test_interval"][0] < arm["test_accuracy"] < arm["test_interval"][1] for arm in arms.values())
    assert summary["changes"]
    assert {seed["decision"] for seed in summary["seeds"]} <= {line["decision"] for line in lines}
    assert all(seed["plan_contribution"] for seed in summary["seeds"])
    assert summary["events"]["published"] > 0
    assert summary["events"]["dropped"] == 0
    assert {seed["state"] for seed in summary["seeds"]} == {"FOSSILIZED"}
    assert summary["export"]["folder"] == str(folder / "export")
    assert {name: made["problem"] for name, made in summary["export"]["formats"].items()} == {
        "safetensors": None,
        "torch_export": None,
    }
    assert {"weights.safetensors", "model.pt2"} <= {path.name for path in (folder / "export").iterdir()}
    states = [message.state for message in told if isinstance(message, StatusProgress)]
    assert states == ["starting", "ready", "training", "finishing", "finishing", "comparing", "comparing", "comparing"]
    assert {"config.yaml", "journal.jsonl", "metrics.jsonl", "decisions.jsonl", "lineage.json"} <= {
        entry.name for entry in folder.iterdir()
    }

    # Dead while the last control trained: what is finished is not trained, and its test set not touched, again.
    arms = json.loads((folder / "arms.json").read_text())
    del arms["bigger"]
    (folder / "arms.json").write_text(json.dumps(arms))
    code, again = train(folder, monkeypatch, "--resume")
    assert code == 0
    assert again[-1].summary["accuracy"] == summary["accuracy"]
    assert again[-1].summary["export"] == summary["export"]
    assert again[-1].summary["seeds"] == summary["seeds"]
    assert again[-1].summary["comparisons"] == summary["comparisons"]
    assert {message.arm for message in again if message.kind == "epoch"} == {"bigger"}


def test_where_no_layer_may_be_widened_branches_grow(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"isolation_steps": 5, "blend_steps": 5, "stabilization_steps": 2, "fine_tuning_steps": 2}
    growth = {"slots": ["span:groups.1"], **stages}
    # A name of its own: Tamiyo keeps the answers it gave to a run's requests.
    folder = run_folder(services, tmp_path, "run-of-branches", model={"widths": [3, 3]}, growth=growth)
    code, told = train(folder, monkeypatch)
    assert code == 0
    summary = told[-1].summary
    assert {seed["family"] for seed in summary["seeds"]} == {"residual_bottleneck"}
    assert {seed["slot"] for seed in summary["seeds"]} == {"span:groups.1"}
    (decision, *_) = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    (evidence,) = decision["evidence"]
    assert evidence["chosen"]
    assert 0 < evidence["need"] <= 1
    assert "what enters this span uses" in evidence["reason"]


def test_a_trained_host_is_extended(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    first = run_folder(services, tmp_path / "first", growth={"enabled": False})
    code, told = train(first, monkeypatch)
    assert code == 0
    weights = first / "export" / "weights.safetensors"
    trained = told[-1].summary["arms"]["grown"]

    folder = run_folder(
        services,
        tmp_path,
        model={"weights": str(weights)},
        growth={"window": [0.0, 0.2], "decisions": 1, "wait_for_kernel": False},
        compare=["host", "bigger", "uniform"],
    )
    code, told = train(folder, monkeypatch)
    assert code == 0
    summary = told[-1].summary
    # It begins as what was trained, and grows before the first step.
    assert summary["start_accuracy"] == pytest.approx(trained["validation_accuracy"])
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["epoch"], line["step"]) for line in decisions] == [("grown", 0, 0), ("uniform", 0, 0)]
    assert summary["adaptations"]["started"] > 0
    lineage = json.loads((folder / "lineage.json").read_text())
    assert {seed["birth_step"] for seed in lineage["seeds"]} == {0}
    # The host goes on from the same weights, its final shape starts anew.
    starts = {name: arm["start_accuracy"] for name, arm in summary["arms"].items()}
    assert starts["host"] == starts["uniform"] == starts["grown"] == summary["start_accuracy"]
    assert starts["bigger"] is None


def test_interrupted_and_resumed_as_a_process(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(services, tmp_path, training={"epochs": 400})
    command = [sys.executable, "-m", "services.tolaria.training_process", "--run-dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT)
    until((folder / "metrics.jsonl").exists, "the first epoch is over")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert any((folder / "checkpoints").iterdir())
    config = (folder / "config.yaml").read_text().replace("epochs: 400", "epochs: 401")
    (folder / "config.yaml").write_text(config)
    process = subprocess.Popen([*command, "--resume"], cwd=ROOT)
    lines = len((folder / "metrics.jsonl").read_text().splitlines())
    until(lambda: len((folder / "metrics.jsonl").read_text().splitlines()) > lines + 1, "it goes on")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_a_caller_stops_the_run(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(services, tmp_path, training={"epochs": 2000})

    def stop() -> None:
        with grpc.insecure_channel(services.address("tolaria")) as channel:
            stub = TrainingServiceStub(channel)
            name = "runs/run-1"

            def training() -> bool:
                try:
                    run = stub.GetRun(training_service_pb2.GetRunRequest(name=name)).run
                except grpc.RpcError:
                    return False
                return bool(run.state == run_pb2.RUN_STATE_TRAINING and run.step > 20 and run.attached)

            until(training, "it trains")
            stub.StopRun(training_service_pb2.StopRunRequest(name=name, request_id="stop", reason="enough"), timeout=20)

    caller = threading.Thread(target=stop)
    caller.start()
    code, told = train(folder, monkeypatch)
    caller.join()
    assert code == 0
    summary = told[-1].summary
    assert (summary["status"], summary["reason"]) == ("stopped", "enough")
    assert summary["accuracy"] == {"grown": None, "host": None, "bigger": None, "uniform": None}
    assert set(summary["flops"].values()) == {None}
    assert (summary["comparisons"], summary["changes"]) == ({}, [])


def test_missing_data_ends_with_one_line(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"name": "cifar10", "data_dir": str(tmp_path / "nothing")}
    code, told = train(run_folder(services, tmp_path, data=data), monkeypatch)
    assert code == 1
    assert told[-1].state == "failed"
    assert "python -m services.tolaria.data.download cifar10" in told[-1].message
    assert told[-1].detail == {"reason": "DATA_INVALID"}


def test_a_bug_in_a_users_network_is_told_in_one_line(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fails_late.py").write_text(
        "import torch\n"
        "class Late(torch.nn.Linear):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Late.calls += self.training\n"
        "        if Late.calls > 12: raise RuntimeError('the thirteenth')\n"
        "        return super().forward(x.flatten(1))\n"
        "def make(shape, classes): return Late(64, classes)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run_folder(services, tmp_path, model={"name": "factory", "factory": "fails_late:make"})
    code, told = train(folder, monkeypatch)
    assert code == 1
    assert told[-1].message == "RuntimeError: the thirteenth"


def test_an_export_that_cannot_be_written_costs_the_export_only(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ["safetensors", "torch_export"]
    folder = run_folder(services, tmp_path, growth={"enabled": False}, export={"formats": formats})
    (folder / "export").write_text("in the way")
    code, told = train(folder, monkeypatch)
    assert code == 0
    problems = {name: made["problem"] for name, made in told[-1].summary["export"]["formats"].items()}
    assert problems == {
        "safetensors": f"the export to {folder / 'export'} was not written: File exists",
        "torch_export": "torch_export is made of the safetensors export, which there is not",
    }
    assert told[-1].summary["adaptations"] == {"started": 0, "fossilized": 0, "culled": 0}
    lines = [message.message for message in told if isinstance(message, StatusProgress)]
    assert [line for line in lines if "export" in line] == [
        f"no export as {name}: {problems[name]}" for name in formats
    ]


def test_services_that_never_come_are_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(EsperError, match=r"not there after 0\.1 s"):
        wait_for_services(tmp_path, 0.1, Interrupt())
    interrupt = Interrupt()
    interrupt.request("interrupted by SIGTERM")
    with pytest.raises(TrainingInterruptedError):
        wait_for_services(tmp_path, 10.0, interrupt)


def test_the_device_is_chosen_and_deterministic() -> None:
    chosen = choose(config_of(training={"device": "auto"}).training)
    assert chosen.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # made at import
    assert training_process.EXIT_FAILED == 1

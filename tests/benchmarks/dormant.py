"""What Esper costs while nothing grows: ``python -m tests.benchmarks.dormant --out FILE [--data-dir DIR]``.

``bit_identical``: `train.py --no-growth`, all services running, against a plain PyTorch loop in a process of its own
that imports nothing of ours (``bare.py``), from the same first weights over the same batches: are the last weights
equal to the last bit?

``overhead_percent``: three processes train the same network, the bare loop, a run with the controller off, and a run
that is sampled, traced and served while Tamiyo decides "nothing" after every tenth epoch
(``overhead_percent_deciding``). Only one of them runs at a time (SIGSTOP, SIGCONT), by turns of whole epochs, so that
each turn of each is the same work; the clock is the CPU time of the whole process, all threads, validation and the
ends of epochs included. Medians over rounds of the paired ratio, 95 % bootstrap intervals over rounds. The CPU time of
the services is beside it. Limit: 0.5 %.

The stated case is ``case``: the host of configs/cifar10.yaml where --data-dir (or ESPER__DATA__DATA_DIR) names the
files of CIFAR-10, else the digits. The digits are measured in any case and are the hard one (``digits``): steps of
5 ms, and an epoch of 29 of them, which share what an epoch's end costs (events, metrics, the last good state).
Augmentation is off: it is a user's choice, and no part of growing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from safetensors.torch import load_file, save_file

from services.chassis.config.loader import load_config
from services.chassis.config.schema import EsperConfig
from services.tolaria import models
from services.tolaria.data import splits
from services.tolaria.seeds import derive
from services.tolaria.step_times import STEP_TIMES_FILE
from tests.benchmarks import measure
from tests.infrastructure.processes import ROOT
from tests.infrastructure.runs import SERVICES, Run, json_lines, running

LIMIT_PERCENT: Final = 0.5
_SAME: Final = ("data.translate=0", "data.flip=false", "training.device=cpu")
_OFF: Final = ("growth.enabled=false",)
#: A budget that nothing fits into: Tamiyo is asked, and decides nothing.
_DECIDING: Final = (
    "growth.budget.flops=1.000001",
    "growth.window=[0.0,1.0]",
    "growth.decisions=100000",
    "growth.health_every_epochs=10",
)
_LOOK_SECONDS: Final = 0.001


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained; ``turn_epochs`` make a turn of about a second or more, ``orders`` fit into the memory."""

    config: str
    overrides: tuple[str, ...]
    turn_epochs: int
    orders: int

    def load(self) -> EsperConfig:
        """As the runs see it."""
        return load_config(ROOT / self.config, overrides=self.overrides, environ={}).config


DIGITS: Final = Case("configs/quickstart.yaml", (*_SAME, "model.widths=[16,24,32]"), 6, 50)


def cifar10(data_dir: Path) -> Case:
    """The host of configs/cifar10.yaml."""
    return Case("configs/cifar10.yaml", (*_SAME, f"data.data_dir={data_dir}"), 1, 10)


def prepare(folder: Path, config: EsperConfig, epochs: int, orders: int) -> None:
    """Write what the bare loop reads: the same data, first weights and orders that a run of ``config`` has."""
    data = splits.load(config.data, config.run.seed)
    host = models.build_host(config.model, data, config.run.seed)
    optimizer = config.training.optimizer
    tensors = {
        "images": data.training.images,
        "labels": data.training.labels,
        "validation_images": data.validation.images,
        "validation_labels": data.validation.labels,
        "mean": data.normalization.mean,
        "deviation": data.normalization.deviation,
        **{f"model/{name}": tensor for name, tensor in host.state_dict().items()},
    }
    for epoch in range(orders):
        generator = torch.Generator().manual_seed(derive(config.run.seed, "order", epoch))
        tensors[f"order/{epoch}"] = torch.randperm(len(data.training), generator=generator)
    settings = {
        "classes": data.classes,
        "widths": list(config.model.widths),
        "epochs": epochs,
        "orders": orders,
        "batch_size": config.data.batch_size,
        "steps_per_epoch": len(data.training) // config.data.batch_size,
        "evaluation_batch_size": config.data.evaluation_batch_size,
        "learning_rate": optimizer.learning_rate,
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "warmup_ratio": optimizer.warmup_ratio,
        "label_smoothing": optimizer.label_smoothing,
    }
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "inputs.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings))


def _bare(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # -P: this folder has a numbers.py, which would stand in for Python's own.
    command = [sys.executable, "-P", str(Path(__file__).with_name("bare.py")), str(folder)]
    return subprocess.Popen(command, env=environment)


def bit_identical(folder: Path, case: Case, epochs: int) -> dict[str, Any]:
    """Compare the last weights."""
    prepare(folder / "bare", case.load(), epochs, epochs)
    bare = _bare(folder / "bare")
    try:
        with running(
            folder / "run", *case.overrides, *_OFF, f"training.epochs={epochs}", "compare=[]", config=case.config
        ) as run:
            ended = run.wait()
            assert ended.code == 0, ended.err
            newest = max((run.folder / "checkpoints").glob("[0-9]*"))
        assert bare.wait(120) == 0, "the bare loop failed"
    finally:
        bare.kill()
    ours = {
        name.removeprefix("model/"): tensor
        for name, tensor in load_file(newest / "tensors.safetensors").items()
        if name.startswith("model/")
    }
    plain = load_file(folder / "bare" / "weights.safetensors")
    different = sorted(name for name in ours.keys() | plain.keys() if not _equal(ours.get(name), plain.get(name)))
    return {"bit_identical": not different, "different": different, "tensors": len(plain), "steps": int(newest.name)}


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


class Contestant:
    """One training process that is let run by turns of ``turn`` steps, from the end of an epoch to that of another."""

    def __init__(self, process: psutil.Process, steps: Path, turn: int) -> None:
        self.process = process
        self._steps = steps
        self.turn = turn
        self._read = 0
        self._finished = 0
        # Linux: the CPU clock of another process, all its threads, nanoseconds.
        self._clock = (~process.pid << 3) | 2
        self.seconds_per_step: list[float] = []
        self._until(1)
        self.process.suspend()

    def _look(self) -> int:
        """Finished steps, as written down at the end of their epoch."""
        with self._steps.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        self._finished += new.count(b"\n")
        return self._finished

    def _until(self, steps: int) -> None:
        while self._look() < steps:
            assert self.process.is_running(), "a contestant died"
            time.sleep(_LOOK_SECONDS)

    def run(self) -> None:
        """Its turn."""
        target = self._finished + self.turn
        before = time.clock_gettime(self._clock)
        self.process.resume()
        self._until(target)
        self.process.suspend()
        self.seconds_per_step.append((time.clock_gettime(self._clock) - before) / self.turn)

    def step_seconds(self) -> float:
        """Median CPU seconds of the training thread in one step, without what lies between steps and epochs."""
        return measure.median([line["cpu_seconds"] for line in json_lines(self._steps)])


@contextlib.contextmanager
def contestants(folder: Path, case: Case) -> Iterator[tuple[dict[str, Contestant], list[Run]]]:
    """The three, each suspended."""
    config = case.load()
    prepare(folder / "bare", config, 1_000_000, case.orders)
    settings = json.loads((folder / "bare" / "settings.json").read_text())
    turn = case.turn_epochs * settings["steps_per_epoch"]
    with contextlib.ExitStack() as stack:
        runs: list[Run] = []
        found: dict[str, Contestant] = {}
        for name, overrides in (("off", _OFF), ("deciding", _DECIDING)):
            run = stack.enter_context(
                measure.endless_run(folder / name, *case.overrides, *overrides, config=case.config)
            )
            found[name] = Contestant(run.process("training"), run.folder / STEP_TIMES_FILE, turn)
            stack.callback(found[name].process.resume)
            runs.append(run)
        bare = _bare(folder / "bare")
        stack.callback(bare.kill)
        steps = folder / "bare" / "steps.jsonl"
        runs[0].until(steps.exists, "the bare loop's first epoch")
        found["bare"] = Contestant(psutil.Process(bare.pid), steps, turn)
        yield found, runs


def overhead(folder: Path, case: Case, rounds: int) -> dict[str, Any]:
    """Race them by turns."""
    with contestants(folder, case) as (racers, runs):
        served = [run.process(name) for run in runs for name in SERVICES]
        before = sum(sum(process.cpu_times()[:2]) for process in served)
        names = list(racers)
        for number in range(rounds):
            # Everyone is first, second and third equally often.
            for name in names[number % 3 :] + names[: number % 3]:
                racers[name].run()
        services = sum(sum(process.cpu_times()[:2]) for process in served) - before
        inside = {name: 1e3 * racer.step_seconds() for name, racer in racers.items()}
    costs = {name: racer.seconds_per_step for name, racer in racers.items()}
    turn = racers["bare"].turn
    pairs = {
        name: [([bare], [ours]) for bare, ours in zip(costs["bare"], costs[name], strict=True)]
        for name in ("off", "deciding")
    }
    changes = {name: measure.change_percent(found, measure.median) for name, found in pairs.items()}
    trained = turn * sum(sum(costs[name]) for name in ("off", "deciding"))
    return {
        "overhead_percent": changes["off"]["percent"],
        "interval": changes["off"]["interval"],
        "holds": measure.below(LIMIT_PERCENT, changes["off"]["interval"]),
        "overhead_percent_deciding": changes["deciding"]["percent"],
        "interval_deciding": changes["deciding"]["interval"],
        "holds_deciding": measure.below(LIMIT_PERCENT, changes["deciding"]["interval"]),
        "services_cpu_percent_of_training": 100.0 * services / trained,
        "cpu_ms_per_step": {name: 1e3 * measure.median(values) for name, values in costs.items()},
        "thread_cpu_ms_in_a_step": inside,
        "rounds": rounds,
        "steps_per_turn": turn,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=5, help="length of the runs whose weights are compared")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get("ESPER__DATA__DATA_DIR"),
        help="where CIFAR-10 is; without it the digits are the stated case",
    )
    arguments = parser.parse_args(argv)
    before = measure.environment()
    cases = {"digits": DIGITS}
    if arguments.data_dir is not None:
        cases["cifar10"] = cifar10(arguments.data_dir.resolve())
    found: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory(prefix="esper-dormant-") as folder:
            equal = bit_identical(Path(folder) / "equal", case, arguments.epochs if case is DIGITS else 1)
            found[name] = {**equal, **overhead(Path(folder) / "race", case, arguments.rounds)}
    stated = list(found)[-1]
    result = {
        **found[stated],
        "bit_identical": all(case["bit_identical"] for case in found.values()),
        "case": stated,
        "digits": found["digits"],
        "limit_percent": LIMIT_PERCENT,
        "method": __doc__,
        "environment": {"before": before, "after": measure.environment()},
    }
    measure.publish(arguments.out, result, [row for name, case in found.items() for row in _rows(name, case)])
    return 0


def _rows(name: str, case: Mapping[str, Any]) -> list[tuple[str, str]]:
    def percent(key: str, interval: str) -> str:
        low, high = case[interval]
        return f"{case[key]:+.2f} % [{low:+.2f}, {high:+.2f}] (limit {LIMIT_PERCENT} %)"

    def milliseconds(key: str) -> str:
        return json.dumps({racer: round(ms, 3) for racer, ms in case[key].items()})

    return [
        (f"{name}: bit-identical", f"{case['bit_identical']} after {case['steps']} steps"),
        (f"{name}: overhead", percent("overhead_percent", "interval")),
        (f"{name}: overhead, deciding", percent("overhead_percent_deciding", "interval_deciding")),
        (f"{name}: services' CPU", f"{case['services_cpu_percent_of_training']:.1f} % of training's"),
        (f"{name}: CPU per step, ms", milliseconds("cpu_ms_per_step")),
        (f"{name}: inside steps alone", milliseconds("thread_cpu_ms_in_a_step")),
    ]


if __name__ == "__main__":
    sys.exit(main())

"""What Esper costs while nothing grows: ``python -m tests.benchmarks.dormant --out FILE [--rounds N] [--window S]``.

``bit_identical``: `train.py --no-growth`, all services running, against a plain PyTorch loop in a process of its own
that imports nothing of ours (``bare.py``), from the same first weights over the same batches: are the last weights
equal to the last bit?

``overhead_percent``: three processes train the same network side by side, the bare loop, a run with the controller off,
and a run that is sampled, traced and served while Tamiyo decides "nothing" after every tenth epoch
(``overhead_percent_deciding``). Only one of them is let run at a time (SIGSTOP, SIGCONT), each for one window in each
round; the clock is the CPU time of the whole process, all threads, validation and the ends of epochs included, per
finished step. Medians over rounds of the paired ratio, 95 % bootstrap intervals over rounds. The CPU time of the
services is beside it. Limit: 0.5 %. A short epoch of a small network is the hard case: what an epoch's end costs
(events, metrics, the last good state) is shared by few steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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
_SAME: Final = ("data.translate=0", "data.flip=false", "model.widths=[16,24,32]")
_OFF: Final = (*_SAME, "growth.enabled=false")
#: A budget that nothing fits into: Tamiyo is asked, and decides nothing.
_DECIDING: Final = (
    *_SAME,
    "growth.budget.flops=1.000001",
    "growth.window=[0.0,1.0]",
    "growth.decisions=100000",
    "growth.health_every_epochs=10",
)
_SETTLE_SECONDS: Final = 0.05


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
        "evaluation_batch_size": config.data.evaluation_batch_size,
        "learning_rate": optimizer.learning_rate,
        "momentum": optimizer.momentum,
        "weight_decay": optimizer.weight_decay,
        "warmup_ratio": optimizer.warmup_ratio,
    }
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "inputs.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings))


def config_of(*overrides: str) -> EsperConfig:
    """The quick start with these overrides."""
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides=[*_SAME, *overrides], environ={}).config


def _bare(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # -P: this folder has a numbers.py, which would stand in for Python's own.
    command = [sys.executable, "-P", str(Path(__file__).with_name("bare.py")), str(folder)]
    return subprocess.Popen(command, env=environment)


def bit_identical(folder: Path, epochs: int) -> dict[str, Any]:
    """Compare the last weights."""
    prepare(folder / "bare", config_of(), epochs, epochs)
    bare = _bare(folder / "bare")
    try:
        with running(folder / "run", *_OFF, f"training.epochs={epochs}", "compare=[]") as run:
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
    """One training process that is let run by turns."""

    def __init__(self, process: psutil.Process, steps: Path) -> None:
        self.process = process
        self._steps = steps
        # Linux: the CPU clock of another process, all its threads, nanoseconds.
        self._clock = (~process.pid << 3) | 2
        self.windows: list[tuple[float, float, float]] = []
        self.process.suspend()

    def run(self, window: float) -> None:
        """Let it run for one window."""
        self.process.resume()
        time.sleep(_SETTLE_SECONDS)
        begin, cpu = time.time(), time.clock_gettime(self._clock)
        time.sleep(window)
        end, spent = time.time(), time.clock_gettime(self._clock) - cpu
        self.process.suspend()
        self.windows.append((begin, end, spent))

    def seconds_per_step(self) -> list[float]:
        """CPU seconds per step of each window."""
        began = [line["began"] for line in json_lines(self._steps)]
        return [spent / max(1, sum(begin <= moment < end for moment in began)) for begin, end, spent in self.windows]

    def step_seconds(self) -> float:
        """Median CPU seconds of the training thread in one step, without what lies between steps and epochs."""
        return measure.median([line["cpu_seconds"] for line in json_lines(self._steps)])


@contextlib.contextmanager
def contestants(folder: Path) -> Iterator[tuple[dict[str, Contestant], list[Run]]]:
    """The three, each suspended."""
    prepare(folder / "bare", config_of(), 1_000_000, 50)
    with contextlib.ExitStack() as stack:
        runs: list[Run] = []
        found: dict[str, Contestant] = {}
        for name, overrides in (("off", _OFF), ("deciding", _DECIDING)):
            run = stack.enter_context(measure.endless_run(folder / name, *overrides))
            found[name] = Contestant(run.process("training"), run.folder / STEP_TIMES_FILE)
            stack.callback(found[name].process.resume)
            runs.append(run)
        bare = _bare(folder / "bare")
        stack.callback(bare.kill)
        steps = folder / "bare" / "steps.jsonl"
        runs[0].until(steps.exists, "the bare loop's first epoch")
        found["bare"] = Contestant(psutil.Process(bare.pid), steps)
        yield found, runs


def overhead(folder: Path, rounds: int, window: float) -> dict[str, Any]:
    """Race them by turns."""
    with contestants(folder) as (racers, runs):
        served = [run.process(name) for run in runs for name in SERVICES]
        before = sum(sum(process.cpu_times()[:2]) for process in served)
        names = list(racers)
        for number in range(rounds):
            # Everyone is first, second and third equally often.
            for name in names[number % 3 :] + names[: number % 3]:
                racers[name].run(window)
        services = sum(sum(process.cpu_times()[:2]) for process in served) - before
        for racer in racers.values():
            # To the end of the epoch under way, where its steps are written down.
            racer.process.resume()
            time.sleep(2.0)
            racer.process.suspend()
    costs = {name: racer.seconds_per_step() for name, racer in racers.items()}
    pairs = {
        name: [([bare], [ours]) for bare, ours in zip(costs["bare"], costs[name], strict=True)]
        for name in ("off", "deciding")
    }
    changes = {name: measure.change_percent(found, measure.median) for name, found in pairs.items()}
    trained = sum(spent for name in ("off", "deciding") for _, _, spent in racers[name].windows)
    return {
        "overhead_percent": changes["off"]["percent"],
        "interval": changes["off"]["interval"],
        "holds": measure.below(LIMIT_PERCENT, changes["off"]["interval"]),
        "overhead_percent_deciding": changes["deciding"]["percent"],
        "interval_deciding": changes["deciding"]["interval"],
        "holds_deciding": measure.below(LIMIT_PERCENT, changes["deciding"]["interval"]),
        "services_cpu_percent_of_training": 100.0 * services / trained,
        "cpu_ms_per_step": {name: 1e3 * measure.median(values) for name, values in costs.items()},
        "thread_cpu_ms_in_a_step": {name: 1e3 * racer.step_seconds() for name, racer in racers.items()},
        "rounds": rounds,
        "window_seconds": window,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=45)
    parser.add_argument("--window", type=float, default=1.0, help="seconds that each runs in a round")
    parser.add_argument("--epochs", type=int, default=5, help="length of the runs whose weights are compared")
    arguments = parser.parse_args(argv)
    before = measure.environment()
    with tempfile.TemporaryDirectory(prefix="esper-dormant-") as name:
        equal = bit_identical(Path(name) / "equal", arguments.epochs)
        cost = overhead(Path(name) / "race", arguments.rounds, arguments.window)
    result = {
        **equal,
        **cost,
        "limit_percent": LIMIT_PERCENT,
        "method": __doc__,
        "environment": {"before": before, "after": measure.environment()},
    }

    def row(key: str, interval: str) -> str:
        low, high = result[interval]
        return f"{result[key]:+.2f} % [{low:+.2f}, {high:+.2f}] (limit {LIMIT_PERCENT} %)"

    rows = [
        ("bit-identical", f"{result['bit_identical']} after {result['steps']} steps"),
        ("overhead", row("overhead_percent", "interval")),
        ("overhead, deciding", row("overhead_percent_deciding", "interval_deciding")),
        ("services' CPU", f"{result['services_cpu_percent_of_training']:.1f} % of training's"),
        ("CPU per step, ms", json.dumps({name: round(ms, 3) for name, ms in result["cpu_ms_per_step"].items()})),
    ]
    inside = {name: round(ms, 3) for name, ms in result["thread_cpu_ms_in_a_step"].items()}
    rows.append(("inside steps alone", json.dumps(inside)))
    measure.publish(arguments.out, result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

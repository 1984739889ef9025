"""What Esper costs while nothing grows: ``python -m tests.benchmarks.dormant --out FILE [--data-dir DIR]``.

``bit_identical``: `train.py --no-growth`, all services running, against a plain PyTorch loop in a process of its own
that imports nothing of ours (``bare.py``), from the same first weights over the same batches: are the last weights
equal to the last bit?

``overhead_percent``: processes train the same network side by side: the bare loop (``bare``), the same again
(``again``: what the measure makes of no difference, ``noise_percent``), a run with the controller off (``off``), and a
run that is sampled, traced and served while Tamiyo decides "nothing" after every tenth epoch (``deciding``,
``overhead_percent_deciding``). All are bound to one core and take turns of a tenth of a second on it (SIGSTOP,
SIGCONT), so that what the machine does meanwhile meets all alike, until each has trained a round's epochs; the clock is
the CPU time of the whole process, all threads, validation and the ends of epochs included. Processes that do the same
differ by the luck of their memory, some by 2 % (whether glibc gives the top of the heap back after every step): all are
told to keep it (``allocator``), and all are started anew several times. Medians over rounds of the paired ratio, 95 %
bootstrap intervals over starts and the rounds within them. The CPU time of the services is beside it. Limit: 0.5 %.

The stated case is ``case``: the host of configs/cifar10.yaml where --data-dir (or ESPER__DATA__DATA_DIR) names the
files of CIFAR-10, else the digits. The digits are measured in any case and are the hard one (``digits``): steps of
5 ms, and an epoch of 29 of them, which share what an epoch's end costs (events, metrics, the last good state).
Augmentation is off: it is a user's choice, and no part of growing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
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
    # It is stopped most of the time, which must not count.
    "growth.decision_deadline_seconds=30",
)
#: glibc keeps up to 1 GiB at its top, and takes smaller buffers than 32 MiB (its most) from there.
_ALLOCATOR: Final = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
_CORE: Final = max(os.sched_getaffinity(0))
_SLICE_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 0.001


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained; ``turn_epochs`` make a round of about a second or more, ``orders`` fit into the memory."""

    config: str
    overrides: tuple[str, ...]
    turn_epochs: int
    orders: int

    def load(self) -> EsperConfig:
        """As the runs see it."""
        return load_config(ROOT / self.config, overrides=self.overrides, environ={}).config


DIGITS: Final = Case("configs/quickstart.yaml", (*_SAME, "model.widths=[16,24,32]"), 12, 50)


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
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **_ALLOCATOR}
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
    """One training process that is let run in slices on ``_CORE``, for ``turn`` steps a round (whole epochs)."""

    def __init__(self, process: psutil.Process, steps: Path, turn: int) -> None:
        self.process = process
        self._steps = steps
        self.turn = turn
        self._read = 0
        self._finished = 0
        # Linux: the CPU clock of another process, all its threads, nanoseconds.
        self._clock = (~process.pid << 3) | 2
        self._target, self._began = 1, 0.0
        while not self._over():
            assert self.process.is_running(), "a contestant died"
            time.sleep(_LOOK_SECONDS)
        self.process.suspend()
        for thread in self.process.threads():
            os.sched_setaffinity(thread.id, {_CORE})

    def _over(self) -> bool:
        """Whether it is through with its steps; they are written down at the end of their epoch."""
        with self._steps.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        self._finished += new.count(b"\n")
        return self._finished >= self._target

    def begin_round(self) -> None:
        """Its next steps begin."""
        self._target, self._began = self._finished + self.turn, time.clock_gettime(self._clock)

    def slice(self) -> float | None:
        """Let it run; CPU seconds of a step of this round once the round is over for it."""
        until = time.perf_counter() + _SLICE_SECONDS
        self.process.resume()
        while not (over := self._over()) and time.perf_counter() < until:
            assert self.process.is_running(), "a contestant died"
            time.sleep(_LOOK_SECONDS)
        self.process.suspend()
        return (time.clock_gettime(self._clock) - self._began) / self.turn if over else None

    def step_seconds(self) -> list[float]:
        """CPU seconds of the training thread in each step, without what lies between steps and epochs."""
        return [line["cpu_seconds"] for line in json_lines(self._steps)]


def race(racers: Mapping[str, Contestant], number: int) -> dict[str, float]:
    """One round: CPU seconds of a step of each."""
    found: dict[str, float] = {}
    for racer in racers.values():
        racer.begin_round()
    generator = random.Random(number)
    while len(found) < len(racers):
        # In any order: what one leaves in the caches is not always met by the same other.
        for name in generator.sample(list(racers), len(racers)):
            if name not in found and (seconds := racers[name].slice()) is not None:
                found[name] = seconds
    return found


@contextlib.contextmanager
def contestants(folder: Path, case: Case) -> Iterator[tuple[dict[str, Contestant], list[Run]]]:
    """All of them, each suspended."""
    config = case.load()
    for name in ("bare", "again"):
        prepare(folder / name, config, 1_000_000, case.orders)
    turn = case.turn_epochs * int(json.loads((folder / "bare" / "settings.json").read_text())["steps_per_epoch"])
    with contextlib.ExitStack() as stack:
        runs: list[Run] = []
        found: dict[str, Contestant] = {}
        for name, overrides in (("off", _OFF), ("deciding", _DECIDING)):
            run = stack.enter_context(
                measure.endless_run(
                    folder / name, *case.overrides, *overrides, config=case.config, environment=_ALLOCATOR
                )
            )
            found[name] = Contestant(run.process("training"), run.folder / STEP_TIMES_FILE, turn)
            stack.callback(found[name].process.resume)
            runs.append(run)
        for name in ("bare", "again"):
            bare = _bare(folder / name)
            stack.callback(bare.kill)
            steps = folder / name / "steps.jsonl"
            runs[0].until(steps.exists, "the bare loop's first epoch")
            found[name] = Contestant(psutil.Process(bare.pid), steps, turn)
        yield found, runs


def overhead(folder: Path, case: Case, starts: int, rounds: int) -> dict[str, Any]:
    """Race them, ``starts`` times from the start, ``rounds`` rounds each."""
    costs: list[list[dict[str, float]]] = []
    services = 0.0
    inside: dict[str, list[float]] = {}
    for start in range(starts):
        with contestants(folder / str(start), case) as (racers, runs):
            served = [run.process(name) for run in runs for name in SERVICES]
            before = sum(sum(process.cpu_times()[:2]) for process in served)
            costs.append([race(racers, number) for number in range(rounds)])
            services += sum(sum(process.cpu_times()[:2]) for process in served) - before
            turn = racers["bare"].turn
            for name, racer in racers.items():
                inside.setdefault(name, []).extend(racer.step_seconds())
        shutil.rmtree(folder / str(start))
    ours = sum(cost[name] for start in costs for cost in start for name in ("off", "deciding"))
    medians = {name: measure.median([cost[name] for start in costs for cost in start]) for name in inside}
    found: dict[str, Any] = {}
    for name, suffix in (("off", ""), ("deciding", "_deciding")):
        percent, interval = _over_bare(costs, name)
        found[f"overhead_percent{suffix}"], found[f"interval{suffix}"] = percent, interval
        found[f"holds{suffix}"] = measure.below(LIMIT_PERCENT, interval)
    found["noise_percent"], found["interval_noise"] = _over_bare(costs, "again")
    return {
        **found,
        "services_cpu_percent_of_training": 100.0 * services / (turn * ours),
        "cpu_ms_per_step": {name: 1e3 * seconds for name, seconds in medians.items()},
        "thread_cpu_ms_in_a_step": {name: 1e3 * measure.median(values) for name, values in inside.items()},
        "starts": starts,
        "rounds": rounds,
        "steps_per_turn": turn,
    }


def _over_bare(costs: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[float, list[float]]:
    """By how much ``name`` takes more than the bare loop, percent, with its interval."""
    return measure.nested_median([[100.0 * (cost[name] / cost["bare"] - 1.0) for cost in start] for start in costs])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--starts", type=int, default=6, help="how often all processes are started anew")
    parser.add_argument("--rounds", type=int, default=8, help="rounds after each start")
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
            found[name] = {**equal, **overhead(Path(folder) / "race", case, arguments.starts, arguments.rounds)}
    stated = list(found)[-1]
    result = {
        **found[stated],
        "bit_identical": all(case["bit_identical"] for case in found.values()),
        "case": stated,
        "digits": found["digits"],
        "limit_percent": LIMIT_PERCENT,
        "allocator": _ALLOCATOR,
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
        (f"{name}: bare loop, again", percent("noise_percent", "interval_noise")),
        (f"{name}: services' CPU", f"{case['services_cpu_percent_of_training']:.1f} % of training's"),
        (f"{name}: CPU per step, ms", milliseconds("cpu_ms_per_step")),
        (f"{name}: inside steps alone", milliseconds("thread_cpu_ms_in_a_step")),
    ]


if __name__ == "__main__":
    sys.exit(main())

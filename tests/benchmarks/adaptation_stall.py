"""Does growing make training wait? ``python -m tests.benchmarks.adaptation_stall --out FILE``.

**While a kernel is on its way** (``in_flight``): live runs (`train.py` with all its services), one after another, in
which Tamiyo plants a seed every eighth epoch that leaves again once it was judged, so that the network is the host's
between two trials. A window is from GERMINATED to LOADING: in it the kernel is asked for, built, checked, signed,
stored, fetched and verified; each seed has a kernel of its own, so no cache has it. Every step of a window has two
partners: the steps at the same place in the two nearest epochs of the same kind in which no seed was alive. An epoch
is of one kind or the other by whether Tamiyo was asked at its beginning: midway between two trials it is asked, too,
and plants nothing, as the slot rests. ``percent`` is by how much the statistic of the windows' steps exceeds that of
their partners (wall clock, from ``telemetry.step_times``), 95 % bootstrap intervals over whole windows. Limit: 5 % at
the 99th percentile; a window is too short for a tail, so the pooled figure of all runs counts (``holds``). How many
windows there are was fixed before: one in sixty gave an interval 30 points wide, so two thousand give one of about 5.
``holds_by_window`` is for information: of a dozen steps the 99th percentile is nearly the longest one. What other
tenants of a processor do to it comes and goes within seconds, and the tail of a few long windows says more of them than
of us: there are many short ones, a second apart. ``noise`` is the same between idle epochs: what the machine does on
its own. ``step_cpu_time`` is the CPU time of the training thread in the same steps.

``after_no_decision`` has partners that no decision came before; it was all there was until the evening of 2026-11-26,
and read +3.7 % [+0.7, +7.0] in 872 windows. The steps that follow a decision find the processor's caches full of it:
with the compiler stopped they were as much slower (the first by a tenth), and the others were not slower at all. That
is the price of asking, whatever the answer, and not of a kernel on its way.

``other_work``, for information: where two cores share a cache, or are two threads of one core, work on one may slow the
other. Once after every trial, from the beginning of an epoch, a Python of nobody's works where the services run, for as
long as a window usually lasts (it writes and reads JSON); its steps have idle partners, too. ``beyond_other_work``
compares the windows with their neighbors of these.

``graft_pause``: what training stands still for, once for each kernel: the safe point in which it is verified again,
parsed, built and grafted (milliseconds; no step, so in none of the figures above).

``steps_that_waited``: steps of windows that stood still, safe point included, without using their processor, for as
long as half of their window: a step that waits for a compile waits about as long as it takes. Must be 0.

**When the compiler fails meanwhile** (``faults``): another such run, with a trial every 80th epoch. ``cold`` are the
windows after the compiler's processes were killed, before every third trial: it loads torch anew, which takes some
hundred steps. ``other_work`` is what the machine makes of that: a Python of nobody's loads torch where the services
run, once after every third trial; the steps meanwhile have idle partners, too. ``cold_against_other_work`` compares
the cold windows with their neighbors of these: what a compile costs beyond any other work on the other core.

**Once it is part of the network** (``fossilized``): a widening and a branch that were fossilized by the trainer,
against the same network as rebuilt from its export in plain PyTorch, in one process, by turns of 20 steps of the
same training: CPU time per step and bytes of parameters, buffers, optimizer state and of what is kept for the
backward pass. Limit: 2 %.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from torch import nn
from torch.nn import functional as F

from services.blueprints.spec import Blueprint
from services.tolaria import rebuild
from services.tolaria.export import export
from services.tolaria.reporting import DECISIONS_FILE, METRICS_FILE
from services.tolaria.step_times import STEP_TIMES_FILE
from tests.benchmarks import measure
from tests.infrastructure.runs import Run, json_lines
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, config_of, grow_once

STALL_LIMIT_PERCENT: Final = 5.0
FOSSILIZED_LIMIT_PERCENT: Final = 2.0
#: Epochs between trials: one lives for three, midway to the next Tamiyo is asked in vain, other work takes two.
_EVERY: Final = 8
#: Epochs before the first trial: the compiler has loaded torch by then, also where the machine has other work to do.
_LEAD: Final = 150
#: For how long other work is done, about as a kernel takes.
_OTHER_SECONDS: Final = 0.15
_OTHER_DATA: Final = {str(number): [number, 2.5 * number, "x" * 20] for number in range(500)}
#: The same where the compiler is killed: room for a cold compile or for other work, and for idle epochs beside them.
_EVERY_FAULT: Final = 80
#: Epochs before a trial at which the compiler is killed: the trial before is over, the next has not begun.
_KILL_BEFORE: Final = 4
_COLD_EVERY: Final = 3
#: Epochs after the trial that follows a cold one at which other work is done: the seed has left.
_OTHER_AFTER_COLD: Final = 14
_COLD_WORK: Final = (sys.executable, "-c", "import torch, torch._dynamo")
_RUN: Final = (
    "data.translate=0",
    # Small, so that many steps fall into the time of a kernel.
    "model.widths=[8,12,16]",
    # No seed is worth that much: each is judged and leaves, and the network is the host's again.
    "growth.evaluation.threshold=1000",
    "growth.evaluation.doubtful=cull",
    "growth.evaluation.min_epochs=0",
    # So much that each decision's share buys a channel.
    "growth.budget.flops=80",
    # Hundreds of epochs on the digits: the loss is nearly zero, and the least thing looks like a divergence.
    "governor.enabled=false",
    "growth.policy=random",
    # One seed at a time.
    'growth.slots=["groups.1.conv1"]',
    "growth.kernel_timeout_epochs=80",
)
#: Far below a step: other work is to begin where windows do, when an epoch is over.
_LOOK_SECONDS: Final = 0.002
_TURN: Final = 20
#: As the services.
_NICE: Final = 10


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which kernels were on their way or other work was done: by the wall clock, seconds."""

    begin: float
    end: float

    def has(self, moment: float) -> bool:
        """Whether ``moment`` is in it."""
        return self.begin <= moment <= self.end


def windows(lines: Sequence[dict[str, Any]]) -> list[Window]:
    """From the first GERMINATED to the last LOADING of seeds that wait together; cancelled ones are left out."""
    waiting: set[str] = set()
    begin, found = 0.0, []
    for line in lines:
        if line.get("kind") != "transition":
            continue
        if line["to_state"] == "GERMINATED":
            begin = begin if waiting else line["time"]
            waiting.add(line["seed"])
        elif line["seed"] in waiting:
            waiting.discard(line["seed"])
            if not waiting and line["to_state"] == "LOADING":
                found.append(Window(begin, line["time"]))
    return found


@dataclass(frozen=True, slots=True)
class Pair:
    """The steps of one window and their idle partners: of two epochs, each paired with the window step by step."""

    window: Window
    steps: list[dict[str, Any]]
    idle: list[dict[str, Any]]
    other_idle: list[dict[str, Any]]

    @property
    def partners(self) -> list[dict[str, Any]]:
        """All idle steps that are like those of the window."""
        return [*self.idle, *self.other_idle]


def pair(
    steps: Sequence[dict[str, Any]],
    found: Sequence[Window],
    busy: set[int],
    per_epoch: int,
    decided: AbstractSet[int] = frozenset(),
) -> list[Pair]:
    """Match each step of the windows to those of the same place in the nearest epochs that are not ``busy``.

    Epochs among ``decided`` are matched to such ones, all others to others.
    """
    by_number = {step["step"]: step for step in steps}
    # The first epoch warms up; of the last not all steps need be there.
    idle = [epoch for epoch in range(1, max(by_number) // per_epoch) if epoch not in busy]
    pairs = []
    for window in found:
        inside = _steps_in(window, steps)
        if not inside:
            continue  # shorter than a step, or between two epochs
        near = _partners(_epochs_of(inside, per_epoch), idle, decided)
        if near is not None:
            at = [divmod(step["step"] - 1, per_epoch) for step in inside]
            partners = [
                [by_number[near[epoch][side] * per_epoch + place + 1] for epoch, place in at] for side in (0, 1)
            ]
            pairs.append(Pair(window, inside, *partners))
    return pairs


def _partners(epochs: Sequence[int], idle: Sequence[int], decided: AbstractSet[int]) -> dict[int, Sequence[int]] | None:
    """Two of ``idle`` for each of ``epochs``, the nearest of its kind; None if there are not so many."""
    found: dict[int, Sequence[int]] = {}
    for asked in (True, False):
        own = [epoch for epoch in epochs if (epoch in decided) is asked]
        alike = [epoch for epoch in idle if (epoch in decided) is asked]
        near = sorted(alike, key=lambda epoch: abs(epoch - epochs[0]))
        if len(near) < 2 * len(own):
            return None
        found |= {epoch: near[2 * place : 2 * place + 2] for place, epoch in enumerate(own)}
    return found


def _steps_in(window: Window, steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = bisect.bisect_left(steps, window.begin, key=operator.itemgetter("began"))
    after = bisect.bisect_right(steps, window.end, key=operator.itemgetter("began"))
    return [step for step in steps[first:after] if window.has(step["began"] + step["seconds"])]


def _epochs_of(steps: Sequence[dict[str, Any]], per_epoch: int) -> list[int]:
    return sorted({(step["step"] - 1) // per_epoch for step in steps})


def busy_epochs(lines: Sequence[dict[str, Any]]) -> set[int]:
    """Epochs (from 0) in which a seed was alive: from the epoch that its life begins with to that in which it ended."""
    busy: set[int] = set()
    born: dict[str, int] = {}
    for line in lines:
        if line.get("kind") != "transition":
            continue
        if line["to_state"] == "GERMINATED":
            born[line["seed"]] = line["epoch"]
        elif line["to_state"] in ("CULLED", "CANCELLED", "ROLLED_BACK", "FOSSILIZED"):
            busy.update(range(born.pop(line["seed"]), line["epoch"] + 1))
    busy.update(epoch for start in born.values() for epoch in range(start, start + 1000))
    return busy


def waited(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Steps that stood still as long as half of their window; short windows need at least three median steps."""
    usual = statistics.median(step["seconds"] for one in pairs for step in one.idle)
    found = []
    for one in pairs:
        least = max(0.5 * (one.window.end - one.window.begin), 3 * usual)
        found += [
            step for step in one.steps if step["seconds"] - step["cpu_seconds"] + (step["gap_seconds"] or 0.0) > least
        ]
    return found


@dataclass(frozen=True, slots=True)
class Live:
    """What live runs showed: their windows, the times in which other work was done, when their compilers were killed.

    ``after_no_decision`` are the windows again, with partners that no decision came before. ``placement`` has one entry
    for each run.
    """

    pairs: list[Pair]
    after_no_decision: list[Pair]
    other_work: list[Pair]
    kills: list[float]
    steps: list[dict[str, Any]]
    placement: list[dict[str, Any]]

    def __add__(self, later: Live) -> Live:
        """Both, one after the other."""
        return Live(
            self.pairs + later.pairs,
            self.after_no_decision + later.after_no_decision,
            self.other_work + later.other_work,
            self.kills + later.kills,
            self.steps + later.steps,
            self.placement + later.placement,
        )


def live(folder: Path, trials: int, *, every: int = _EVERY, faults: bool = False) -> Live:
    """A live run of ``trials`` trials, one ``every`` so many epochs.

    With ``faults`` its compiler is killed, other work is done for longer, and trials are as far apart as that needs.
    """
    every, lead = (_EVERY_FAULT, _EVERY_FAULT) if faults else (every, _LEAD)
    epochs = lead + every * trials
    # Every second decision finds the slot at rest. Where windows are of hundreds of steps, how they begin is nothing.
    rest, decisions = (0, trials) if faults else (every // 2, 2 * trials)
    window = [lead / epochs, (epochs - every + rest) / epochs]
    overrides = (
        *(*_RUN, f"training.epochs={epochs}", f"growth.window={window}"),
        *(f"growth.decisions={decisions}", f"growth.embargo_epochs={rest}"),
    )
    with measure.endless_run(folder, *overrides) as run:
        placement = _placement(run)
        # In a thread of its own, as it steps aside: what is started later must not be confined to where it is.
        with ThreadPoolExecutor(1) as aside:
            watched = aside.submit(_failing, run, epochs) if faults else aside.submit(_beside, run, epochs, every)
            kills, others = watched.result()
        steps = measure.step_times(run.folder)
        lines = [line for line in json_lines(run.folder / "events.jsonl") if line["arm"] == "grown"]
        asked = {line["epoch"] for line in json_lines(run.folder / DECISIONS_FILE) if line["arm"] == "grown"}
    per_epoch = max(step["step"] for step in steps) // epochs
    alive, found = busy_epochs(lines), windows(lines)
    # A compiler that was killed loads torch at once, before it is asked.
    loading = [Window(kill, min((one.begin for one in found if one.begin >= kill), default=kill)) for kill in kills]
    busy = alive.union(*(_epochs_of(_steps_in(other, steps), per_epoch) for other in (*others, *loading)))
    decided = set[int]() if faults else asked
    pairs = pair(steps, found, busy, per_epoch, decided)
    assert len(pairs) >= 2, f"only {len(pairs)} of {trials} trials had a window with steps in it"
    after_no_decision = pair(steps, found, busy | asked, per_epoch)
    other_work = [
        one
        for one in pair(steps, others, busy, per_epoch, decided)
        if alive.isdisjoint(_epochs_of(one.steps, per_epoch))
    ]
    return Live(pairs, after_no_decision, other_work, kills, steps, [placement])


def in_flight(run: Live) -> dict[str, Any]:
    """What undisturbed runs say."""
    tail = _figures(run.pairs, "seconds", lambda one: (one.partners, one.steps))
    assert tail is not None, "a live run has windows"
    return {
        **_described(run.pairs),
        "step_cpu_time": _figures(run.pairs, "cpu_seconds", lambda one: (one.partners, one.steps)),
        "noise": _figures(run.pairs, "seconds", lambda one: (one.other_idle, one.idle)),
        "holds": measure.below(STALL_LIMIT_PERCENT, tail["p99"]["pooled_interval"]),
        "holds_by_window": measure.below(STALL_LIMIT_PERCENT, tail["p99"]["interval"]),
        "after_no_decision": _figures(run.after_no_decision, "seconds", lambda one: (one.partners, one.steps)),
        "other_work": _described(run.other_work),
        "beyond_other_work": _against(run.pairs, run.other_work),
        "graft_pause": _grafts([one.window for one in run.pairs], run.steps),
        "steps_that_waited": len(waited(run.pairs)),
        "waited": waited(run.pairs),
        "placement": run.placement,
    }


def under_faults(run: Live) -> dict[str, Any]:
    """What a run says whose compiler was killed."""
    cold = _after(run.kills, run.pairs)
    return {
        "cold": _described(cold),
        "other_work": _described(run.other_work),
        "cold_against_other_work": _against(cold, run.other_work),
        "noise": _figures(run.pairs, "seconds", lambda one: (one.other_idle, one.idle)),
        "steps_that_waited": len(waited(run.pairs)),
        "waited": waited(run.pairs),
        "placement": run.placement,
    }


def _against(pairs: Sequence[Pair], others: Sequence[Pair]) -> dict[str, Any] | None:
    """The steps of windows against those of the windows among ``others`` that are nearest in time."""
    return _changes(
        [
            ([step["seconds"] for step in other.steps], [step["seconds"] for step in one.steps])
            for one in pairs
            for other in sorted(others, key=lambda other: abs(other.window.begin - one.window.begin))[:1]
        ]
    )


def _grafts(found: Sequence[Window], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the safe points that windows end in; those at the ends of epochs hold more than a graft and do not count."""
    following = (next((step for step in steps if step["began"] >= window.end), None) for window in found)
    gaps = [1e3 * step["gap_seconds"] for step in following if step is not None and step["gap_seconds"] is not None]
    return {"grafts": len(gaps), "ms": {"median": statistics.median(gaps), "greatest": max(gaps)} if gaps else None}


def _after(kills: Sequence[float], pairs: Sequence[Pair]) -> list[Pair]:
    """The windows that are the first after a kill."""
    following = (next((one for one in pairs if one.window.begin >= kill), None) for kill in kills)
    return [one for one in following if one is not None]


def _described(pairs: Sequence[Pair]) -> dict[str, Any]:
    """``step_time`` is None where there is none."""
    lengths = [one.window.end - one.window.begin for one in pairs]
    return {
        "windows": len(pairs),
        "steps": sum(len(one.steps) for one in pairs),
        "window_seconds": {"median": statistics.median(lengths), "greatest": max(lengths)} if lengths else None,
        "step_time": _figures(pairs, "seconds", lambda one: (one.partners, one.steps)),
    }


def _step_aside(run: Run) -> None:
    """Move this thread to where the services are: it looks at the run, and must not take turns with the training."""
    os.sched_setaffinity(0, run.process("tezzeret").cpu_affinity())
    os.nice(_NICE)


def _epochs_over(run: Run, epochs: int) -> Iterator[int]:
    """The number of finished epochs, again and again until nearly all of them are over."""
    run.until_epoch(1)
    _step_aside(run)
    found = 0
    with (run.folder / METRICS_FILE).open("rb") as file:
        while found < epochs - 1:
            found += file.read().count(b"\n")
            yield found
            time.sleep(_LOOK_SECONDS)  # other processes write the file: there is nothing to wait on
    run.until(lambda: len(run.lines(STEP_TIMES_FILE)) > 0 and len(run.metrics()) >= epochs, "the last epoch", 120.0)


def _beside(run: Run, epochs: int, every: int) -> tuple[list[float], list[Window]]:
    """Wait for the end, other work done after each decision in vain; returns no kills, and when it was done."""
    others: list[Window] = []
    for epoch in _epochs_over(run, epochs):
        if epoch > _LEAD + every * len(others) + every // 2:
            began = time.time()
            while time.time() < began + _OTHER_SECONDS:
                json.loads(json.dumps(_OTHER_DATA))
            others.append(Window(began, time.time()))
    return [], others


def _failing(run: Run, epochs: int) -> tuple[list[float], list[Window]]:
    """Wait for the end; returns when the compiler's processes were killed, and when other work was done."""
    kills: list[float] = []
    others: list[Window] = []
    for epoch in _epochs_over(run, epochs):
        if epoch >= _EVERY_FAULT * (_COLD_EVERY * len(kills) + 1) - _KILL_BEFORE:
            kills.append(time.time())
            with contextlib.suppress(psutil.NoSuchProcess):
                for worker in run.process("tezzeret").children(recursive=True):
                    if "resource_tracker" not in " ".join(worker.cmdline()):
                        worker.kill()
        if epoch >= _EVERY_FAULT * (_COLD_EVERY * len(others) + 2) + _OTHER_AFTER_COLD:
            began = time.time()
            subprocess.run(_COLD_WORK, check=True)
            others.append(Window(began, time.time()))
    return kills, others


def _placement(run: Run) -> dict[str, Any]:
    """Whose cores are whose; of the training process those of its computing thread and of its others."""
    found = run.processes()
    placed = {
        name: {"cores": process.cpu_affinity(), "nice": process.nice()} for name, process in sorted(found.items())
    }
    training = found["training"]
    others = {core for thread in training.threads()[1:] for core in os.sched_getaffinity(thread.id)}
    return {**placed, "training, other threads": {"cores": sorted(others)}}


def _figures(
    pairs: Sequence[Pair], field: str, sides: Callable[[Pair], tuple[list[dict[str, Any]], list[dict[str, Any]]]]
) -> dict[str, Any] | None:
    return _changes(
        [
            ([step[field] for step in control], [step[field] for step in treated])
            for control, treated in (sides(one) for one in pairs)
        ]
    )


def _changes(values: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any] | None:
    """Of the median and of the tail; None where nothing was measured."""
    statistics_of = (("median", measure.median), ("p99", measure.p99))
    return {name: measure.change_percent(values, statistic) for name, statistic in statistics_of} if values else None


# ---- once it is part of the network ----------------------------------------------------------------------------------


def fossilized(folder: Path, blueprint: Blueprint, slot: str, size: int, rounds: int) -> dict[str, Any]:
    """A grown network against its plain PyTorch twin."""
    folder.mkdir(parents=True)
    config = config_of(
        data={"limit": None, "batch_size": 32},
        model={"widths": [16, 24, 32, 32]},
        training={"epochs": 4, "device": "cpu", "optimizer": {"learning_rate": 0.1}},
        growth={
            "window": [0.1, 0.6],
            "decisions": 2,
            "isolation_steps": 5,
            "blend_steps": 5,
            "stabilization_steps": 2,
            "fine_tuning_steps": 2,
            "evaluation": {"threshold": -100.0, "min_epochs": 0},
        },
    )
    harness = Harness(folder, config, grow_once((slot, blueprint, size)))
    trainer = harness.trainer()
    trainer.train()
    states = {str(record.state) for record in trainer.engine.seeds()}
    assert states == {"FOSSILIZED"}, f"the seed ended otherwise: {states}"
    exported = folder / "export"
    export(trainer.engine, exported, config.model, harness.data)
    batch = trainer.batches.at(0, 0)
    networks = {"static": rebuild.load(harness.build_host(), exported), "grown": trainer.model}
    logits = [network.eval()(batch.images) for network in networks.values()]
    assert torch.equal(*logits), "these are two different networks: nothing can be compared"
    turns = {name: _turns(network.train(), batch.images, batch.labels) for name, network in networks.items()}
    pairs = []
    generator = random.Random(0)
    for _ in range(rounds):
        names = generator.sample(sorted(turns), 2)
        spent = {name: next(turns[name])[0] for name in names}
        pairs.append(([spent["static"]], [spent["grown"]]))
    memory = {name: next(turn)[1] for name, turn in turns.items()}
    change = measure.change_percent(pairs, measure.median)
    more = 100.0 * (memory["grown"] / memory["static"] - 1.0)
    return {
        "percent": change["percent"],
        "interval": change["interval"],
        "holds": measure.below(FOSSILIZED_LIMIT_PERCENT, change["interval"]),
        "memory_bytes": memory,
        "memory_percent": more,
        "memory_holds": more < FOSSILIZED_LIMIT_PERCENT,
        "cpu_ms_per_step": {
            name: 1e3 * measure.median([pair[side][0] for pair in pairs])
            for side, name in enumerate(("static", "grown"))
        },
        "rounds": rounds,
    }


def _turns(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[float, int]]:
    """CPU seconds per step of one turn, and the bytes that training holds, again and again."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()

    while True:
        step()
        before = time.thread_time()
        for _ in range(_TURN):
            step()
        spent = (time.thread_time() - before) / _TURN
        yield spent, _bytes(network, optimizer, images, labels)


def _bytes(network: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> int:
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(network(images), labels)
    for tensor in (*network.parameters(), *network.buffers()):
        keep(tensor.detach())
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                keep(value)
    del loss
    return sum(held.values())


def _fault_rows(
    failing: dict[str, Any] | None, tail: Callable[[dict[str, Any] | None], str]
) -> Iterator[tuple[str, str]]:
    if failing is None:
        return
    for name, said in (("cold", "cold compiler"), ("other_work", "torch loaded beside")):
        yield f"p99, {said}", f"{tail(failing[name]['step_time'])}, {failing[name]['steps']} steps"
    yield "p99, the one against the other", tail(failing["cold_against_other_work"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--runs", type=int, default=4, help="undisturbed runs")
    parser.add_argument("--trials", type=int, default=500, help="of each of them; takes about a second each")
    parser.add_argument("--faults", type=int, default=30, help="trials of the run whose compiler is killed; or 0")
    parser.add_argument("--rounds", type=int, default=100, help="turns of the fossilized and the static network")
    arguments = parser.parse_args(argv)
    before = measure.environment()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="esper-stall-") as name:
        folder = Path(name)
        runs = [live(folder / f"run-{number}", arguments.trials) for number in range(arguments.runs)]
        flying = in_flight(functools.reduce(operator.add, runs))
        failing = under_faults(live(folder / "faults", arguments.faults, faults=True)) if arguments.faults else None
        settled = {
            "widening": fossilized(folder / "widening", WIDEN, "groups.1.conv1", 12, arguments.rounds),
            "branch": fossilized(folder / "branch", BRANCH, "span:groups.3", 16, arguments.rounds),
        }
    result = {
        "in_flight": flying,
        "faults": failing,
        "fossilized": settled,
        "limits_percent": {"in_flight_p99": STALL_LIMIT_PERCENT, "fossilized": FOSSILIZED_LIMIT_PERCENT},
        "method": __doc__,
        "environment": {"before": before, "after": measure.environment()},
    }

    def row(change: dict[str, Any], percent: str = "percent", interval: str = "interval") -> str:
        low, high = change[interval]
        return f"{change[percent]:+.2f} % [{low:+.2f}, {high:+.2f}]"

    def tail(changes: dict[str, Any] | None) -> str:
        return "not measured" if changes is None else row(changes["p99"], "pooled_percent", "pooled_interval")

    rows = [
        ("windows, steps in them", f"{flying['windows']}, {flying['steps']}"),
        ("step time, median", row(flying["step_time"]["median"])),
        ("step time, p99", f"{tail(flying['step_time'])} (limit 5 %)"),
        ("step time, p99 by window", row(flying["step_time"]["p99"])),
        ("p99, against steps after no decision", tail(flying["after_no_decision"])),
        ("p99, other work", tail(flying["other_work"]["step_time"])),
        ("p99, beyond other work", tail(flying["beyond_other_work"])),
        ("p99, idle steps against idle steps", tail(flying["noise"])),
        ("steps that waited", str(flying["steps_that_waited"] + (failing["steps_that_waited"] if failing else 0))),
        *_fault_rows(failing, tail),
        *(
            (f"fossilized {name}", f"{row(found)}, memory {found['memory_percent']:+.2f} %")
            for name, found in settled.items()
        ),
    ]
    measure.publish(arguments.out, result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

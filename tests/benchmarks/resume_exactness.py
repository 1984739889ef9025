"""Is a killed run, resumed, the run it would have been? ``python -m tests.benchmarks.resume_exactness --out FILE``.

A trainer that meets every state of both paths of growth (a branch, two widenings, one of them culled by a caller, a
loss that is NaN once and a rollback for it) runs in a process that is killed by SIGKILL at points drawn from a seeded
generator; a second process resumes it from what lies on the disk. ``exact`` counts the runs that end as their
uninterrupted twin: weights, buffers, optimizer state, random stream, records of all seeds, journal, lineage, metrics
and figures of the end, all to the last bit.

Kills fall between two steps, right after a seed entered a state (in the middle of a safe point), right after a line of
the journal was written and before it was applied, while a kernel is awaited (``growth.wait_for_kernel``), and in the
middle of writing a checkpoint. Every state of every seed of each of the three scenarios is hit at least once, as
far as --kills allows: the shortest-lived states come first. The scenarios: SGD with kernels that are there some steps
after they were asked for; SGD with kernels that are waited for; AdamW with a checkpoint every third epoch only.

The real services have no part in this: decisions and kernels come by rote from the real cores (``trainer_harness``).
tests/faults kills the training process of real runs, resumed by the real supervisor.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import torch

# The first optimizer loads it, which takes a second or more: once here instead of in every life.
import torch._dynamo

import services  # noqa: F401 - puts the generated contracts on sys.path
from esper.tamiyo.v1 import observation_pb2
from services.blueprints.spec import Blueprint
from services.chassis.config.schema import EsperConfig
from services.kasmina.engine import GrowthEngine
from services.kasmina.lifecycle import SeedState
from services.tolaria import checkpoint
from services.tolaria.ports import Command, CommandKind, KernelRequest, KernelTarget
from services.tolaria.trainer import ArmResult, TolariaTrainer
from tests.benchmarks import measure
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, ReadyKernel, ScriptedMesh, config_of

_FINAL: Final = "final.json"
_WATCHED: Final = "watched.json"
#: Steps from a decision to its kernels, where they are not waited for.
_COMPILE_STEPS: Final = 5
_NAN_STEP: Final = 34
_CULL_STEP: Final = 57
_SECONDS: Final = 120.0
#: What says how long something took, and what only the live run can say.
_CLOCKS: Final = ("seconds", "cpu_seconds", "growth_cpu_seconds", "growth_seconds")


def _scenario(optimizer: Mapping[str, Any], *, wait: bool, every: int) -> EsperConfig:
    return config_of(
        model={"widths": [3, 3, 3]},
        training={
            "epochs": 9,
            "device": "cpu",
            "optimizer": optimizer,
            "checkpoint_every_epochs": every,
        },
        growth={
            "window": [0.1, 0.7],
            "decisions": 2,
            "wait_for_kernel": wait,
            "isolation_steps": 6,
            "blend_steps": 6,
            "stabilization_steps": 3,
            "fine_tuning_steps": 4,
            "evaluation": {"threshold": -100.0, "min_epochs": 1},
        },
    )


SCENARIOS: Final = {
    "sgd": _scenario({"learning_rate": 0.2}, wait=False, every=1),
    "awaited": _scenario({"learning_rate": 0.2}, wait=True, every=1),
    "adamw": _scenario({"name": "adamw", "learning_rate": 0.01}, wait=False, every=3),
}


@dataclass(frozen=True, slots=True)
class Kill:
    """Where a run dies: ``where`` is a step, ``seed:STATE``, a number of journal lines, or the step of a checkpoint."""

    scenario: str
    kind: str
    where: str
    states: tuple[str, ...]


# ---- in the process that dies ----------------------------------------------------------------------------------------


def _plan(observation: observation_pb2.Observation) -> Sequence[tuple[str, Blueprint, int]]:
    if observation.decisions_left > 1:
        return (("span:groups.2", BRANCH, 2), ("groups.0.conv1", WIDEN, 2))
    return (("groups.1.conv1", WIDEN, 2),)


class RoteMesh(ScriptedMesh):
    """Kernels come at a step, and so does a caller: what a run hears from outside does not depend on who runs it."""

    trainer: TolariaTrainer
    on_await: Any = None

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        request = super().obtain_kernel(target)
        assert isinstance(request, ReadyKernel)
        due = max(record.germinated_step for record in self.trainer.engine.seeds()) + _COMPILE_STEPS
        request._ready = lambda: self.trainer.step >= due
        answer = request._answer

        def awaited() -> str:
            if self.on_await is not None:
                self.on_await()
            return answer()

        request._answer = awaited
        return request

    def commands(self) -> Sequence[Command]:
        if self.trainer.step != _CULL_STEP:
            return ()
        return (Command(command_id="a-caller", kind=CommandKind.CULL, seed="seed-3", reason="by rote"),)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(trainer: TolariaTrainer, mesh: RoteMesh, kill: Kill) -> None:
    """Let the process die where ``kill`` says."""
    if kill.kind == "step":
        _before_step(trainer, lambda step: _die() if step == int(kill.where) else None)
    elif kill.kind == "state":
        move, (seed, state) = GrowthEngine._move, kill.where.split(":")

        def moving(self: GrowthEngine, seed_id: str, to: SeedState, *arguments: Any, **changes: Any) -> Any:
            transition = move(self, seed_id, to, *arguments, **changes)
            if (seed_id, to.value) == (seed, state):
                _die()
            return transition

        setattr(GrowthEngine, "_move", moving)  # noqa: B010 - for mypy a method is no place to assign to; this process exists to die there
    elif kill.kind == "journal":
        append = trainer.journal.append

        def appending(*arguments: Any) -> Any:
            entry = append(*arguments)
            if trainer.journal.position == int(kill.where):
                _die()
            return entry

        setattr(trainer.journal, "append", appending)  # noqa: B010 - as above
    elif kill.kind == "await":
        mesh.on_await = _die
    else:
        write, name = checkpoint._write, f".{int(kill.where):08d}.tmp"

        def writing(path: Path, content: bytes) -> None:
            dying = path.parent.name == name
            write(path, content[: len(content) // 2] if dying else content)
            if dying:
                _die()

        checkpoint._write = writing  # as above


def _before_step(trainer: TolariaTrainer, look: Any) -> None:
    original = trainer.train_step

    def stepping() -> None:
        look(trainer.step)
        original()

    trainer.train_step = stepping  # type: ignore[method-assign]  # a look between two steps


def _poison(trainer: TolariaTrainer) -> None:
    """The loss is NaN at one step of a run that was never rolled back."""
    governor = trainer.governor
    observe = governor.observe_loss

    def observing(loss: float) -> Any:
        bad = trainer.step == _NAN_STEP and governor.rollbacks == 0
        return observe(float("nan") if bad else loss)

    governor.observe_loss = observing  # type: ignore[method-assign]  # a fault, the same in each life


def live(folder: Path, scenario: str, kill: Kill | None, resume: bool) -> None:
    """One life of a run; to its end if nothing kills it."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    harness = Harness(folder, SCENARIOS[scenario], _plan)
    first = harness.trainer()
    shelf = first.shelf
    assert shelf is not None
    first.journal.close()
    mesh = RoteMesh(_plan, harness.keys, shelf)
    trainer = harness.trainer(mesh=mesh, shelf=shelf)
    mesh.trainer = trainer
    if scenario == "adamw":
        _poison(trainer)
    if kill is not None:
        _arm(trainer, mesh, kill)
    watched: dict[int, list[str]] = {}
    _before_step(trainer, lambda step: watched.update({step: _states(trainer)}))
    if resume:
        trainer.resume()
    result = trainer.train()
    trainer.journal.close()
    (folder / _WATCHED).write_text(json.dumps([watched, _entered(trainer)]))
    (folder / _FINAL).write_text(json.dumps(_portrait(trainer, result, folder)))


def _path(record: Any) -> str:
    return "branch" if record.slot.startswith("span:") else "widen"


def _states(trainer: TolariaTrainer) -> list[str]:
    return sorted({f"{_path(record)}:{record.state}" for record in trainer.engine.seeds()})


def _entered(trainer: TolariaTrainer) -> list[tuple[str, str]]:
    records = {record.seed: record for record in trainer.engine.seeds()}
    lines = [json.loads(line) for line in (trainer.folder / "events.jsonl").read_text().splitlines()]
    return [
        (f"{line['seed']}:{line['to_state']}", f"{_path(records[line['seed']])}:{line['to_state']}")
        for line in lines
        if "to_state" in line
    ]


def _portrait(trainer: TolariaTrainer, result: ArmResult, folder: Path) -> dict[str, Any]:
    """All that two equal runs share."""
    tensors = {**trainer.model.state_dict(), **{f"optimizer/{k}": v for k, v in trainer.optimizer.state().items()}}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "tensors": {name: _digest(tensor) for name, tensor in tensors.items()},
        "random": _digest(torch.get_rng_state()),
        "seeds": [{**asdict(record), "state": str(record.state)} for record in trainer.engine.seeds()],
        "penalties": {slot.name: trainer.engine.penalties(slot.name) for slot in trainer.engine.slots()},
        "result": {name: value for name, value in asdict(result).items() if name not in _CLOCKS},
        "rollbacks": trainer.governor.rollbacks,
        "governor": trainer.governor.state(),
        "story": trainer.coordinator.state() | {"traces": {}},
        "metrics": [{name: value for name, value in line.items() if name not in _CLOCKS} for line in metrics],
        "lineage": json.loads((folder / "lineage.json").read_text()),
        "journal": [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()],
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


# ---- in the process that kills ---------------------------------------------------------------------------------------


class Children:
    """Lives in processes of their own. Forked: torch is loaded once, and no thread of it was started here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context = multiprocessing.get_context("fork")

    def live(self, name: str, scenario: str, kill: Kill | None = None, *, resume: bool = False) -> Path:
        """One life in the folder ``name``; fails if it ends otherwise than it should."""
        folder = self._folder / name
        folder.mkdir(exist_ok=resume)
        child: BaseProcess = self._context.Process(target=live, args=(folder, scenario, kill, resume))
        child.start()
        child.join(_SECONDS)
        if child.is_alive():
            child.kill()
        expected = 0 if kill is None else -signal.SIGKILL
        assert child.exitcode == expected, f"{name}: {kill} ended with {child.exitcode}"
        return folder


def choose(watched: Mapping[str, Path], kills: int, seed: int) -> list[Kill]:
    """Kill points: every state of each scenario first, then others at random."""
    generator = random.Random(seed)
    must: list[Kill] = []
    others: list[Kill] = []
    for scenario, folder in watched.items():
        steps, entered = json.loads((folder / _WATCHED).read_text())
        # The latest first, so that a state that is met twice is one choice.
        must += [Kill(scenario, "state", where, (state,)) for where, state in dict(map(tuple, entered)).items()]
        by_state: dict[str, list[str]] = {}
        for step, states in steps.items():
            for state in states:
                by_state.setdefault(state, []).append(step)
        for state in sorted(by_state):
            step = generator.choice(by_state[state])
            others.append(Kill(scenario, "step", step, tuple(steps[step])))
        journal = len((folder / "journal.jsonl").read_text().splitlines())
        others += [Kill(scenario, "journal", str(number), ()) for number in range(1, journal + 1)]
        saved = sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))
        others += [Kill(scenario, "checkpoint", str(step), ()) for step in saved]
        if SCENARIOS[scenario].growth.wait_for_kernel:
            others.append(Kill(scenario, "await", "", ("branch:GERMINATED", "widen:GERMINATED")))
    generator.shuffle(must)
    generator.shuffle(others)
    # Each kind of path and state once, then the rest by turns.
    seen: set[tuple[str, ...]] = set()
    first = [kill for kill in must if not (kill.states in seen or seen.add(kill.states))]  # type: ignore[func-returns-value]  # add() gives None
    rest = [*others, *(kill for kill in must if kill not in first)]
    chosen = [*first, *rest][:kills]
    while len(chosen) < kills:
        scenario = generator.choice(sorted(watched))
        steps, _ = json.loads((watched[scenario] / _WATCHED).read_text())
        step = generator.choice(sorted(steps))
        chosen.append(Kill(scenario, "step", step, tuple(steps[step])))
    return chosen


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the ends of two runs."""
    left, right = (json.loads((folder / _FINAL).read_text()) for folder in (one, other))
    return [name for name in left if left[name] != right[name]]


def run(folder: Path, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    """The killed runs, one by one."""
    children = Children(folder)
    twins = {name: children.live(f"twin-{name}", name) for name in SCENARIOS}
    again = children.live("again", "sgd")
    assert differences(again, twins["sgd"]) == [], "the same run twice is not the same: nothing can be compared"
    for number, kill in enumerate(choose(twins, kills, seed)):
        children.live(f"{number}", kill.scenario, kill)
        resumed = children.live(f"{number}", kill.scenario, resume=True)
        yield {**asdict(kill), "different": differences(resumed, twins[kill.scenario])}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the generator that draws where runs are killed")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="esper-resume-") as folder:
        found = list(run(Path(folder), arguments.kills, arguments.seed))
    kinds: Counter[str] = Counter()
    states: Counter[str] = Counter()
    for kill in found:
        kinds[kill["kind"]] += 1
        states.update(kill["states"])
    exact = sum(not kill["different"] for kill in found)
    result = {
        "exact": exact,
        "of": len(found),
        "holds": exact == len(found),
        "kinds": dict(sorted(kinds.items())),
        "states": dict(sorted(states.items())),
        "kills": found,
        "method": __doc__,
        "environment": measure.environment(),
    }
    rows = [
        ("resumed exactly", f"{exact} of {len(found)}"),
        ("killed", json.dumps(result["kinds"])),
        ("in states", json.dumps(result["states"])),
        ("different", json.dumps([kill for kill in found if kill["different"]])),
    ]
    measure.publish(arguments.out, result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

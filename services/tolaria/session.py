"""One run from its configuration to its summary: the grown arm, the export, the controls.

What is finished is kept in ``arms.json``, so that a run that dies while a control trains does not touch the grown
network's test set a second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

# The first optimizer loads it, which takes a second or more: better while the services come up.
import torch._dynamo

from esper.tolaria.v1 import run_pb2
from services.chassis.config.schema import EsperConfig
from services.chassis.files import write_atomically
from services.chassis.telemetry import Telemetry
from services.kasmina.lifecycle import SeedState
from services.kasmina.model import SeedRecord
from services.tolaria import controls, device, models, observation, task
from services.tolaria.accounting import BUDGET, CACHE, FLOPS, TRAINING_FACTOR, breakdown
from services.tolaria.adaptation import AdaptationCoordinator
from services.tolaria.checkpoint import CheckpointStore
from services.tolaria.data import splits
from services.tolaria.export import changes
from services.tolaria.exporting import Exports
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.journal import Journal
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.mesh_link import MeshLink
from services.tolaria.ports import AskingMesh, Mesh, OfflineMesh
from services.tolaria.progress import GROWN, ProgressWriter, StatusProgress, finite
from services.tolaria.reporting import RunReporter, contribution_json
from services.tolaria.trainer import TolariaTrainer
from services.tolaria.verdict import paired_difference

ARMS_FILE: Final = "arms.json"
_ARMS: Final = (GROWN, "host", "bigger", "uniform")
_SHOWN_CHANGE: Final = ("path", "operation", "before_shape", "after_shape")


class Session:
    """A run that is about to train; made while the services still come up.

    Raises what the data set and the host raise: DataError, ModelError, FactoryError.
    """

    def __init__(
        self,
        config: EsperConfig,
        run_dir: Path,
        *,
        progress: ProgressWriter,
        interrupt: Interrupt,
        telemetry: Telemetry,
        mesh: MeshLink,
        resume: bool,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._run = run_dir.name
        self._progress = progress
        self._interrupt = interrupt
        self._telemetry = telemetry
        self._resume = resume
        self._device = device.choose(config.training)
        self._data = splits.load(config.data, config.run.seed, task.load(config.task)).to(self._device)
        # Once, so that a wrong host or task is told of before anything is started; each arm builds its own host.
        self._data.check_task(self._build_host().to(self._device), config.data.batch_size)
        self._mesh = mesh
        self._shelf = mesh.shelf
        self._exports = Exports(
            config,
            run_dir,
            self._data,
            lambda seed: models.build_host(config.model, self._data, seed),
            progress=progress,
            interrupt=interrupt,
        )
        self._done: dict[str, Any] = self._read_arms() if resume else {}

    def run(self) -> dict[str, Any]:
        """Train all that is to be trained; returns the summary.

        Raises TrainingInterruptedError for a signal; a caller's StopRun ends in a summary with status "stopped".
        """
        # It has loaded beside us: there is nothing to wait for, but on a machine that is busy with something else.
        self._mesh.until_ready(self._config.services.startup_timeout_seconds)
        return self._all_arms(self._mesh)

    def _all_arms(self, mesh: Mesh) -> dict[str, Any]:
        trainer = self._trainer(GROWN, mesh, (self._run_dir / "journal.jsonl"))
        try:
            if GROWN not in self._done:
                self._train_grown(trainer)
            self._export_others()
            for name in self._config.compare:
                if name not in self._done:
                    self._train_control(name, trainer, mesh)
        except TrainingInterruptedError as interruption:
            if not self._interrupt.asked_by_caller:
                raise
            return self._summary(trainer, mesh, "stopped", str(interruption))
        except BaseException as error:
            trainer.reporter.state(run_pb2.RUN_STATE_FAILED, str(error))
            raise
        trainer.reporter.state(run_pb2.RUN_STATE_SUCCEEDED, "ended as planned")
        return self._summary(trainer, mesh, "succeeded", "")

    def _train_grown(self, trainer: TolariaTrainer) -> None:
        if self._resume:
            trainer.resume()
        began = f"training from step {trainer.step} of {trainer.total_steps}"
        self._progress.write(StatusProgress(state="training", message=began))
        self._keep(GROWN, trainer)
        self._done["changes"] = changes(trainer.engine)
        self._done["growth"] = _growth_summary(trainer, self._shelf)
        self._done["export"] = self._exports.network(trainer.engine)
        self._write_arms()

    def _export_others(self) -> None:
        """Formats that are made of the network's export, which is on disk: also of a run that was cut off here."""
        made = self._done.get("export")
        if made is not None and (now := self._exports.others(made)) != made:
            self._done["export"] = now
            self._write_arms()

    def _train_control(self, name: controls.ControlName, run: TolariaTrainer, mesh: Mesh) -> None:
        self._progress.write(StatusProgress(state="comparing", message=f"training the control {name}"))
        grown = self._done[GROWN]
        config = controls.config_for(name, self._config, host_flops=run.host_flops, final_flops=grown["flops"])
        steps: int | None = None
        if self._config.compare_at == "flops" and name != "uniform":
            forward = run.host_flops if name == "host" else grown["flops"]
            spent = grown["training_flops"] + grown["growth_flops"]
            steps = controls.steps_for(spent, forward, self._config.data.batch_size)

        def build_host() -> torch.nn.Module:
            return models.build_host(config.model, self._data, config.run.seed)

        grows = name == "uniform" and config.growth.enabled
        trainer = self._trainer(
            name,
            AskingMesh(mesh) if grows else OfflineMesh(),
            self._run_dir / f"journal-{name}.jsonl",
            epochs=config.training.epochs if steps is None else -(-steps // run.batches.per_epoch),
            config=config,
            # Tamiyo keeps its decisions as another run's.
            run=f"{self._run}-{name}",
            build_host=controls.builder(name, build_host, self._done["changes"], config.run.seed),
            grow=grows,
            shelf=self._shelf if grows else None,
            total_steps=steps,
            grafts=dict(self._done["growth"]["grafts"]) if grows else None,
        )
        self._keep(name, trainer)
        self._write_arms()

    def _build_host(self) -> torch.nn.Module:
        return models.build_host(self._config.model, self._data, self._config.run.seed)

    def _trainer(
        self, arm: str, mesh: Mesh, journal: Path, epochs: int | None = None, **changes: Any
    ) -> TolariaTrainer:
        grown = arm == GROWN
        if not self._resume or not grown:
            journal.unlink(missing_ok=True)
        training = self._config.training
        reporter = RunReporter(
            run=self._run,
            arm=arm,
            folder=self._run_dir,
            epochs=epochs or training.epochs,
            mesh=mesh,
            progress=self._progress,
        )
        arguments: dict[str, Any] = {
            "config": self._config,
            "data": self._data,
            "arm": arm,
            "run": self._run,
            "folder": self._run_dir,
            "build_host": self._build_host,
            "grow": grown and self._config.growth.enabled,
            "mesh": mesh,
            "journal": Journal(journal),
            "checkpoints": CheckpointStore(self._run_dir / "checkpoints", training.checkpoint_keep) if grown else None,
            "shelf": self._shelf if grown else None,
            "reporter": reporter,
            "telemetry": self._telemetry,
            "interrupt": self._interrupt,
            "device": self._device,
        }
        return TolariaTrainer(**{**arguments, **changes})

    # ---- what is finished ------------------------------------------------------------------------------------------

    def _read_arms(self) -> dict[str, Any]:
        path = self._run_dir / ARMS_FILE
        return dict(json.loads(path.read_bytes())) if path.exists() else {}

    def _write_arms(self) -> None:
        write_atomically(self._run_dir / ARMS_FILE, json.dumps(finite(self._done), indent=1) + "\n")

    def _keep(self, name: str, trainer: TolariaTrainer) -> None:
        """Train an arm to its end and keep its result, with its score on each image of the test set."""
        result = asdict(trainer.train())
        if not trainer.grow:
            # There was no growth whose time could have been measured; its FLOPs are counted, and none.
            result |= dict.fromkeys(("growth_cpu_seconds", "growth_seconds"))
        self._done[name] = result
        assert trainer.test is not None, "an arm that was trained was tested"
        self._done.setdefault("scores", {})[name] = trainer.test.packed()

    def _comparisons(self, arms: Iterable[str]) -> dict[str, Any]:
        """How much better the grown network is than each control, on the same test images."""
        scores = {name: [float(score) for score in packed] for name, packed in self._done.get("scores", {}).items()}
        return {name: asdict(paired_difference(scores[GROWN], scores[name])) for name in arms if name != GROWN}

    def _summary(self, trainer: TolariaTrainer, mesh: Mesh, status: str, reason: str) -> dict[str, Any]:
        """What scripts rely on; what was not measured is null."""
        arms = {name: self._done[name] for name in _ARMS if name in self._done}
        growth = self._done.get("growth") or _growth_summary(trainer, self._shelf)
        counts = mesh.event_counts()
        grown: dict[str, Any] = arms.get(GROWN, {})
        return {
            "run_id": self._run,
            "run_dir": str(self._run_dir),
            "status": status,
            "reason": reason,
            "epochs": growth["epochs"],
            "adaptations": growth["adaptations"],
            "seeds": growth["seeds"],
            "parameters": {"host": trainer.host_parameters, "final": growth["parameters"]},
            "flops": breakdown(grown, growth["culled_flops"]) if grown else dict.fromkeys(FLOPS),
            "accuracy": {name: arms.get(name, {}).get("test_accuracy") for name in _ARMS},
            "comparisons": self._comparisons(arms),
            "start_accuracy": grown.get("start_accuracy"),
            "compare_at": self._config.compare_at,
            "events": {"published": counts.published, "dropped": counts.dropped},
            "arms": arms,
            "growth_seconds": grown.get("growth_seconds"),
            "rollbacks": growth["rollbacks"],
            "rewinds": growth["rewinds"],
            "budget": growth["budget"],
            "kernel_cache": growth["kernel_cache"],
            "changes": [{key: change[key] for key in _SHOWN_CHANGE} for change in self._done.get("changes", [])],
            "export": self._done.get("export"),
        }


def _budget_summary(trainer: TolariaTrainer) -> dict[str, Any]:
    if (limit := trainer.limit) is None:
        return dict.fromkeys(BUDGET)
    hosts = {"flops": trainer.host_flops, "parameters": trainer.host_parameters}
    host = trainer.latency.host if trainer.latency is not None else hosts[limit.kind]
    final = observation.spent(limit, trainer.latency, trainer.engine.cost_terms(), trainer.engine.slots())
    return dict(zip(BUDGET, (limit.kind, limit.value, host, final), strict=True))


def _growth_summary(trainer: TolariaTrainer, shelf: KernelShelf) -> dict[str, Any]:
    cache = shelf.stats()
    records = trainer.engine.seeds()
    ends = [record.outcome for record in records]
    culled = sum(record.flops * trainer.coordinator.trial_steps(record) for record in records)
    return {
        "epochs": trainer.epoch,
        "parameters": trainer.parameter_count(),
        "rollbacks": trainer.governor.rollbacks,
        "rewinds": trainer.rewinds,
        "budget": _budget_summary(trainer),
        "kernel_cache": {name: getattr(cache, name) for name in CACHE},
        "adaptations": {
            "started": len(records),
            "fossilized": ends.count(SeedState.FOSSILIZED),
            "culled": ends.count(SeedState.CULLED),
        },
        "grafts": [(record.germinated_step, record.birth_step) for record in records if record.birth_step is not None],
        "culled_flops": float(TRAINING_FACTOR * trainer.batches.batch_size * culled),
        "seeds": [_seed_summary(record, trainer.coordinator) for record in records],
    }


def _seed_summary(record: SeedRecord, coordinator: AdaptationCoordinator) -> dict[str, Any]:
    return {
        "seed": record.seed,
        "slot": record.slot,
        "blueprint": record.blueprint,
        "family": record.family,
        "size": record.size,
        "state": (record.outcome or record.state).value,
        "contribution": contribution_json(record.contribution),
        "decision": coordinator.decision(record),
        "plan_contribution": contribution_json(record.plan_contribution),
        "reason": coordinator.reason(record),
    }

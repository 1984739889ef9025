"""One run of one arm through Tolaria's own trainer, and what is kept of it."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from services.blueprints import families
from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import setup
from services.kasmina.lifecycle import SeedState
from services.tolaria import controls, models
from services.tolaria.data.batches import Batch, Batches
from services.tolaria.data.splits import DataSet, Split
from services.tolaria.evaluation import evaluate
from services.tolaria.interrupt import Interrupt
from services.tolaria.journal import Journal
from services.tolaria.ports import Mesh, OfflineMesh
from services.tolaria.progress import ProgressWriter
from services.tolaria.reporting import DECISIONS_FILE, METRICS_FILE, RunReporter
from services.tolaria.task import Classification
from services.tolaria.trainer import ArmResult, TolariaTrainer
from tests.benchmarks.growth import hosts
from tests.benchmarks.growth.arms import ARMS, Record, Unit, rate_of
from tests.benchmarks.growth.protocol import Entry
from tests.benchmarks.growth.services import Services

#: Nothing in a benchmark may depend on how busy the machine is.
_PATIENCE_SECONDS: Final = 60.0
_LATENCY_STEPS: Final = 15
#: Points of validation accuracy that a seed must be worth to stay: the default, and what every seed is worth.
_CULLED_BELOW: Final = 0.0
_NEVER_CULLED: Final = -1000.0
#: Rows and columns of a batch that its hash sees.
_HASHED_EVERY: Final = 8
#: Reads the test set, where that is allowed.
TestReader = Callable[[], Split]


class UnitFailedError(RuntimeError):
    """A run did not go as its arm says (no decision, no kernel): its figures would stand for something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All that a run needs to know. ``given`` are the records of the runs it waits for, by role."""

    entry: Entry
    unit: Unit
    given: Mapping[str, Record]
    folder: Path
    weights: Path | None = None
    save_weights: Path | None = None
    probe_factor: float = 1.25


class HashedBatches(Batches):
    """Batches that remember what was trained on: labels and a grid of pixels of every batch, as it was handed out."""

    seen: dict[tuple[int, int], bytes]

    @classmethod
    def beside(cls, batches: Batches) -> HashedBatches:
        """The same batches."""
        made = cls.__new__(cls)
        made.__dict__.update(batches.__dict__)
        made.seen = {}
        return made

    def at(self, epoch: int, step_in_epoch: int) -> Batch:
        """See ``Batches``."""
        batch = super().at(epoch, step_in_epoch)
        grid = batch.images[..., ::_HASHED_EVERY, ::_HASHED_EVERY].contiguous()
        self.seen[epoch, step_in_epoch] = hashlib.sha256(_bytes(batch.labels) + _bytes(grid)).digest()
        return batch

    def by_epoch(self) -> list[str]:
        """One hash for each epoch, the last may be cut short."""
        epochs = sorted({epoch for epoch, _ in self.seen})
        steps = {epoch: sorted(key for key in self.seen if key[0] == epoch) for epoch in epochs}
        whole = [epoch for epoch in epochs if len(steps[epoch]) == self.per_epoch]
        return [hashlib.sha256(b"".join(self.seen[key] for key in steps[epoch])).hexdigest()[:16] for epoch in whole]


class Mirrored(nn.Module):
    """The mean of the logits of an image and of its mirror image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to [N, classes]."""
        both: Tensor = (self.model(images) + self.model(images.flip(-1))) / 2
        return both


def settle() -> None:
    """Make this process compute what any other computes: one thread, deterministic kernels."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made so late by torch


def config_of(
    entry: Entry, unit: Unit, data_dir: Path | None, *, policy: str, factor: Mapping[str, float]
) -> EsperConfig:
    """The run's configuration. ``factor`` is its budget as a multiple of the host's cost."""
    recipe, growth = entry.recipe, entry.growth
    return EsperConfig.model_validate(
        {
            "run": {"seed": unit.seed},
            "data": {
                "name": recipe.data,
                "data_dir": data_dir,
                "validation_ratio": recipe.validation_ratio,
                "batch_size": recipe.batch_size,
                "flip": recipe.flip,
                "translate": recipe.translate,
                "limit": recipe.limit,
            },
            "training": {
                "epochs": recipe.epochs,
                "device": "cpu",
                "threads": 1,
                "precision": recipe.precision,
                "optimizer": {
                    "name": "sgd",
                    "learning_rate": rate_of(entry, unit),
                    "weight_decay": recipe.weight_decay,
                    "warmup_ratio": recipe.warmup_ratio,
                    "label_smoothing": recipe.label_smoothing,
                },
            },
            "growth": {
                "policy": policy,
                "window": growth.window,
                "decisions": growth.decisions,
                "budget": factor or {"flops": 2.0},
                "max_factor": growth.max_factor,
                "blueprints": [one.id for one in families.builtin_blueprints() if one.family == "widen"],
                "health_samples": growth.health_samples,
                "decision_deadline_seconds": _PATIENCE_SECONDS,
                "wait_for_kernel": True,
                "evaluation": {
                    "min_epochs": growth.min_epochs,
                    "threshold": _CULLED_BELOW if growth.culls else _NEVER_CULLED,
                },
            },
            "telemetry": {"traces": "off"},
        }
    )


def run(
    order: Order,
    data: DataSet,
    services: Services,
    *,
    data_dir: Path | None = None,
    read_test: TestReader | None = None,
    progress: ProgressWriter | None = None,
) -> dict[str, Any]:
    """Train ``order`` and judge it; ``read_test`` None leaves the test accuracy unmeasured.

    The trainer never sees the test set: what it takes for it is the validation split.
    Raises UnitFailedError, and what training raises.
    """
    settle()
    began = time.perf_counter()
    data = replace(data, read_test=lambda: data.validation)
    runner = _Run(order, data, services, data_dir, progress or ProgressWriter(_Nobody()))
    trainer, result, more = runner.train()
    judge = _judge_of(order.entry, data)
    record = {
        "entry": order.unit.entry,
        "arm": order.unit.arm,
        "seed": order.unit.seed,
        "rate": rate_of(order.entry, order.unit),
        "validation_accuracy": judge(trainer.model, data.validation),
        # Once: this line is the only one that reads it.
        "test_accuracy": None if read_test is None else judge(trainer.model, read_test()),
        **_figures(trainer, result),
        **more,
        "latency_ms": _latency(trainer),
        "wall_seconds": time.perf_counter() - began,
    }
    if order.save_weights is not None:
        save_file(
            {name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}, order.save_weights
        )
    return record


class _Nobody:
    def send(self, message: Mapping[str, Any]) -> bool:
        return True


class _Run:
    """The way from an order to a trained network."""

    def __init__(
        self, order: Order, data: DataSet, services: Services, data_dir: Path | None, progress: ProgressWriter
    ) -> None:
        self.order = order
        self.entry = order.entry
        self.arm = ARMS[order.unit.arm]
        self.data = data
        self.services = services
        self.data_dir = data_dir
        self.progress = progress

    def train(self) -> tuple[TolariaTrainer, ArmResult, dict[str, Any]]:
        """The trainer at its end, its result and what else to keep."""
        if self.arm.kind == "sweep":
            return self._sweep()
        return self._grown() if self.arm.kind == "grown" else self._static()

    def _static(self) -> tuple[TolariaTrainer, ArmResult, dict[str, Any]]:
        widths = self.entry.network.widths
        if self.arm.shape == "target":
            widths = _target(self.entry)
        elif self.arm.shape == "final":
            widths = tuple(self.order.given["follows"]["widths"])
        elif self.arm.shape == "probe":
            widths = probed(self.entry, self.arm.layer, self.order.probe_factor, self.data)
        flops = hosts.forward_flops(self.entry, widths, self.data)
        trainer = self._trainer(OfflineMesh(), widths, steps=self._steps(flops))
        return trainer, trainer.train(), {}

    def _steps(self, forward_flops: int) -> int | None:
        followed = self.order.given.get("follows")
        if self.arm.length == "epochs" or followed is None:
            return None
        if self.arm.length == "flops":
            spent = followed["training_flops"] + followed["growth_flops"]
            return controls.steps_for(spent, forward_flops, self.entry.recipe.batch_size)
        timed = self.order.given["timed_by"]
        return max(1, round(float(timed["steps"] * followed["cpu_seconds"] / timed["cpu_seconds"])))

    def _sweep(self) -> tuple[TolariaTrainer, ArmResult, dict[str, Any]]:
        """Several static shapes that cost together what the run they follow cost; the best by validation is kept."""
        followed = self.order.given["follows"]
        share = (followed["training_flops"] + followed["growth_flops"]) / len(self.entry.sweep)
        judge = _judge_of(self.entry, self.data)
        tried: list[tuple[float, TolariaTrainer, ArmResult]] = []
        for index, widths in enumerate(self.entry.sweep):
            flops = hosts.forward_flops(self.entry, widths, self.data)
            steps = controls.steps_for(share, flops, self.entry.recipe.batch_size)
            trainer = self._trainer(OfflineMesh(), widths, steps=steps, name=f"shape-{index}")
            result = trainer.train()
            tried.append((judge(trainer.model, self.data.validation), trainer, result))
        accuracies = [accuracy for accuracy, _, _ in tried]
        chosen = accuracies.index(max(accuracies))
        results = [result for _, _, result in tried]
        whole = replace(
            results[chosen],
            training_flops=sum(result.training_flops for result in results),
            cpu_seconds=sum(result.cpu_seconds for result in results),
        )
        shapes = [
            {"widths": list(widths), "validation_accuracy": accuracy}
            for widths, accuracy in zip(self.entry.sweep, accuracies, strict=True)
        ]
        return tried[chosen][1], whole, {"sweep": shapes, "chosen": chosen}

    def _grown(self) -> tuple[TolariaTrainer, ArmResult, dict[str, Any]]:
        policy = "policies/utilization@1"
        if self.arm.policy is not None:
            policy = self.services.policy(self.arm.policy, self._parameters())
        config = self._config(policy)
        telemetry = setup("training", config.telemetry, None, None)
        shelf = self.services.shelf(self.order.folder)
        # Tamiyo answers a run's request once: every run has a name of its own.
        name = self.order.unit.name.replace(".", "-")
        with self.services.mesh(config, name, shelf, telemetry) as mesh:
            trainer = self._trainer(
                mesh, self.entry.network.widths, config=config, grow=True, shelf=shelf, run=name, telemetry=telemetry
            )
            if self.arm.policy is None:
                trainer.decision_epochs = []
            result = trainer.train()
        telemetry.shutdown()
        return trainer, result, self._growth(trainer)

    def _parameters(self) -> dict[str, Any]:
        """Those of the arm's policy that are not its defaults."""
        if self.arm.donor is not None:
            return {"plans": list(self.order.given["donor"]["plans"])}
        return {"least_need": self.entry.growth.least_need} if self.arm.measures else {}

    def _growth(self, trainer: TolariaTrainer) -> dict[str, Any]:
        """What grew; raises UnitFailedError for what kept the arm from being itself."""
        decisions = _lines(self.order.folder / DECISIONS_FILE)
        if len(decisions) != len(trainer.decision_epochs) or any(line["decision"] is None for line in decisions):
            raise UnitFailedError(f"{self.order.unit.name}: a decision is missing: {decisions}")
        records = trainer.engine.seeds()
        if any(record.outcome is SeedState.CANCELLED for record in records):
            raise UnitFailedError(f"{self.order.unit.name}: a kernel never came: {[r.reason for r in records]}")
        if not self.entry.growth.culls and any(record.outcome is not SeedState.FOSSILIZED for record in records):
            raise UnitFailedError(f"{self.order.unit.name}: a seed did not stay: {[r.reason for r in records]}")
        return {
            "plans": [{change["slot"]: change["size"] for change in line["plan"]} for line in decisions],
            "decision_epochs": trainer.decision_epochs,
            "seeds": [
                {
                    "slot": record.slot,
                    "size": record.size,
                    "epoch": record.germinated_epoch,
                    "outcome": record.outcome.value if record.outcome is not None else None,
                    "contribution": None if record.contribution is None else asdict(record.contribution),
                }
                for record in records
            ],
        }

    def _config(self, policy: str) -> EsperConfig:
        entry, factor = self.entry, {}
        if self.arm.kind == "grown":
            own = entry.network.widths
            if entry.growth.target_parameters is not None:
                limit, cost = float(entry.growth.target_parameters), float(hosts.parameters(entry, own, self.data))
                factor = {"parameters": limit / cost}
            else:
                target = hosts.forward_flops(entry, _target(entry), self.data)
                factor = {"flops": target / hosts.forward_flops(entry, own, self.data)}
        config = config_of(entry, self.order.unit, self.data_dir, policy=policy, factor=factor)
        if self.arm.trained:
            model = config.model.model_copy(update={"weights": self.order.weights})
            config = config.model_copy(update={"model": model})
        return config

    def _trainer(
        self,
        mesh: Mesh,
        widths: tuple[int, ...],
        *,
        config: EsperConfig | None = None,
        steps: int | None = None,
        name: str = "",
        **changes: Any,
    ) -> TolariaTrainer:
        config = config or self._config("policies/utilization@1")
        folder = self.order.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        arm, seed = self.order.unit.arm, self.order.unit.seed
        weights = config.model.weights

        def build_host() -> nn.Module:
            model = hosts.build(self.entry, widths, self.data, seed)
            if weights is not None:
                models.load_weights(model, weights)
            return model

        reporter = RunReporter(
            run=changes.get("run", arm),
            arm=arm,
            folder=folder,
            epochs=config.training.epochs,
            mesh=mesh,
            progress=self.progress,
        )
        arguments: dict[str, Any] = {
            "config": config,
            "data": self.data,
            "arm": arm,
            "run": arm,
            "folder": folder,
            "build_host": build_host,
            "grow": False,
            "mesh": mesh,
            "journal": Journal(folder / "journal.jsonl"),
            "checkpoints": None,
            "shelf": None,
            "reporter": reporter,
            "telemetry": setup("training", config.telemetry, None, None),
            "interrupt": Interrupt(),
            "device": torch.device("cpu"),
            "total_steps": steps,
        }
        trainer = TolariaTrainer(**{**arguments, **changes})
        trainer.batches = HashedBatches.beside(trainer.batches)
        return trainer


def probed(entry: Entry, layer: int, factor: float, data: DataSet) -> tuple[int, ...]:
    """The host's widths with one layer as wide as ``factor`` times the host's forward FLOPs allow."""
    own = entry.network.widths
    cost = hosts.forward_flops(entry, own, data)
    # In a chain the cost is linear in the width of one layer.
    channel = hosts.forward_flops(entry, _wider(own, layer, 1), data) - cost
    return _wider(own, layer, int((factor - 1) * cost / channel))


def _wider(widths: tuple[int, ...], layer: int, by: int) -> tuple[int, ...]:
    return (*widths[:layer], widths[layer] + by, *widths[layer + 1 :])


def _target(entry: Entry) -> tuple[int, ...]:
    assert entry.growth.target_widths is not None, "an entry whose budget is in FLOPs names the widths they are of"
    return entry.growth.target_widths


def _judge_of(entry: Entry, data: DataSet) -> Callable[[nn.Module, Split], float]:
    def judge(model: nn.Module, split: Split) -> float:
        judged = Mirrored(model) if entry.recipe.mirror_when_judged else model
        objective = Classification(data.classes, 0.0)
        found = evaluate(judged, split, data.normalization, objective, batch_size=500, flops_per_sample=0)
        return found.accuracy

    return judge


def _figures(trainer: TolariaTrainer, result: ArmResult) -> dict[str, Any]:
    batches = trainer.batches
    assert isinstance(batches, HashedBatches), "every trainer here has them"
    epochs = _lines(trainer.folder / METRICS_FILE)
    return {
        "training_flops": result.training_flops,
        "growth_flops": result.growth_flops,
        "parameters": result.parameters,
        "forward_flops": result.flops,
        "steps": result.steps,
        "cpu_seconds": result.cpu_seconds,
        "growth_cpu_seconds": result.growth_cpu_seconds,
        "rollbacks": trainer.governor.rollbacks,
        "widths": list(hosts.widths_of(trainer.model)),
        "validation_accuracies": [line["validation_accuracy"] for line in epochs],
        "train_losses": [line["train_loss"] for line in epochs],
        "batches": batches.by_epoch(),
        "weights": digest(trainer.model),
    }


def digest(model: nn.Module) -> str:
    """SHA-256 of all tensors of the network, hex."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name}{tuple(tensor.shape)}".encode() + _bytes(tensor))
    return found.hexdigest()


def _latency(trainer: TolariaTrainer) -> float:
    """Median CPU milliseconds of a training step of the final network; comes last, as it moves its statistics."""
    spent = []
    trainer.model.train()
    for step in range(_LATENCY_STEPS):
        batch = trainer.batches.at(0, step % trainer.batches.per_epoch)
        began = time.thread_time()
        F.cross_entropy(trainer.model(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]  # torch
        spent.append(1e3 * (time.thread_time() - began))
    return statistics.median(spent)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

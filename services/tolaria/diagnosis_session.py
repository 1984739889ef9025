"""``train.py --diagnose`` in the training process: a few epochs of the host without growth, then a look at its layers.

No service is needed, the test set stays locked, and nothing is exported: what comes out is the diagnosis.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

# The first optimizer loads it; here, it is part of the start.
import torch._dynamo  # noqa: F401  # imported for what it loads
from torch import nn

from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import Telemetry
from services.tolaria import device, models, task
from services.tolaria.data import splits
from services.tolaria.diagnosis import Subject, assess
from services.tolaria.interrupt import Interrupt
from services.tolaria.journal import Journal
from services.tolaria.ports import OfflineMesh
from services.tolaria.progress import ProgressWriter, StatusProgress
from services.tolaria.reporting import RunReporter
from services.tolaria.trainer import TolariaTrainer

ARM: Final = "host"


def diagnose(
    config: EsperConfig, run_dir: Path, *, progress: ProgressWriter, interrupt: Interrupt, telemetry: Telemetry
) -> dict[str, Any]:
    """Train ``config``'s host for ``diagnose.epochs`` epochs and measure it; returns the diagnosis.

    Equal configurations give equal diagnoses on the same machine. Raises what the data set and the host raise
    (DataError, ModelError, FactoryError), TrainingInterruptedError and TrainingFailedError.
    """
    epochs = config.diagnose.epochs
    # A schedule of its own, warm-up to decay: ranks are those of weights that have come to rest.
    training = config.training.model_copy(update={"epochs": max(1, epochs)})
    trainer = _trainer(config.model_copy(update={"training": training}), run_dir, progress, interrupt, telemetry)
    if epochs:
        message = f"training the host for {epochs} epochs, without growth"
        progress.write(StatusProgress(state="training", message=message))
        trainer.learn()
    progress.write(StatusProgress(state="finishing", message="looking at its layers"))
    engine = trainer.engine
    found = trainer.judge()
    with trainer.averaged():
        health = engine.measure_health(trainer.health_batches())
    subject = Subject(
        epochs=epochs,
        validation_accuracy=found.accuracy,
        chance=100.0 * trainer.objective.chance,
        slots=engine.slots(),
        terms=engine.cost_terms(),
        refused=engine.refused(),
        health=health,
        training_flops=trainer.account.training_flops,
        measuring_flops=trainer.account.validation_flops + found.flops + health.flops,
    )
    return {"status": "succeeded", "reason": "", **assess(subject, max_factor=config.growth.max_factor)}


def _trainer(
    config: EsperConfig, run_dir: Path, progress: ProgressWriter, interrupt: Interrupt, telemetry: Telemetry
) -> TolariaTrainer:
    where = device.choose(config.training)
    data = splits.load(config.data, config.run.seed, task.load(config.task)).to(where)
    mesh = OfflineMesh()

    def build_host() -> nn.Module:
        return models.build_host(config.model, data, config.run.seed)

    data.check_task(build_host().to(where), config.data.batch_size)
    return TolariaTrainer(
        config=config,
        data=data,
        arm=ARM,
        run=run_dir.name,
        folder=run_dir,
        build_host=build_host,
        grow=False,
        mesh=mesh,
        journal=Journal(run_dir / "journal.jsonl"),
        checkpoints=None,
        shelf=None,
        reporter=RunReporter(
            run=run_dir.name,
            arm=ARM,
            folder=run_dir,
            epochs=config.training.epochs,
            mesh=mesh,
            progress=progress,
        ),
        telemetry=telemetry,
        interrupt=interrupt,
        device=where,
    )

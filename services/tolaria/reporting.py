"""Tells the story of a run: to the launcher, to the run folder, to the bus and to the gateways.

The run folder gets ``metrics.jsonl`` (one line per epoch and arm), ``decisions.jsonl``, ``events.jsonl`` (transitions,
rollbacks, states, in the order they happened, repeats after a crash included) and ``lineage.json``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esper.events.v1 import events_pb2
from esper.kasmina.v1 import seed_pb2
from esper.tolaria.v1 import run_pb2
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.kasmina.engine import GrowthEngine
from services.kasmina.kernel_cache import CacheStats
from services.kasmina.model import Contribution, HealthReport, SeedRecord, SeedTransition
from services.tolaria import observation
from services.tolaria.journal import Clock
from services.tolaria.names import run_name, seed_name
from services.tolaria.ports import CommandResult, Decision, Mesh, NoDecision
from services.tolaria.progress import (
    GROWN,
    DecisionProgress,
    EpochProgress,
    ProgressWriter,
    SeedProgress,
    StatusProgress,
    StepProgress,
    finite,
)

METRICS_FILE = "metrics.jsonl"
DECISIONS_FILE = "decisions.jsonl"
EVENTS_FILE = "events.jsonl"
LINEAGE_FILE = "lineage.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """Figures of one epoch of one arm; ``epoch`` counts finished ones from 1. Units as in EpochProgress."""

    arm: str
    epoch: int
    step: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    parameters: int
    flops: int
    training_flops: float
    growth_flops: float


def contribution_json(contribution: Contribution | None) -> dict[str, float] | None:
    """A counterfactual as JSON; None stays None."""
    return asdict(contribution) if contribution is not None else None


class RunReporter:
    """The witness of one arm. Only the grown arm talks to the bus and to the gateways (its mesh does)."""

    def __init__(self, *, run: str, arm: str, folder: Path, epochs: int, mesh: Mesh, progress: ProgressWriter) -> None:
        self._run = run
        self._arm = arm
        self._folder = folder
        self._epochs = epochs
        #: Steps of the whole schedule; the trainer knows.
        self.steps = 0
        self._mesh = mesh
        self._progress = progress
        #: Lines of the run folder's files that could not be written.
        self.lost_lines = 0
        self._transitions: dict[str, list[seed_pb2.SeedTransition]] = {}
        #: Seeds as they were written to the lineage last, and their text.
        self._lineage_lines: dict[str, tuple[dict[str, Any], str]] = {}
        self._picture = run_pb2.Run(
            name=run_name(run), epochs=epochs, run_dir=str(folder), start_time=observation.now()
        )

    # ---- the course of training ------------------------------------------------------------------------------------

    def rewind(self, step: int, *, decided: int = 0) -> None:
        """Forget the epochs and decisions after ``step``: the run goes on from there and will meet them again.

        Decisions until step ``decided`` it will not meet: they are kept.
        """
        for name, last in ((METRICS_FILE, step), (DECISIONS_FILE, max(step, decided))):
            path = self._folder / name
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if not self._ahead(line, last)]
            self._rewrite(name, "".join(kept))

    def _ahead(self, line: str, step: int) -> bool:
        try:
            content = json.loads(line)
        except ValueError:
            return True  # cut short by the crash
        return bool(content["arm"] == self._arm and content["step"] > step)

    def state(self, state: run_pb2.RunState.ValueType, reason: str) -> None:
        """The run is in another state now."""
        self._picture.state = state
        self._picture.reason = reason
        self._show_run()
        event = events_pb2.RunStateChanged(run=self._picture.name, state=state, reason=reason)
        self._mesh.publish("system.events.epoch", self._run, event)
        self._event("state", state=run_pb2.RunState.Name(state), reason=reason)

    def status(self, state: str, message: str, **detail: Any) -> None:
        """Tell the launcher what happens now."""
        self._progress.write(StatusProgress(state=state, message=message, detail=detail))

    def stepped(self, *, epoch: int, step: int, loss: float, rate: float, steps_per_second: float) -> None:
        """Where the loop is; called about once a second."""
        self._progress.write(
            StepProgress(
                arm=self._arm,
                epoch=epoch,
                step=step,
                steps=self.steps,
                loss=loss,
                learning_rate=rate,
                steps_per_second=steps_per_second,
            )
        )
        self._picture.step = step
        self._show_run()

    def epoch(self, record: EpochRecord, engine: GrowthEngine) -> None:
        """An epoch is over."""
        self._append(METRICS_FILE, asdict(record))
        seeds = Counter(str(seed.outcome or seed.state) for seed in engine.seeds())
        shown = asdict(record)
        del shown["training_flops"], shown["growth_flops"]
        self._progress.write(EpochProgress(**shown, epochs=self._epochs, steps=self.steps, seeds=dict(seeds)))
        metrics = run_pb2.EpochMetrics(
            epoch=record.epoch - 1,
            step=record.step,
            train_loss=record.train_loss,
            validation_loss=record.validation_loss,
            validation_accuracy_percent=record.validation_accuracy,
            learning_rate=record.learning_rate,
            parameters=record.parameters,
            training_flops=record.training_flops,
            growth_flops=record.growth_flops,
            seconds=record.seconds,
        )
        self._picture.epoch, self._picture.step = record.epoch, record.step
        self._picture.metrics.CopyFrom(metrics)
        self._show_run()
        event = events_pb2.EpochCompleted(run=self._picture.name, metrics=metrics)
        self._mesh.publish("system.events.epoch", self._run, event)

    def checkpointed(self, step: int) -> None:
        """A checkpoint of ``step`` was written."""
        self._picture.checkpoint = f"{self._picture.name}/checkpoints/{step}"
        self._show_run()

    def measured(self, health: HealthReport, epoch: int) -> None:
        """The health of the slots was measured after ``epoch`` finished epochs."""
        report = observation.health_report(self._run, health, max(0, epoch - 1))
        self._mesh.show(report)
        event = events_pb2.SeedHealthReported(run=self._picture.name, epoch=report.epoch, slots=report.slots)
        self._mesh.publish("telemetry.seed.health", self._run, event)
        self._event("health", epoch=epoch, slots=[asdict(slot) for slot in health.slots])

    def started(self, accuracy: float) -> None:
        """The host was trained already and has ``accuracy`` (percent) on the validation split before the first step."""
        self._event("start", validation_accuracy=accuracy)
        self.status("training", f"the trained host stands at {accuracy:.2f} % on the validation split")

    def rolled_back(self, *, from_step: int, to_step: int, reason: str, seeds: Sequence[str]) -> None:
        """The governor or a caller restored an earlier state."""
        self._publish_return(from_step, to_step, reason, seeds)
        self._event("rollback", from_step=from_step, to_step=to_step, reason=reason, seeds=list(seeds))
        self.status("training", f"rolled back from step {from_step} to {to_step}: {reason}", seeds=list(seeds))

    def rewound(self, engine: GrowthEngine, *, from_step: int, to_step: int, seeds: Sequence[str]) -> None:
        """The steps since the graft of culled seeds were taken back and are made again without them."""
        reason = f"these steps are made again without {', '.join(seeds)}"
        # No seed is blamed for it, so none is named as locked.
        self._publish_return(from_step, to_step, f"rewound: {reason}", [])
        self._event("rewind", from_step=from_step, to_step=to_step, seeds=list(seeds))
        self.status("training", f"rewound from step {from_step} to {to_step}: {reason}", seeds=list(seeds))
        self._show_ended(engine, seeds)

    def not_rewound(self, engine: GrowthEngine, *, step: int, seeds: Sequence[str], reason: str) -> None:
        """Culled seeds were only removed, though a rewind was asked for."""
        self._event("rewind refused", step=step, seeds=list(seeds), reason=reason)
        self.status("training", f"{', '.join(seeds)}: removed, not rewound: {reason}", seeds=list(seeds))
        self._show_ended(engine, seeds)

    def _publish_return(self, from_step: int, to_step: int, reason: str, locked: Sequence[str]) -> None:
        event = events_pb2.RolledBack(
            run=self._picture.name,
            from_step=from_step,
            to_step=to_step,
            reason=reason,
            seeds=[seed_name(self._run, seed) for seed in locked],
        )
        self._mesh.publish("system.events.rollback", self._run, event)

    def _show_ended(self, engine: GrowthEngine, seeds: Sequence[str]) -> None:
        """Why seeds are gone was added to."""
        for seed in seeds:
            self._mesh.show(observation.seed_to_proto(self._run, engine.seed(seed), self._transitions.get(seed, [])))
        self._write_lineage(engine)

    def topology(self, engine: GrowthEngine, *, epoch: int, step: int) -> None:
        """The network changed, or is new."""
        self._mesh.show(observation.topology(self._run, engine, epoch=epoch, step=step))

    def cache(self, stats: CacheStats) -> None:
        """Figures of the kernel cache."""
        self._mesh.show(observation.cache_to_proto(stats))

    # ---- adaptations (adaptation.Witness) --------------------------------------------------------------------------

    def decided(self, decision: Decision | NoDecision, clock: Clock, epoch: int) -> None:
        """Tamiyo answered, or did not."""
        found = isinstance(decision, Decision)
        explanation = decision.explanation if isinstance(decision, Decision) else decision.reason
        plan = [asdict(change) for change in decision.plan] if isinstance(decision, Decision) else []
        content = asdict(decision) if found else {"decision": None, "explanation": explanation, "plan": plan}
        self._append(DECISIONS_FILE, {"arm": self._arm, "epoch": epoch, "step": clock.step, **content})
        self._progress.write(
            DecisionProgress(
                decision=decision.decision if isinstance(decision, Decision) else None,
                epoch=epoch,
                step=clock.step,
                plan=tuple(plan),
                explanation=explanation,
                latency_ms=decision.latency_ms,
                arm=self._arm,
            )
        )
        self._picture.last_decision = explanation
        self._show_run()

    def transitioned(self, transitions: Sequence[SeedTransition], engine: GrowthEngine, epoch: int) -> None:
        """Seeds changed their states."""
        records = {record.seed: record for record in engine.seeds()}
        for transition in transitions:
            record = records[transition.seed]
            message = observation.transition_to_proto(self._run, transition, epoch)
            story = self._transitions.setdefault(transition.seed, [])
            story.append(message)
            seed = observation.seed_to_proto(self._run, record, story)
            # Several transitions may come at once: each event shows the seed as it was after that one.
            seed.state = message.to_state
            self._mesh.show(seed)
            event = events_pb2.SeedTransitioned(transition=message, seed=seed)
            self._mesh.publish("telemetry.seed.transitions", transition.seed, event)
            self._tell_transition(transition, record, epoch)
        self._write_lineage(engine)

    def _tell_transition(self, transition: SeedTransition, record: SeedRecord, epoch: int) -> None:
        worth = contribution_json(record.contribution)
        message = SeedProgress(
            seed=transition.seed,
            slot=transition.slot,
            blueprint=record.blueprint,
            family=record.family,
            size=record.size,
            from_state=transition.from_state.value,
            to_state=transition.to_state.value,
            step=transition.step,
            epoch=epoch,
            reason=transition.reason,
            contribution=worth,
            arm=self._arm,
        )
        self._progress.write(message)
        told = {key: value for key, value in asdict(message).items() if key != "kind"}
        self._event("transition", **told, plan_contribution=contribution_json(record.plan_contribution))

    def ended(self, record: SeedRecord, decision: str) -> None:
        """A seed's life is over."""
        outcome = observation.outcome_to_proto(self._run, record, decision)
        kernel = f"blueprints/{record.blueprint}/kernels/{record.kernel[:32]}" if record.kernel else ""
        self._mesh.report_outcome(outcome, kernel)
        self._mesh.publish("innovation.field_reports", record.blueprint, events_pb2.FieldReported(outcome=outcome))

    def answered(self, result: CommandResult) -> None:
        """A caller's command was applied or refused."""
        self._mesh.answer(result)
        self._event(
            "command",
            command=asdict(result.command),
            step=result.step,
            seed=result.seed,
            error_reason=result.error_reason,
            error_message=result.error_message,
        )

    # ---- where it goes ---------------------------------------------------------------------------------------------

    def _show_run(self) -> None:
        copy = run_pb2.Run()
        copy.CopyFrom(self._picture)
        self._mesh.show(copy)

    def _event(self, kind: str, **content: Any) -> None:
        self._append(EVENTS_FILE, {"time": time.time(), "arm": self._arm, "kind": kind, **content})

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        try:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(content), separators=(",", ":")) + "\n")
        except OSError as error:
            # The story is not the run: a full disk costs lines of it, never the training.
            self.lost_lines += 1
            self.status("training", f"{name} cannot be written: {error.strerror}", lost_lines=self.lost_lines)

    def _write_lineage(self, engine: GrowthEngine) -> None:
        lineage = engine.lineage()
        seeds = ",\n".join(self._lineage_line(seed) for seed in lineage.pop("seeds"))
        content = f'{json.dumps(finite(lineage))[:-1]}, "seeds": [\n{seeds}\n]}}\n'
        self._rewrite(LINEAGE_FILE if self._arm == GROWN else f"lineage-{self._arm}.json", content)

    def _lineage_line(self, seed: dict[str, Any]) -> str:
        """A seed as it stands in the lineage; most have not changed since it was written last."""
        known = self._lineage_lines.get(seed["seed"])
        if known is None or known[0] != seed:
            known = self._lineage_lines[seed["seed"]] = (seed, json.dumps(finite(seed)))
        return known[1]

    def _rewrite(self, name: str, content: str) -> None:
        try:
            write_atomically(self._folder / name, content, fsync=False)
        except EsperError as error:
            self.status("training", f"{name} is not up to date: {error.message}")

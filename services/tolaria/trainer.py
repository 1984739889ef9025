"""The training loop. It alone moves the model, and its clock is the only one: steps, and rollbacks that take them back.

Between two steps lies a safe point: there, and nowhere else, the network changes, commands are obeyed, and the run can
be stopped and saved. All that decides how a run goes on is in :meth:`TolariaTrainer.capture`; a checkpoint on the disk,
the last good state in memory and a resumed process are the same thing, read back by :meth:`TolariaTrainer.restore`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper.tolaria.v1 import run_pb2
from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import ROOT, Telemetry, current_traceparent, link_to
from services.kasmina.engine import GrowthEngine
from services.kasmina.errors import GrowthError
from services.kasmina.lifecycle import SeedState
from services.kasmina.model import Contribution, HealthReport, Replacement
from services.tolaria import budget, calibration, checkpoint
from services.tolaria.accounting import Account, LapClock
from services.tolaria.adaptation import AdaptationCoordinator
from services.tolaria.averaging import WeightAverage
from services.tolaria.budget import Limit
from services.tolaria.checkpoint import CheckpointStore, State
from services.tolaria.data.batches import Batches
from services.tolaria.data.splits import DataSet, Split
from services.tolaria.errors import CheckpointError, CheckpointWriteError, TrainingFailedError
from services.tolaria.evaluation import Evaluation, contribution, evaluate
from services.tolaria.governor import Governor, Instability
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.journal import Clock, Entry, Journal
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.latency import LatencyModel
from services.tolaria.observation import Situation
from services.tolaria.optimizer import GrowingOptimizer
from services.tolaria.ports import ADAPTATION_COMMANDS, Command, CommandKind, CommandResult, Mesh
from services.tolaria.reporting import EpochRecord, RunReporter
from services.tolaria.rewind import NoWayBackError, Snapshots
from services.tolaria.schedule import Schedule
from services.tolaria.seeds import derive
from services.tolaria.step_times import StepTimes
from services.tolaria.task import Classification, Objective
from services.tolaria.verdict import accuracy_interval

_SHOW_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.5
_FLOAT32: Final = contextlib.nullcontext()
_ROLLBACK_STATES: Final = frozenset(
    {
        SeedState.LOADING,
        SeedState.TRAINING,
        SeedState.GRAFTING,
        SeedState.STABILIZATION,
        SeedState.EVALUATING,
        SeedState.FINE_TUNING,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """What became of one arm. Accuracies in percent; ``flops`` are forward FLOPs of one sample."""

    arm: str
    test_accuracy: float
    test_interval: tuple[float, float]
    """Of ``test_accuracy``, at 95 % confidence, over the images."""
    test_samples: int
    validation_accuracy: float
    parameters: int
    flops: int
    steps: int
    seconds: float
    training_flops: float
    discarded_flops: float
    growth_flops: float
    health_flops: float
    validation_flops: float
    cpu_seconds: float
    growth_cpu_seconds: float
    growth_seconds: float
    start_accuracy: float | None = None
    """On the validation split before the first step, of a host that was trained already."""


def decision_epochs(epochs: int, window: tuple[float, float], decisions: int, *, trained: bool = False) -> list[int]:
    """Completed epochs after which Tamiyo is asked: ``decisions`` of them, evenly spread over ``window``.

    Never after the last; before the first only for a host that is ``trained`` already (else there is nothing to
    measure). In a short schedule they are fewer.
    """
    start, end = window
    spread = (end - start) / max(1, decisions - 1)
    first, last = (0, epochs - 1) if trained else (1, epochs - 1)
    wanted = (round(epochs * (start + spread * index)) for index in range(decisions))
    return sorted({min(last, max(first, epoch)) for epoch in wanted if last >= first})


class TolariaTrainer:
    """Trains one arm: the run itself ("grown") or a control ("host", "bigger", "uniform").

    Args:
        config: The whole configuration.
        data: What to train on, on the device.
        arm: Name of the arm.
        run: Id of the run.
        folder: The run folder.
        build_host: Makes a fresh network, the same each time; called again for every restore.
        grow: Whether Tamiyo is asked and commands are obeyed.
        mesh: The services, or nobody.
        journal: The run's inputs.
        checkpoints: Where states are saved; None: nowhere.
        shelf: The run's kernels; None: none can be grafted.
        reporter: Hears the story.
        telemetry: Spans.
        interrupt: How to stop early.
        device: Where to train.
        total_steps: Length of the schedule in optimizer steps; None: that of ``config.training.epochs``.
        grafts: Earliest step of grafting by step of germination, for a control that grows when its run did.
    """

    def __init__(
        self,
        *,
        config: EsperConfig,
        data: DataSet,
        arm: str,
        run: str,
        folder: Path,
        build_host: Callable[[], nn.Module],
        grow: bool,
        mesh: Mesh,
        journal: Journal,
        checkpoints: CheckpointStore | None,
        shelf: KernelShelf | None,
        reporter: RunReporter,
        telemetry: Telemetry,
        interrupt: Interrupt,
        device: torch.device,
        total_steps: int | None = None,
        grafts: Mapping[int, int] | None = None,
    ) -> None:
        # What the run is.
        self.config = config
        self.arm = arm
        self.run = run
        self.folder = folder
        self.grow = grow
        self.device = device
        self.build_host = build_host

        # What it trains on.
        self.data = data
        self.batches = Batches(data.training, data.normalization, config.data, config.run.seed)
        self.test_set = data.locked_test_set()
        self.objective: Objective = data.task or Classification(data.classes, config.training.optimizer.label_smoothing)

        # Its clock and schedule.
        self.total_steps = total_steps or config.training.epochs * self.batches.per_epoch
        self.schedule = Schedule.of(config.training.optimizer, self.total_steps)
        growth = config.growth
        self.trained = config.model.weights is not None
        self.decision_epochs = (
            decision_epochs(config.training.epochs, growth.window, growth.decisions, trained=self.trained)
            if grow
            else []
        )
        self.step = 0

        # Who else has a say.
        self.mesh = mesh
        self.journal = journal
        guessing = self.objective.guessing(data.validation.labels)
        self.governor = Governor(config.governor, 100.0 * guessing, len(data.validation))
        self.interrupt = interrupt
        self.coordinator = AdaptationCoordinator(
            run=run,
            config=growth,
            seed=config.run.seed,
            mesh=mesh,
            journal=journal,
            shelf=shelf,
            telemetry=telemetry,
            witness=reporter,
            on_change=self._network_changed,
            not_before=grafts,
        )

        self.shelf = shelf

        # Where it writes.
        self.checkpoints = checkpoints
        self.reporter = reporter
        self.reporter.steps = self.total_steps
        self.telemetry = telemetry
        self.step_times = StepTimes(folder, arm) if config.telemetry.step_times else None
        self.account = Account()
        self.environment = checkpoint.environment(config.training.threads, device.type)

        # The network and its optimizer; replaced as a whole by a restore.
        self._begin_anew()
        self.host_flops = self.engine.flops()
        self.host_parameters = self.parameter_count()
        self.last_good: State | None = None
        #: Where failed trials go back to, and how often they did; part of the clock as rollbacks are.
        self.snapshots = Snapshots()
        self.rewinds = 0
        #: Growth decides nothing before this step: what was decided until there has been decided already.
        self.replay_until = 0
        #: What growth may cost; a limit of time is known once a step was timed.
        self.latency: LatencyModel | None = None
        self.limit: Limit | None = None
        if grow and growth.budget.kind != "latency":
            self.limit = budget.resolve(growth.budget, flops=self.host_flops, parameters=self.host_parameters)

        # The epoch under way.
        self.epoch_loss = 0.0
        self.validation: Evaluation | None = None
        #: What the test set said, once it was asked.
        self.test: Evaluation | None = None
        self.accuracies: list[float] = []
        self.health: HealthReport | None = None
        self._epoch_started = time.perf_counter()
        self._shown = (time.perf_counter(), 0)
        self._clock = LapClock()
        self._run_trace: str | None = None

    # ---- from the first step to the last ---------------------------------------------------------------------------

    def train(self) -> ArmResult:
        """Train to the end of the schedule and judge the result on the test set, once.

        Raises TrainingInterruptedError (the checkpoint is saved), TrainingFailedError, BudgetError, JournalError,
        CheckpointError.
        """
        started = time.perf_counter()
        self.learn()
        links = [link_to(self._run_trace)]
        with self.telemetry.span("finish", {"esper.arm": self.arm}, parent=ROOT, links=links):
            return self._finish(started)

    def learn(self) -> None:
        """Train to the end of the schedule; the test set stays locked. Raises as :meth:`train` does."""
        torch.manual_seed(derive(self.config.run.seed, "training"))
        with self.telemetry.span("run", {"esper.run_id": self.run, "esper.arm": self.arm}, parent=ROOT):
            # A span as long as a run would be lost in a crash: this one only gives the others something to link to.
            self._run_trace = current_traceparent()
            self.reporter.state(run_pb2.RUN_STATE_TRAINING, f"from step {self.step} of {self.total_steps}")
        self.reporter.topology(self.engine, epoch=self.epoch, step=self.step)
        if self.grow and self.config.growth.budget.kind == "latency":
            self._price_latency()
        if self.trained and not self.accuracies:
            self._start_trained()
        if self.last_good is None:
            self._remember()
        if self.journal.replaying or self.coordinator.to_rewind:
            # A checkpoint that a caller asked for was written in the middle of a safe point: the rest of it comes now.
            self._safe_point()
        while self.step < self.total_steps:
            self._train_epoch()

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.batches.per_epoch

    @property
    def clock(self) -> Clock:
        """Where the run is."""
        return Clock(self.governor.rollbacks + self.rewinds, self.step)

    def _price_latency(self) -> None:
        """Learn what width costs in time, once in a run's life: a resumed run plans with the numbers it began with."""
        self.journal.next_at(self.clock, "latency")
        entry = self.journal.first("latency")
        if entry is None:
            with self.telemetry.span("measure latency"):
                model = calibration.measure(
                    config=self.config,
                    data=self.data,
                    objective=self.objective,
                    build_host=self.build_host,
                    precision=self._precision,
                    device=self.device,
                )
            entry = self.journal.append("latency", self.clock, asdict(model))
        self.latency = LatencyModel.from_json(entry.content)
        host = self.latency.host
        self.limit = budget.resolve(
            self.config.growth.budget, flops=self.host_flops, parameters=self.host_parameters, latency=host
        )
        self.reporter.status(
            "training", f"a step of the host takes {host:.3g} ms; growth may take it to {self.limit.value:.3g} ms"
        )
        self._bill_time(growth=True)

    def _start_trained(self) -> None:
        """Judge a host that was trained already; growth may begin before the first step."""
        with self.telemetry.span("validate"):
            self.validation = self.judge()
        self.account.validation_flops += self.validation.flops
        self.accuracies.append(self.validation.accuracy)
        self._bill_time()
        self.reporter.started(self.validation.accuracy)
        if 0 in self.decision_epochs:
            self._adapt(0)
            # No step has to wait for it yet, and a short schedule has no time for newborns that come late.
            self.coordinator.await_kernels(self.config.growth.start_wait_seconds)
        self._bill_time(growth=True)
        self._safe_point(epoch_is_over=True)

    def _train_epoch(self) -> None:
        """Train to the end of the epoch under way (the last one of a schedule may be cut short), or to a rollback."""
        epoch = self.epoch
        taken_back = self.clock.rollbacks
        self._epoch_started = time.perf_counter()
        links = [link_to(self._run_trace)]
        with self.telemetry.span("epoch", {"esper.arm": self.arm, "esper.epoch": epoch}, parent=ROOT, links=links):
            while self.clock.rollbacks == taken_back:
                self._timed_step()
                over = self.step % self.batches.per_epoch == 0 or self.step == self.total_steps
                if over and self.clock.rollbacks == taken_back:
                    self._end_epoch(-(-self.step // self.batches.per_epoch))
                    return
                if self.clock.rollbacks == taken_back:
                    self._safe_point()

    def _timed_step(self) -> None:
        if self.step_times is None:
            self.train_step()
            return
        self.step_times.begin()
        self.train_step()
        self.step_times.end(self.step)
        if self.step % self.batches.per_epoch == 0:
            self.step_times.flush()

    def train_step(self) -> None:
        """One optimizer step, or a rollback if its loss says so."""
        batch = self.batches.at(self.epoch, self.step % self.batches.per_epoch)
        with self._precision():
            loss = self.objective.step(self.model, batch.images, batch.labels)
            own_loss = self.engine.auxiliary_loss(batch.labels, self.objective.own_loss)
        value = float(loss.detach())
        if (unstable := self.governor.observe_loss(value)) is not None:
            self._roll_back(unstable)
            return
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        if own_loss is not None:
            own_loss.backward()  # type: ignore[no-untyped-call]  # as above
        self.optimizer.step(self.step)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self.epoch_loss += value
        self.account.bill_steps(self.flops, len(batch.labels))
        if transitions := self.engine.tick(self.step, value):
            self.coordinator.follow(transitions, self.epoch)
        self._show_progress(value)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.config.training.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        # Not a disabled autocast: entering and leaving it is felt in the steps of a small network.
        return _FLOAT32

    def _show_progress(self, loss: float) -> None:
        now, (then, step) = time.perf_counter(), self._shown
        if now - then >= _SHOW_SECONDS:
            self._shown = now, self.step
            speed = (self.step - step) / (now - then)
            rate = self.optimizer.rate(self.step)
            self.reporter.stepped(epoch=self.epoch, step=self.step, loss=loss, rate=rate, steps_per_second=speed)

    # ---- the end of an epoch ---------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        """Validate, judge seeds, look at the slots, ask Tamiyo, save. ``epoch`` counts finished epochs."""
        with self.telemetry.span("validate"):
            self.validation = self.judge()
        self.account.validation_flops += self.validation.flops
        if (unstable := self.governor.observe_accuracy(self.validation.accuracy)) is not None:
            self._roll_back(unstable)
            return
        self.accuracies.append(self.validation.accuracy)
        self._bill_time()
        self._report_epoch(epoch)
        if self.grow and self._evaluate(epoch):
            return
        if self.grow:
            self._adapt(epoch)
        self._bill_time(growth=True)
        self.epoch_loss = 0.0
        self._safe_point(epoch_is_over=True)
        if epoch % self.config.training.checkpoint_every_epochs == 0 or self.step == self.total_steps:
            self.save()

    def _evaluate(self, epoch: int) -> bool:
        """Judge the seeds that are due; True if the run went back because of those that failed."""
        if self.step < self.replay_until:
            return False
        self.coordinator.evaluate_due(epoch, self.step, self._measure_contributions)
        return self._rewind_culled(decided=False)

    def _adapt(self, epoch: int) -> None:
        """What growth does at the boundary of epochs once seeds are judged, but for what waits for a safe point."""
        self.coordinator.follow(self.engine.expire(epoch), epoch)
        if self.step < self.replay_until:
            return
        due = epoch in self.decision_epochs
        if due or self._health_is_due(epoch):
            self._measure_health(epoch)
        if due:
            with self.telemetry.span("decide", {"esper.epoch": epoch}):
                self.coordinator.decide(self._situation(epoch), self.health, self.clock)

    def _health_is_due(self, epoch: int) -> bool:
        start, end = self.config.growth.window
        inside = start <= epoch / self.config.training.epochs <= end
        return inside and epoch % self.config.growth.health_every_epochs == 0

    def _window_in_epochs(self) -> tuple[float, float]:
        """The growth window, as far as it reaches once decisions fall on whole epochs."""
        start, end = self.config.growth.window
        first, last = (
            epoch / self.config.training.epochs for epoch in (self.decision_epochs[0], self.decision_epochs[-1])
        )
        return min(start, first), max(end, last)

    def _measure_health(self, epoch: int) -> None:
        batches = self.health_batches()
        with self.telemetry.span("measure health", {"esper.samples": sum(len(batch) for batch in batches)}):
            self.health = self.engine.measure_health(batches)
        self.account.bill_health(self.health.flops)
        self.reporter.measured(self.health, epoch)

    def health_batches(self) -> list[Tensor]:
        """The training images that layers are looked at on, normalized: as many as the widest needs, if there are."""
        samples = max(self.config.growth.health_samples, self.engine.health_samples_needed())
        size = self.config.data.evaluation_batch_size
        images = self.data.training.images[:samples]
        return [self.data.normalization(images[first : first + size]) for first in range(0, len(images), size)]

    def _measure_contributions(self, groups: Sequence[Sequence[str]]) -> list[Contribution]:
        """The worth of each group of seeds: the same weights and images with all of it and with none of it."""
        whole = self.judge()
        self.account.bill_counterfactual(whole.flops)
        found: list[Contribution] = []
        for seeds in groups:
            span = self.telemetry.span("measure contribution", {"esper.seeds": list(seeds)})
            with span, self.engine.without(seeds):
                without = self.judge()
            self.account.bill_counterfactual(without.flops)
            found.append(contribution(whole, without, self.config.growth.evaluation.confidence))
        return found

    def judge(self) -> Evaluation:
        """Score and losses of the network on the validation split, as it is now; who calls it bills it."""
        with self.averaged():
            return self._judge(self.data.validation)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has the weights that are judged and exported: the averaged ones where there are such."""
        return self.average.applied() if self.average is not None else contextlib.nullcontext()

    def _judge(self, split: Split) -> Evaluation:
        return evaluate(
            self.model,
            split,
            self.data.normalization,
            self.objective,
            batch_size=self.config.data.evaluation_batch_size,
            flops_per_sample=self.flops,
        )

    def _situation(self, epoch: int) -> Situation:
        growth = self.config.growth
        assert self.limit is not None, "the limit is known from the start of training"
        return Situation(
            run=self.run,
            epoch=epoch,
            step=self.step,
            progress=self.step / self.total_steps,
            window=self._window_in_epochs(),
            decisions_left=sum(1 for other in self.decision_epochs if other >= epoch),
            limit=self.limit,
            latency=self.latency,
            max_factor=growth.max_factor,
            validation_accuracies=self.accuracies,
            seed=derive(self.config.run.seed, "controller", epoch),
        )

    def _report_epoch(self, epoch: int) -> None:
        assert self.validation is not None, "an epoch is reported after it was validated"
        record = EpochRecord(
            arm=self.arm,
            epoch=epoch,
            step=self.step,
            train_loss=self.epoch_loss / ((self.step - 1) % self.batches.per_epoch + 1),
            validation_loss=self.validation.loss,
            validation_accuracy=self.validation.accuracy,
            learning_rate=self.optimizer.rate(self.step - 1),
            seconds=time.perf_counter() - self._epoch_started,
            parameters=self.parameter_count(),
            flops=self.flops,
            training_flops=self.account.training_flops,
            growth_flops=self.account.growth_flops,
        )
        self.reporter.epoch(record, self.engine)
        if self.shelf is not None:
            self.reporter.cache(self.shelf.stats())

    # ---- safe points -----------------------------------------------------------------------------------------------

    def _safe_point(self, *, epoch_is_over: bool = False) -> None:
        """Apply what waits, obey commands, stop if asked to. The state after it is one that a run can go on from."""
        changed = self.coordinator.safe_point(self.clock, self.epoch)
        while (entry := self.journal.next_at(self.clock, "rollback")) is not None:
            self._apply_rollback(entry)
            changed |= self.coordinator.safe_point(self.clock, self.epoch)
        # Before commands: a checkpoint that a caller asks for holds them.
        self._take_snapshots()
        if not self.journal.replaying:
            # What callers want now waits until what they wanted before the crash has been met again.
            for command in self.mesh.commands():
                changed |= self._obey(command)
        changed |= self._rewind_culled(decided=True)
        self.snapshots.forget_settled(self.engine.seeds())
        if changed or epoch_is_over:
            # After a graft too: a seed that breaks the training is then found in this state, and blamed.
            self._remember()
        if self.interrupt.reason is not None:
            self._stop(self.interrupt.reason)

    def _obey(self, command: Command) -> bool:
        """Carry out one command; True if the network changed."""
        if command.kind in ADAPTATION_COMMANDS:
            return self.coordinator.command(command, self.clock, self.epoch)
        result = CommandResult(command=command, step=self.step)
        if command.kind is CommandKind.PAUSE:
            self._pause(command)
        elif command.kind is CommandKind.STOP:
            self.reporter.answered(result)
            self.interrupt.request(command.reason or "stopped by a caller", by_caller=True)
        elif command.kind is CommandKind.CHECKPOINT:
            self.save()
            self.reporter.answered(CommandResult(command=command, step=self.step, checkpoint_step=self.step))
        elif command.kind is CommandKind.ROLLBACK:
            self._roll_back_to_checkpoint(command)
        else:
            self.reporter.answered(result)  # RESUME of a run that is not paused: nothing to do
        return False

    def _pause(self, command: Command) -> None:
        """Hold until a caller resumes or stops the run. Commands that change the network wait until then."""
        self.reporter.state(run_pb2.RUN_STATE_PAUSED, command.reason or "paused by a caller")
        self.reporter.status("paused", "paused by a caller")
        self.reporter.answered(CommandResult(command=command, step=self.step))
        waiting: list[Command] = []
        resumed: Command | None = None
        while resumed is None and self.interrupt.reason is None:
            self.mesh.wait(_PAUSE_SECONDS)
            for other in self.mesh.commands():
                if other.kind is CommandKind.RESUME:
                    resumed = other
                else:
                    waiting.append(other)
            if any(other.kind is CommandKind.STOP for other in waiting):
                break
        self.reporter.state(run_pb2.RUN_STATE_TRAINING, "resumed")
        if resumed is not None:
            self.reporter.answered(CommandResult(command=resumed, step=self.step))
        for other in waiting:
            self._obey(other)

    def _stop(self, reason: str) -> None:
        self.save()
        self.reporter.state(run_pb2.RUN_STATE_STOPPED, reason)
        raise TrainingInterruptedError(reason)

    def _network_changed(self, replaced: Iterable[Replacement]) -> None:
        """The optimizer follows the network, survivors and fused parameters with their state."""
        replaced, groups = list(replaced), self.engine.parameter_groups()
        self.optimizer.sync(groups, replaced)
        if self.average is not None:
            self.average.sync(groups, replaced)
        self.flops = self.engine.flops()
        self.reporter.topology(self.engine, epoch=self.epoch, step=self.step)

    # ---- states ----------------------------------------------------------------------------------------------------

    def capture(self) -> State:
        """All that decides how the run goes on. The tensors are the live ones."""
        tensors: dict[str, Tensor] = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":  # pragma: no cover  # tests have no GPU
            tensors["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        tensors |= {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state().items()}
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.state().items()}
        values = {
            "run": self.run,
            "arm": self.arm,
            "environment": self.environment,
            "step": self.step,
            "rollbacks": self.governor.rollbacks,
            "rollbacks_asked_for": self.governor.asked_for,
            "rewinds": self.rewinds,
            "replay_until": self.replay_until,
            "rate_scale": self.optimizer.rate_scale,
            "epoch_loss": self.epoch_loss,
            "accuracies": self.accuracies,
            "engine": self.engine.state(),
            "story": self.coordinator.state(),
            "governor": self.governor.state(),
            "account": self.account.state(),
            "journal_position": self.journal.position,
        }
        return State(tensors, values)

    def restore(self, state: State) -> None:
        """Go on from ``state``: a fresh host, grown to the state's topology, with its weights and its optimizer.

        What was spent stays spent, and how often the run was rolled back is not forgotten.
        """
        values = state.values
        self.account.discard_since(values["account"])
        self._begin_anew(values)
        self.model.load_state_dict(_named(state.tensors, "model/"))
        self.optimizer.load_state(_named(state.tensors, "optimizer/"))
        if self.average is not None:
            self.average.load_state(_named(state.tensors, "average/"))
        self.optimizer.rate_scale = values["rate_scale"]
        self.step = values["step"]
        self.epoch_loss = values["epoch_loss"]
        self.accuracies = list(values["accuracies"])
        self.governor.restore(**values["governor"])
        torch.set_rng_state(state.tensors["rng/cpu"].cpu())
        if self.device.type == "cuda":  # pragma: no cover  # tests have no GPU
            torch.cuda.set_rng_state(state.tensors["rng/cuda"].cpu(), self.device)

    def _begin_anew(self, values: Mapping[str, Any] | None = None) -> None:
        """A fresh host and its engine, grown to the topology in ``values``, and an optimizer without state."""
        self.model = self.build_host().to(self.device)
        self.model.train()
        self.engine = GrowthEngine(
            self.model,
            self.data.normalization(self.data.training.images[:2]),
            run=self.run,
            settings=self.config.growth,
            outputs=self.data.classes,
            seed=derive(self.config.run.seed, "engine"),
        )
        if values is not None:
            self.engine.restore(values["engine"])
        self.coordinator.bind(self.engine, values["story"] if values is not None else None)
        self.optimizer = GrowingOptimizer(self.config.training.optimizer, self.schedule)
        self.optimizer.sync(self.engine.parameter_groups())
        decay = self.config.training.ema_decay
        self.average = WeightAverage(decay) if decay is not None else None
        if self.average is not None:
            self.average.sync(self.engine.parameter_groups())
        self.flops = self.engine.flops()

    def resume(self) -> None:
        """Go on from the newest checkpoint (without one: from the beginning) and replay the journal from there.

        Raises CheckpointError when it is damaged, belongs to another run or to another network.
        """
        assert self.checkpoints is not None, "an arm without checkpoints cannot be resumed"
        steps = self.checkpoints.steps()
        if not steps:
            # It died before its first checkpoint: the journal alone leads it there again.
            self.journal.position = 0
            self.reporter.rewind(0)
            return
        state = self.checkpoints.load(steps[-1])
        values = state.values
        if (values["run"], values["arm"]) != (self.run, self.arm):
            raise CheckpointError(f"the checkpoint belongs to run {values['run']} ({values['arm']}), not to {self.run}")
        if values["environment"] != self.environment:
            self.reporter.status(
                "training",
                f"the checkpoint was made with {values['environment']}, this is {self.environment}: "
                "results will differ in the last bits",
            )
        self.governor.rollbacks = values["rollbacks"]
        self.governor.asked_for = values["rollbacks_asked_for"]
        self.rewinds = values.get("rewinds", 0)
        self.account = Account(**values["account"])
        self.journal.position = values["journal_position"]
        # The last good state may lie before the checkpoint; a resumed run must fall back to the same one.
        good = _nested(state)
        try:
            self.restore(state)
        except (GrowthError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {steps[-1]} does not fit the network that the configuration makes now "
                f"({error}); put the code behind model.factory back as it was, or start a new run"
            ) from error
        self._recall(state)
        self.last_good = good if good is not None else state.detached()
        self.reporter.rewind(self.step, decided=self.replay_until - 1)
        self.reporter.checkpointed(self.step)

    def save(self, *, newest: bool = False) -> bool:
        """Write a checkpoint; False if the disk refused. Training goes on either way.

        With ``newest`` those of later steps go: the run went back.
        """
        if self.checkpoints is None:
            return False
        state = self.capture()
        tensors, snapshots = self.snapshots.packed()
        if snapshots:
            state = State({**state.tensors, **tensors}, {**state.values, "snapshots": snapshots})
        if self.last_good is not None and self.last_good.values["step"] != self.step:
            tensors = {f"last_good/{name}": tensor for name, tensor in self.last_good.tensors.items()}
            state = State({**state.tensors, **tensors}, {**state.values, "last_good": self.last_good.values})
        try:
            self.checkpoints.save(self.step, state, newest=newest)
        except CheckpointWriteError as error:
            self.reporter.status("training", f"{error}; training goes on, the checkpoints before it are intact")
            return False
        self.reporter.checkpointed(self.step)
        return True

    def _remember(self) -> None:
        self.last_good = self.capture().detached()

    def _recall(self, state: State) -> None:
        """What a checkpoint knows of trials; one of an older version knows nothing."""
        self.snapshots.unpack(state)
        self.replay_until = state.values.get("replay_until", 0)

    # ---- rewinds ---------------------------------------------------------------------------------------------------

    def _take_snapshots(self) -> None:
        """Of seeds that were grafted just now: no step was made with them yet."""
        if self.config.growth.evaluation.cull != "rewind":
            return
        if fresh := self.snapshots.missing(self.engine.seeds()) & self.coordinator.grafted_at(self.step):
            self.snapshots.keep(fresh, self.capture().detached())

    def _rewind_culled(self, *, decided: bool) -> bool:
        """Take back the steps of seeds that were culled just now; False if there are none or they cannot be.

        ``decided`` says whether growth has decided at this step what it will.
        """
        if not (culled := self.coordinator.to_rewind):
            return False
        records = self.engine.seeds()
        traceless = {record.seed for record in records if self.coordinator.traceless(record)}
        try:
            snapshot = self.snapshots.way_back(culled, records, traceless)
        except NoWayBackError as error:
            self._only_removed(str(error))
            return False
        self._rewind(snapshot, gone={*culled, *traceless}, decided=decided)
        return True

    def _only_removed(self, reason: str) -> None:
        """Seeds that were culled just now are gone, but not their steps."""
        if culled := self.coordinator.to_rewind:
            self.coordinator.settle_rewind(f"removed, not rewound: {reason}", rewound=False)
            self.reporter.not_rewound(self.engine, step=self.step, seeds=culled, reason=reason)

    def _rewind(self, snapshot: State, *, gone: Collection[str], decided: bool) -> None:
        """Go back to ``snapshot``, without the seeds in ``gone``."""
        from_step, culled = self.step, self.coordinator.to_rewind
        self.coordinator.settle_rewind(f"rewound to step {snapshot.values['step']}", rewound=True)
        story, penalties = self.coordinator.state(), self.engine.state()["penalties"]
        ended = [record for record in self.engine.seeds() if record.seed in gone]
        self.restore(snapshot)
        self.coordinator.bind(self.engine, story)
        self.engine.take_out(ended, penalties)
        self._network_changed(())
        self.rewinds += 1
        self.replay_until = max(self.replay_until, from_step + decided)
        # Those grafted together with a culled one stand at their graft again: their snapshot is one without it.
        self.snapshots.forget_from(self.step)
        self._take_snapshots()
        self._remember()
        # Saved at once: a resume need not make the trial again, and a rollback must not lead into it.
        self.save(newest=True)
        self.reporter.rewind(self.step, decided=self.replay_until - 1)
        self.reporter.rewound(self.engine, from_step=from_step, to_step=self.step, seeds=culled)

    # ---- rollbacks -------------------------------------------------------------------------------------------------

    def _roll_back(self, unstable: Instability) -> None:
        """Restore the last good state and change something, or the same would happen again.

        Raises TrainingFailedError when that was done too often.
        """
        from_step = self.step
        assert self.last_good is not None, "there is a good state from the first step on"
        if self.governor.patience_spent:
            way_out = "try a lower training.optimizer.learning_rate"
            if from_step == 0:
                way_out = "it was so before the first update: look for NaN in the data, model.weights and the task"
            raise TrainingFailedError(
                f"training is unstable at step {from_step} ({unstable.reason}) "
                f"after {self.governor.own_rollbacks} rollbacks; {way_out}"
            )
        broken = self._broken_seeds()
        self.restore(self.last_good)
        # A seed that is grafted again later has another graft.
        self.snapshots.forget_from(self.step + 1)
        self.governor.rollbacks += 1
        blamed = [record.seed for record in self.coordinator.alive() if record.state in _ROLLBACK_STATES]
        blamed = [seed for seed in blamed if seed in broken] or blamed
        if blamed:
            transitions = self.engine.roll_back(blamed, step=self.step, reason=unstable.reason)
            self.coordinator.follow(transitions, self.epoch)
        else:
            self.optimizer.rate_scale *= self.config.governor.rate_scale
        self.reporter.rolled_back(from_step=from_step, to_step=self.step, reason=unstable.reason, seeds=blamed)
        self._remember()

    def _broken_seeds(self) -> set[str]:
        """Seeds whose own weights are not finite while the host's are: it is plain who broke the training."""
        broken = {
            group.name
            for group in self.engine.parameter_groups()
            if not all(bool(parameter.isfinite().all()) for parameter in group.parameters)
        }
        return set() if "host" in broken else broken

    def _roll_back_to_checkpoint(self, command: Command) -> None:
        """A caller's rollback, journaled like all that changes a run; refused when the checkpoint is not there."""
        if self.journal.knows("rollback", command.command_id):
            self.reporter.answered(CommandResult(command=command, step=self.step, checkpoint_step=self.step))
            return
        # A rewind that the disk refused to save leaves checkpoints of steps that lie ahead of the run.
        saved = self.checkpoints.steps() if self.checkpoints is not None else []
        steps = [step for step in saved if step <= self.step]
        wanted = int(command.checkpoint) if command.checkpoint else max(steps, default=-1)
        if self.checkpoints is None or wanted not in steps:
            self.reporter.answered(
                CommandResult(
                    command=command,
                    step=self.step,
                    error_reason="CHECKPOINT_NOT_FOUND",
                    error_message=f"there is no checkpoint of step {wanted}; there are {steps}",
                )
            )
            return
        content = {"command": asdict(command), "checkpoint": wanted}
        self._apply_rollback(self.journal.append("rollback", self.clock, content))

    def _apply_rollback(self, entry: Entry) -> None:
        """Go back to the checkpoint that a journaled rollback names. Raises CheckpointError when it cannot be read."""
        assert self.checkpoints is not None, "a rollback is journaled only where there are checkpoints"
        command = Command.from_json(entry.content["command"])
        from_step, reason = self.step, command.reason or "asked for by a caller"
        state = self.checkpoints.load(entry.content["checkpoint"])
        self.restore(state)
        self._recall(state)
        self.governor.rollbacks += 1
        self.governor.asked_for += 1
        self.checkpoints.discard_after(self.step)
        self._remember()
        # Saved at once, over the old one: a resume must not walk into the past that was taken back.
        self.save()
        self.reporter.rolled_back(from_step=from_step, to_step=self.step, reason=reason, seeds=[])
        self.reporter.answered(CommandResult(command=command, step=self.step, checkpoint_step=self.step))

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _finish(self, started: float) -> ArmResult:
        """Settle the seeds that are still under way, then touch the test set, for the first and last time."""
        self.reporter.state(run_pb2.RUN_STATE_FINISHING, "the schedule is over")
        if self.grow:
            self.coordinator.finish(self.epoch, self.step, self._measure_contributions)
            self._only_removed("the schedule is over")
        self._bill_time(growth=True)
        if self.average is not None:
            self.average.install()
        self.validation = self._judge(self.data.validation)
        self.test_set.unlock()
        self.test = self._judge(self.test_set.take())
        return ArmResult(
            arm=self.arm,
            test_accuracy=self.test.accuracy,
            test_interval=accuracy_interval(self.test.accuracy, len(self.test.scores)),
            test_samples=len(self.test.scores),
            validation_accuracy=self.validation.accuracy,
            parameters=self.parameter_count(),
            flops=self.flops,
            steps=self.step,
            seconds=time.perf_counter() - started,
            start_accuracy=self.accuracies[0] if self.trained else None,
            **self.account.state(),
        )

    def parameter_count(self) -> int:
        """Parameters of the network as of now."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _bill_time(self, *, growth: bool = False) -> None:
        spent = self._clock.lap()
        self.account.cpu_seconds += spent.cpu_seconds
        if growth and self.grow:
            self.account.growth_cpu_seconds += spent.cpu_seconds
            self.account.growth_seconds += spent.seconds


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _nested(state: State) -> State | None:
    """The last good state inside a checkpoint; None if the checkpoint is it."""
    if "last_good" not in state.values:
        return None
    return State(_named(state.tensors, "last_good/"), state.values["last_good"])

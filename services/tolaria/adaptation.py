"""Carries adaptations from a decision to their outcome, always at safe points, always through the journal.

A plan becomes seeds (GERMINATED) at once; their kernels are resolved or compiled meanwhile; when all of a plan's are
there, they are grafted together at the next safe point. Whatever came from outside is journaled before it is applied,
and applying is a function of the journal's entry alone: a replay is the same call.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Protocol

from services.blueprints.spec import Blueprint, Interface
from services.chassis.config.schema import GrowthConfig
from services.chassis.errors import Reason
from services.chassis.telemetry import ROOT, Telemetry, context_from, current_traceparent, link_to
from services.kasmina.engine import GrowthEngine
from services.kasmina.errors import SlotUnavailableError, UnknownSeedError, UnknownSlotError
from services.kasmina.lifecycle import ALIVE, IllegalTransitionError, SeedState
from services.kasmina.model import Contribution, HealthReport, Replacement, SeedRecord, SeedTransition
from services.tolaria.errors import JournalError
from services.tolaria.journal import Clock, Entry, Journal
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.observation import Situation, observe
from services.tolaria.ports import (
    Command,
    CommandKind,
    CommandResult,
    Decision,
    KernelRequest,
    KernelTarget,
    KernelUnavailableError,
    Mesh,
    NoDecision,
    PlannedChange,
)
from services.tolaria.seeds import derive

_LOG: Final = logging.getLogger(__name__)
#: What each group of seeds is worth together, on the network as it is.
Measure = Callable[[Sequence[Sequence[str]]], list[Contribution]]
#: Longest wait for one kernel under growth.wait_for_kernel, seconds.
_KERNEL_WAIT_SECONDS: Final = 120.0


class UnknownBlueprintError(ValueError):
    """Nobody offers that blueprint."""


_REASONS: Final[Mapping[type[ValueError], Reason]] = {
    UnknownBlueprintError: Reason.UNKNOWN_BLUEPRINT,
    UnknownSlotError: Reason.SLOT_NOT_FOUND,
    SlotUnavailableError: Reason.SLOT_NOT_FREE,
    UnknownSeedError: Reason.SEED_NOT_FOUND,
    IllegalTransitionError: Reason.ILLEGAL_TRANSITION,
}


class Witness(Protocol):
    """Hears what happens to the seeds: ``services.tolaria.reporting``."""

    def decided(self, decision: Decision | NoDecision, clock: Clock, epoch: int) -> None:
        """Tamiyo answered, or did not."""
        ...

    def transitioned(self, transitions: Sequence[SeedTransition], engine: GrowthEngine, epoch: int) -> None:
        """Seeds changed their states."""
        ...

    def ended(self, record: SeedRecord, decision: str) -> None:
        """A seed's life is over: FOSSILIZED, CULLED, CANCELLED or ROLLED_BACK."""
        ...

    def answered(self, result: CommandResult) -> None:
        """A caller's command was applied or refused."""
        ...


@dataclass
class _Story:
    """What the coordinator must remember beyond the engine's records; part of every checkpoint."""

    next_seed: int = 1
    #: Version of the policy that made the first decision: a run stays with the version it started with.
    policy: str = ""
    #: Commands obeyed, and the seed each made: a gateway may pass one on again.
    commands: dict[str, str] = field(default_factory=dict)
    #: Commands refused, with reason and message: what a caller was told stays true when the command comes again.
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: Decision or command that each seed came from: seeds of one origin are grafted together.
    origins: dict[str, str] = field(default_factory=dict)
    #: Seeds that came from a decision of Tamiyo's, and its id.
    decisions: dict[str, str] = field(default_factory=dict)
    #: Blueprints that seeds were made of or decisions offered, as JSON by id.
    blueprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Interface each seed was germinated for, as JSON: what its kernel is bound to, whatever grows beside it meanwhile.
    interfaces: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: W3C traceparent of each origin: the spans of an adaptation are one trace, however long it takes.
    traces: dict[str, str] = field(default_factory=dict)
    #: Seeds whose end was told, and why they ended: a free slot makes the engine forget that.
    ended: dict[str, str] = field(default_factory=dict)
    #: Optimizer steps that seeds which are gone took part in.
    steps: dict[str, int] = field(default_factory=dict)
    #: Step at which each seed was grafted.
    grafted: dict[str, int] = field(default_factory=dict)
    #: Seeds culled after grafting whose steps are still to be taken back, under evaluation.cull: rewind.
    to_rewind: list[str] = field(default_factory=list)
    #: Seeds whose steps were taken back.
    rewound: list[str] = field(default_factory=list)


def _copied(story: Mapping[str, Any]) -> dict[str, Any]:
    # One level deep: what the containers hold is written once and never changed, and a state is taken at every epoch.
    return {name: copy(value) for name, value in story.items()}


class AdaptationCoordinator:
    """The adaptations of one run. All methods belong to the training thread.

    ``bind`` comes first, and again whenever a restored state made a new engine.
    """

    def __init__(
        self,
        *,
        run: str,
        config: GrowthConfig,
        seed: int,
        mesh: Mesh,
        journal: Journal,
        shelf: KernelShelf | None,
        telemetry: Telemetry,
        witness: Witness,
        on_change: Callable[[Iterable[Replacement]], None],
        not_before: Mapping[int, int] | None = None,
    ) -> None:
        self._run = run
        self._config = config
        self._seed = seed
        self._mesh = mesh
        self._journal = journal
        self._shelf = shelf
        self._telemetry = telemetry
        self._witness = witness
        #: Told after every change of the network: the trainer syncs its optimizer.
        self._on_change = on_change
        #: Earliest step to graft at what was germinated at a step: a control waits for kernels as long as its run did.
        self._not_before = not_before or {}
        self._engine: GrowthEngine | None = None
        self._story = _Story()
        self._requests: dict[str, KernelRequest] = {}

    @property
    def engine(self) -> GrowthEngine:
        """The engine of the network as of now."""
        assert self._engine is not None, "bind() must come before anything else"
        return self._engine

    def bind(self, engine: GrowthEngine, story: Mapping[str, Any] | None = None) -> None:
        """Work on ``engine`` from now on; ``story`` is what :meth:`state` returned when the engine's state was saved.

        Kernels on their way are asked for again: a request is not part of a state.
        """
        for request in self._requests.values():
            request.cancel()
        self._requests.clear()
        self._engine = engine
        if story is not None:
            # A number once given is never given again, or a rollback would make two seeds of one name.
            next_seed = max(self._story.next_seed, int(story["next_seed"]))
            self._story = _Story(**{**_copied(story), "next_seed": next_seed})

    def state(self) -> dict[str, Any]:
        """As JSON, for the checkpoint."""
        return _copied({item.name: getattr(self._story, item.name) for item in fields(self._story)})

    # ---- decisions -------------------------------------------------------------------------------------------------

    def decide(self, situation: Situation, health: HealthReport | None, clock: Clock) -> None:
        """Ask Tamiyo (or the journal) for a plan and germinate it. Raises JournalError."""
        entry = self._journal.next_at(clock, "decision")
        if entry is None:
            if self._journal.replaying:
                raise JournalError(f"the journal knows no decision at step {clock.step}, but something later")
            entry = self._journal.append("decision", clock, self._ask(situation, health, clock))
        self._apply_decision(entry, situation.epoch)

    def _ask(self, situation: Situation, health: HealthReport | None, clock: Clock) -> dict[str, Any]:
        candidates = self._mesh.candidates()
        answer: Decision | NoDecision = NoDecision("Urza names no blueprint for this run", 0.0)
        if candidates:
            answer = self._mesh.decide(
                observe(situation, self.engine, health, candidates),
                policy=self._story.policy or self._config.policy,
                request_id=f"{self._run}-{clock.rollbacks}-{situation.epoch}",
                deadline=self._config.decision_deadline_seconds,
            )
        return {"answer": asdict(answer), "blueprints": {item.id: item.to_json() for item in candidates}}

    def _apply_decision(self, entry: Entry, epoch: int) -> None:
        self._story.blueprints |= entry.content["blueprints"]
        answer = _answer(entry.content["answer"])
        self._witness.decided(answer, entry.clock, epoch)
        if isinstance(answer, NoDecision):
            return
        self._story.policy = self._story.policy or answer.policy
        if not answer.plan:
            return
        with self._adaptation(answer.decision):
            for index, change in enumerate(answer.plan):
                try:
                    made = self._germinate(change, f"{answer.decision}-{index}", answer.decision, entry.clock, epoch)
                except ValueError as error:
                    _LOG.warning("%s: %s was not germinated: %s", answer.decision, change.slot, error)
                else:
                    self._story.decisions[made.seed] = answer.decision

    @contextlib.contextmanager
    def _adaptation(self, origin: str) -> Iterator[None]:
        """The first span of an adaptation: a trace of its own, linked to the span of the epoch it begins in."""
        cause = link_to(current_traceparent())
        with self._telemetry.span("adaptation", {"esper.origin": origin}, parent=ROOT, links=[cause]):
            self._story.traces[origin] = current_traceparent() or ""
            yield

    def _span(self, name: str, origin: str) -> contextlib.AbstractContextManager[object]:
        # Linked to what the loop does at the moment: the adaptation's trace says why, the epoch's says when.
        cause = link_to(current_traceparent())
        parent = context_from(self._story.traces.get(origin))
        return self._telemetry.span(name, {"esper.origin": origin}, parent=parent, links=[cause])

    def _germinate(self, change: PlannedChange, command_id: str, origin: str, clock: Clock, epoch: int) -> SeedRecord:
        """The new seed. Raises ValueError: a plan may be stale, a caller may be wrong."""
        if change.blueprint not in self._story.blueprints:
            raise UnknownBlueprintError(f"Urza offers no blueprint {change.blueprint!r} for this run")
        blueprint = Blueprint.from_json(self._story.blueprints[change.blueprint])
        record = self.engine.germinate(
            seed_id=f"seed-{self._story.next_seed}",
            slot=change.slot,
            blueprint=blueprint.id,
            family=blueprint.family,
            size=change.size,
            command_id=command_id,
            step=clock.step,
            epoch=epoch,
        )
        self._story.next_seed += 1
        self._story.origins[record.seed] = origin
        self._story.interfaces[record.seed] = self.engine.interface(record.slot).to_json()
        born = SeedTransition(
            seed=record.seed,
            slot=record.slot,
            from_state=SeedState.DORMANT,
            to_state=SeedState.GERMINATED,
            step=clock.step,
            epoch=epoch,
            command_id=command_id,
            reason=change.reason,
        )
        self._witness.transitioned([born], self.engine, epoch)
        return record

    # ---- safe points -----------------------------------------------------------------------------------------------

    def safe_point(self, clock: Clock, epoch: int) -> bool:
        """Apply what is due between two steps; True if the network changed. Raises JournalError.

        While the journal is replayed only the journal is heard; otherwise commands and kernels that arrived.
        """
        changed = False
        if self._journal.replaying:
            while (entry := self._journal.next_at(clock, *_APPLIED_AT_SAFE_POINTS)) is not None:
                changed |= self._apply(entry, epoch)
            return changed
        for kind, content in self._arrivals(clock, epoch):
            changed |= self._apply(self._journal.append(kind, clock, content), epoch)
        return changed

    def command(self, command: Command, clock: Clock, epoch: int) -> bool:
        """Journal and apply a caller's adaptation; True if the network changed. The same id twice is one adaptation."""
        if command.command_id in self._story.commands:
            seed = self._story.commands[command.command_id]
            self._witness.answered(CommandResult(command=command, step=clock.step, seed=seed))
            return False
        if command.command_id in self._story.refusals:
            self._refuse(command, clock.step, command.seed)
            return False
        blueprints = {item.id: item.to_json() for item in self._mesh.candidates() if item.id == command.blueprint}
        content = {"command": asdict(command), "blueprints": blueprints}
        return self._apply(self._journal.append("command", clock, content), epoch)

    def _arrivals(self, clock: Clock, epoch: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Plans whose kernels have all been found or not, and plans that waited too long."""
        waiting = [record for record in self.engine.seeds() if record.state is SeedState.GERMINATED]
        for origin in dict.fromkeys(self._story.origins[record.seed] for record in waiting):
            group = [record for record in waiting if self._story.origins[record.seed] == origin]
            if clock.step < self._not_before.get(group[0].germinated_step, 0):
                continue
            requests = {record.seed: self._request(record) for record in group}
            overdue = epoch - group[0].germinated_epoch >= self._config.kernel_timeout_epochs
            if self._config.wait_for_kernel or overdue or all(request.done for request in requests.values()):
                yield "load", self._collect(requests)

    def await_kernels(self, seconds: float) -> None:
        """Wait for the kernels of all seeds, at most this long in all; only before the first step."""
        if self._journal.replaying:
            return
        until = time.monotonic() + seconds
        for record in self.alive():
            # What does not come in time comes at a later safe point, or is refused there.
            with contextlib.suppress(KernelUnavailableError):
                self._request(record).result(max(0.0, until - time.monotonic()))

    def _request(self, record: SeedRecord) -> KernelRequest:
        if record.seed not in self._requests:
            target = KernelTarget(
                blueprint=Blueprint.from_json(self._story.blueprints[record.blueprint]),
                interface=Interface.from_json(self._story.interfaces[record.seed]),
                size=record.size,
                init_seed=derive(self._seed, "kernel", record.seed),
            )
            with self._span("request kernel", self._story.origins[record.seed]):
                self._requests[record.seed] = self._mesh.obtain_kernel(target)
        return self._requests[record.seed]

    def _collect(self, requests: Mapping[str, KernelRequest]) -> dict[str, Any]:
        kernels, failed = {}, {}
        wait = _KERNEL_WAIT_SECONDS if self._config.wait_for_kernel else 0.0
        for seed, request in requests.items():
            try:
                kernels[seed] = request.result(wait)
            except KernelUnavailableError as error:
                failed[seed] = str(error)
        return {"kernels": kernels, "failed": failed}

    def _apply(self, entry: Entry, epoch: int) -> bool:
        if entry.kind == "load":
            return self._apply_load(entry, epoch)
        return self._apply_command(entry, epoch)

    def _apply_load(self, entry: Entry, epoch: int) -> bool:
        transitions: list[SeedTransition] = []
        step = entry.clock.step
        for seed, reason in entry.content["failed"].items():
            transitions += self.engine.cancel(seed, step=step, reason=reason)
        for seed, digest in entry.content["kernels"].items():
            assert self._shelf is not None, "a kernel comes through the shelf"
            try:
                kernel = self._shelf.take(digest)
            except KernelUnavailableError as error:
                transitions += self.engine.cancel(seed, step=step, reason=str(error))
            else:
                with self._span("graft", self._story.origins[seed]):
                    transitions += self.engine.load(seed, kernel, step=step, digest=digest, epoch=epoch)
        for seed in (*entry.content["failed"], *entry.content["kernels"]):
            if (request := self._requests.pop(seed, None)) is not None:
                request.cancel()
        return self.follow(transitions, epoch)

    def _apply_command(self, entry: Entry, epoch: int) -> bool:
        command = Command.from_json(entry.content["command"])
        self._story.blueprints |= entry.content["blueprints"]
        transitions: list[SeedTransition] = []
        step, seed = entry.clock.step, command.seed
        try:
            if command.kind is CommandKind.GERMINATE:
                change = PlannedChange(command.slot, command.blueprint, command.size, command.reason)
                with self._adaptation(command.command_id):
                    seed = self._germinate(change, command.command_id, command.command_id, entry.clock, epoch).seed
            else:
                transitions = self.engine.cull(seed, step=step, reason=command.reason or "asked for by a caller")
        except ValueError as error:
            self._story.refusals[command.command_id] = (_reason_of(error), str(error))
            self._refuse(command, step, seed)
            return False
        self._story.commands[command.command_id] = seed
        self._witness.answered(CommandResult(command=command, step=step, seed=seed))
        return self.follow(transitions, epoch)

    def _refuse(self, command: Command, step: int, seed: str) -> None:
        reason, message = self._story.refusals[command.command_id]
        self._witness.answered(
            CommandResult(command=command, step=step, seed=seed, error_reason=reason, error_message=message)
        )

    # ---- the lives of seeds ----------------------------------------------------------------------------------------

    def follow(self, transitions: Sequence[SeedTransition], epoch: int) -> bool:
        """Let optimizer and listeners follow what the engine did; True if it did anything."""
        if not transitions:
            return False
        self._on_change([fusion for transition in transitions for fusion in transition.replaced])
        records = {record.seed: record for record in self.engine.seeds()}
        for seed in dict.fromkeys(transition.seed for transition in transitions):
            with self._span("transition", self._story.origins.get(seed, "")):
                story = [transition for transition in transitions if transition.seed == seed]
                self._witness.transitioned(story, self.engine, epoch)
                for transition in story:
                    if transition.to_state is SeedState.GRAFTING:
                        self._story.grafted[seed] = transition.step
                if records[seed].outcome is not None and seed not in self._story.ended:
                    self._story.ended[seed] = records[seed].reason
                    born = records[seed].birth_step
                    self._story.steps[seed] = story[-1].step - born if born is not None else 0
                    if self._left_steps(records[seed], story[-1].step):
                        self._story.to_rewind.append(seed)
                    self._witness.ended(records[seed], self._story.decisions.get(seed, ""))
        return True

    def _left_steps(self, record: SeedRecord, step: int) -> bool:
        """Whether a seed that ended at ``step`` was culled with steps to be taken back: made since its graft."""
        if self._config.evaluation.cull != "rewind" or record.outcome is not SeedState.CULLED:
            return False
        return record.graft_epoch is not None and self._story.grafted.get(record.seed) != step

    def grafted_at(self, step: int) -> set[str]:
        """Seeds that were grafted at ``step``."""
        return {seed for seed, grafted in self._story.grafted.items() if grafted == step}

    @property
    def to_rewind(self) -> tuple[str, ...]:
        """Seeds culled after grafting whose steps are still to be taken back."""
        return tuple(self._story.to_rewind)

    def settle_rewind(self, note: str, *, rewound: bool) -> None:
        """Nothing is left to be taken back: it was, or could not be. ``note`` becomes part of the seeds' reasons."""
        for seed in self._story.to_rewind:
            self.engine.explain(seed, note)
            self._story.ended[seed] += f"; {note}"
        self._story.rewound += self._story.to_rewind if rewound else []
        self._story.to_rewind.clear()

    def traceless(self, record: SeedRecord) -> bool:
        """Whether a seed is gone as if it had never been: it left before its graft, or its steps were taken back."""
        if record.outcome not in {SeedState.CANCELLED, SeedState.CULLED}:
            return False
        return record.graft_epoch is None or record.seed in self._story.rewound

    def reason(self, record: SeedRecord) -> str:
        """Why a seed is what it is, or how it ended."""
        return self._story.ended.get(record.seed, record.reason)

    def decision(self, record: SeedRecord) -> str | None:
        """Id of Tamiyo's decision that a seed came from; None for one that a caller asked for."""
        return self._story.decisions.get(record.seed)

    def trial_steps(self, record: SeedRecord) -> int:
        """Optimizer steps that a culled seed took part in; 0 for every other."""
        return self._story.steps.get(record.seed, 0) if record.outcome is SeedState.CULLED else 0

    def alive(self) -> list[SeedRecord]:
        """Seeds under way: neither fossilized nor gone."""
        return [record for record in self.engine.seeds() if record.state in ALIVE]

    def evaluate_due(self, epoch: int, step: int, measure: Measure) -> bool:
        """Measure each seed that is due and let the engine judge; True if the network changed."""
        return self.follow(self._judge(self.engine.due_for_evaluation(epoch), epoch, step, measure), epoch)

    def _judge(self, seeds: Sequence[str], epoch: int, step: int, measure: Measure) -> list[SeedTransition]:
        """Measure each of these seeds alone, and those of one decision together.

        All are measured before any is judged: on the same network, so that each can be judged alone.
        """
        if not seeds:
            return []
        fresh = [seed for seed in seeds if self.engine.seed(seed).plan_contribution is None]
        plans: dict[str, list[str]] = {}
        for seed in fresh:
            plans.setdefault(self._story.origins[seed], []).append(seed)
        plans = {origin: plan for origin, plan in plans.items() if len(plan) > 1}
        worths = measure([*([seed] for seed in seeds), *plans.values()])
        together = dict(zip(plans, worths[len(seeds) :], strict=True))
        transitions: list[SeedTransition] = []
        for seed, worth in zip(seeds, worths[: len(seeds)], strict=True):
            plan = together.get(self._story.origins[seed])
            transitions += self.engine.record_contribution(seed, worth, step=step, epoch=epoch, plan=plan)
        return transitions

    def finish(self, epoch: int, step: int, measure: Measure) -> None:
        """The schedule is over: judge what can be judged now and remove the rest, so that no seed is left half-way."""
        transitions: list[SeedTransition] = []
        for record in self.alive():
            if record.state is SeedState.GERMINATED:
                transitions += self.engine.cancel(record.seed, step=step, reason="the run ended before its kernel came")
        self.follow(transitions, epoch)
        # Twice, because a doubtful seed is measured once more before it is culled.
        for _ in range(2):
            evaluating = [record.seed for record in self.alive() if record.state is SeedState.EVALUATING]
            self.follow(self._judge(evaluating, epoch, step, measure), epoch)
        for record in self.alive():
            self.follow(
                self.engine.cull(record.seed, step=step, reason="the run ended before it was settled"),
                epoch,
            )


def _reason_of(error: ValueError) -> str:
    """The reason of the mesh's table for what the engine refused."""
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), Reason.BLUEPRINT_DOES_NOT_FIT)


_APPLIED_AT_SAFE_POINTS: Final = ("load", "command")


def _answer(content: Mapping[str, Any]) -> Decision | NoDecision:
    if "decision" not in content:
        return NoDecision(**content)
    plan = tuple(PlannedChange(**change) for change in content["plan"])
    return Decision(**{**content, "plan": plan, "evidence": tuple(content["evidence"])})

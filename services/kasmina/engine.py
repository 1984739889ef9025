"""The growth engine: takes seeds through their life in a network that trains.

It runs in the training thread, does no I/O, knows no clock and draws nothing from the global random streams.
Every change of the network happens inside one of its methods, which the trainer calls at safe points.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.blueprints import families
from services.blueprints.artifact import Kernel
from services.blueprints.builder.branches import build_branch, load_tensors
from services.blueprints.signature import interface_signature
from services.blueprints.spec import Interface, SlotKind, SpecError, channels_of
from services.chassis.config.schema import GrowthConfig
from services.kasmina import blending, health
from services.kasmina.blending import BlendState, Evidence
from services.kasmina.branches import Bridge
from services.kasmina.errors import (
    CommandConflictError,
    GrowthError,
    SlotUnavailableError,
    UnknownSeedError,
    UnknownSlotError,
)
from services.kasmina.graph import analyze, with_named_layers
from services.kasmina.lifecycle import (
    ALIVE,
    FAMILY_PATHS,
    TRANSITIONS,
    IllegalTransitionError,
    SeedState,
    check_transition,
    next_on_path,
)
from services.kasmina.merging import merge
from services.kasmina.model import (
    Contribution,
    CostTerm,
    HealthReport,
    LayerChange,
    ParameterGroup,
    Replacement,
    SeedRecord,
    SeedTransition,
    SlotInfo,
    SlotOccupancy,
    SlotStatus,
)
from services.kasmina.saved import BranchPlan, SavedTopology, record_json
from services.kasmina.topology import GrowingNetwork
from services.kasmina.widening import HOST, Draw

PENALTY_PER_CULL = 1.0
LOCK_FACTOR = 2
"""A lock after a rollback lasts this many times the embargo after a cull."""

_SEED_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LEAVING = frozenset({SeedState.CULLED, SeedState.CANCELLED, SeedState.ROLLED_BACK})
_Loss = Callable[[Tensor, Tensor], Tensor]


class GrowthEngine:
    """Grows ``model`` in place.

    Attributes:
        model: The host, always the same object.
        run: Id of the run.

    Args:
        model: Any module whose forward takes one tensor. It is analyzed once and not changed until a seed is loaded.
        example_input: A batch of inputs on the model's device, at least two samples.
        run: Id of the run.
        settings: What the user configured.
        outputs: Logits of the model; own losses of isolated branches have as many.
        seed: Root of the engine's private draws (heads of own losses; kernels carry their own seeds).
    """

    def __init__(
        self, model: nn.Module, example_input: Tensor, *, run: str, settings: GrowthConfig, outputs: int, seed: int
    ) -> None:
        self.model = model
        self.run = run
        self._settings = settings
        self._outputs = outputs
        self._seed = seed
        self._analysis = with_named_layers(analyze(model, example_input), settings.slots or ())
        self._network = GrowingNetwork(model, self._analysis)
        self._refused = dict(self._analysis.refused)
        self._slots = self._select()
        self._records: dict[str, SeedRecord] = {}
        self._history: list[SeedTransition] = []
        self._plans: dict[str, BranchPlan] = {}
        self._penalties: dict[str, dict[str, float]] = {}
        self._quarantined: set[str] = set()
        self._commands: dict[str, str] = {}
        self._measured: set[str] = set()
        self._step = 0
        self._epoch = 0

    def _select(self) -> tuple[str, ...]:
        names = (*self._analysis.slots, *self._analysis.spans)
        patterns = self._settings.slots
        if patterns is None:
            return names
        chosen = tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        self._refused.update({name: "not selected by growth.slots" for name in names if name not in chosen})
        return chosen

    # ------------------------------------------------------------------ looking

    def reshape(self, extra: Mapping[str, int]) -> None:
        """Give an ungrown host the plain layers that it would have with ``extra`` channels per WIDTH slot.

        For measuring what a shape costs: the new layers' weights are not initialized.
        """
        self._network.reset(extra)

    def slots(self) -> list[SlotInfo]:
        """Places where the network can grow: WIDTH slots in forward order, then SPANs."""
        found: list[SlotInfo] = []
        for name in self._slots:
            width = self._analysis.slots.get(name)
            if width is None:
                span = self._analysis.spans[name]
                channels = self._network.interface(name).width
                found.append(SlotInfo(name, SlotKind.SPAN, channels, channels_of(span.output_shape)))
                continue
            present = self._network.width(name)
            found.append(
                SlotInfo(name, SlotKind.WIDTH, present, width.width, width.writers, width.followers, width.readers)
            )
        return found

    def refused(self) -> dict[str, str]:
        """Module path of what cannot grow, with the reason; the path ``""`` is the whole network."""
        return dict(self._refused)

    def interface(self, slot: str) -> Interface:
        """Shapes and layers that a blueprint for this slot must fit, as of now.

        Raises:
            UnknownSlotError: There is no such slot.
        """
        self._check_slot(slot)
        return self._network.interface(slot)

    def cost_terms(self) -> list[CostTerm]:
        """Cost of the network as a function of the widths of its slots; what branches cost is in the fixed term."""
        flops = sum(record.flops for record in self._bridged())
        parameters = sum(record.parameters for record in self._bridged())
        terms = []
        for cost in self._analysis.costs:
            # Widths that growth.slots does not select are constants to whoever plans.
            fixed = math.prod(self._network.width(slot) for slot in cost.slots if slot not in self._slots)
            free = tuple(slot for slot in cost.slots if slot in self._slots)
            terms.append(CostTerm(cost.flops * fixed, cost.parameters * fixed, free))
        if flops or parameters:
            terms.append(CostTerm(float(flops), float(parameters)))
        return terms

    def _bridged(self) -> list[SeedRecord]:
        return [self._records[graft.seed] for graft in self._network.grafts.values() if graft.bridge is not None]

    def flops(self) -> int:
        """Forward FLOPs per sample (2 per multiply-add), branches included."""
        return round(sum(term.flops * self._product(term) for term in self.cost_terms()))

    def parameters(self) -> int:
        """Parameters of the network, heads of own losses not counted."""
        return round(sum(term.parameters * self._product(term) for term in self.cost_terms()))

    def _product(self, term: CostTerm) -> int:
        return math.prod(self._network.width(slot) for slot in term.slots)

    def seeds(self) -> list[SeedRecord]:
        """All seeds of the run, oldest first, those that are gone included."""
        return list(self._records.values())

    def seed(self, seed_id: str) -> SeedRecord:
        """One seed.

        Raises:
            UnknownSeedError: There is none of that id.
        """
        record = self._records.get(seed_id)
        if record is None:
            raise UnknownSeedError(f"there is no seed {seed_id!r}")
        return record

    def transitions(self) -> list[SeedTransition]:
        """All transitions since this engine was made, oldest first."""
        return list(self._history)

    def slot_status(self, slot: str, epoch: int) -> SlotStatus:
        """Whether a slot can take a seed in ``epoch``.

        A WIDTH slot can grow again while its last widening waits for its evaluation; a SPAN cannot.

        Raises:
            UnknownSlotError: There is no such slot.
        """
        self._check_slot(slot)
        here = [record for record in self._records.values() if record.slot == slot]
        penalties = self._penalties.get(slot, {})
        staying = tuple(r.seed for r in here if r.state in ALIVE or r.state is SeedState.FOSSILIZED)
        stackable = {SeedState.EVALUATING} if slot in self._analysis.slots else set()
        if any(record.state in ALIVE - stackable for record in here):
            return SlotStatus(SlotOccupancy.OCCUPIED, None, penalties, staying)
        for state, occupancy in (
            (SeedState.ROLLED_BACK, SlotOccupancy.LOCKED),
            (SeedState.CULLED, SlotOccupancy.EMBARGO),
        ):
            until = [r.free_epoch for r in here if r.state is state and r.free_epoch is not None]
            if until and max(until) > epoch:
                return SlotStatus(occupancy, max(until), penalties, staying)
        return SlotStatus(SlotOccupancy.FREE, None, penalties, staying)

    def penalties(self, slot: str) -> dict[str, float]:
        """Penalty of each blueprint that failed in a slot, by blueprint id."""
        return dict(self._penalties.get(slot, {}))

    def quarantined(self) -> frozenset[str]:
        """Blueprints that the governor blamed for a rollback; they are refused for the rest of the run."""
        return frozenset(self._quarantined)

    def growth_table(self) -> list[LayerChange]:
        """What growth changed so far: widened layers in forward order, then branches in the order of their grafting."""
        rows = self._network.changes()
        for record in self._bridged():
            plan = self._plans[record.seed]
            family, interface = families.FAMILIES[record.family], plan.interface
            reads, writes = _ends(family, interface)
            rows.append(
                LayerChange(
                    path=self._analysis.spans[record.slot].path,
                    operation=f"branch:{record.family}",
                    before_shape=(),
                    after_shape=(reads, record.size, writes),
                    layers=family.layers(plan.blueprint.parameters, interface, record.size),
                    spatial=len(interface.output_shape) == 3,
                    source=family.source,
                )
            )
        return rows

    def health_samples_needed(self) -> int:
        """Images that a health measurement needs so that no slot stays unmeasured."""
        slots = [self._analysis.slots[name] for name in self._slots if name in self._analysis.slots]
        features = [self._network.width(slot.name) * slot.unit for slot in slots]
        features = features or [probe.width for probe in self._span_probes()]
        return health.SAMPLES_PER_CHANNEL * max(features, default=0)

    def _span_probes(self) -> list[health.Probe]:
        """What enters each SPAN whose branch would read and write as many channels."""
        probes = []
        for name in self._slots:
            if (span := self._analysis.spans.get(name)) is None:
                continue
            channels = channels_of(self._network.interface(name).input_shape)
            if channels == self._network.interface(name).width:
                axis = 1 if len(span.input_shape) == 3 else len(span.input_shape)
                reader = health.Reader(self._network.spanned(name), 0, channels, 1, axis)
                probes.append(health.Probe(name, channels, [reader]))
        return probes

    def measure_health(self, batches: Iterable[Tensor], *, gradient_norms: bool = True) -> HealthReport:
        """How much of its width each WIDTH slot uses, on these inputs; where there is none, each SPAN of what enters.

        Evaluation mode, forward only; weights, statistics and random streams stay as they are.
        """
        probes = []
        for name in self._slots:
            slot = self._analysis.slots.get(name)
            if slot is not None:
                readers = [health.Reader(*found) for found in self._network.probes(name)]
                writers = self._network.writer_parameters(name)
                probes.append(health.Probe(name, self._network.width(name), readers, writers, slot.unit))
        # Where layers can be widened, branches are not chosen, and measuring them would be paid for nothing.
        probes = probes or self._span_probes()
        return health.measure(
            self.model, batches, probes, flops_per_sample=float(self.flops()), gradient_norms=gradient_norms
        )

    # ------------------------------------------------------------------ a seed's way in

    def germinate(
        self,
        *,
        seed_id: str,
        slot: str,
        blueprint: str,
        family: str,
        size: int,
        command_id: str,
        step: int,
        epoch: int,
    ) -> SeedRecord:
        """Choose a blueprint for a slot and wait for its kernel. The network stays as it is.

        The same ``command_id`` twice is one germination.

        Raises:
            UnknownSlotError: There is no such slot.
            SlotUnavailableError: The slot is occupied, under embargo or locked.
            CommandConflictError: The command or seed id was used for something else.
            GrowthError: The blueprint is quarantined, the family unknown or not for this slot, the size below 1.
        """
        self._epoch = epoch
        known = self._commands.get(command_id)
        wanted = (slot, blueprint, family, size)
        if known is not None:
            record = self._records[known]
            if (record.slot, record.blueprint, record.family, record.size) != wanted:
                raise CommandConflictError(f"command {command_id!r} was used for seed {known!r}")
            return record
        if not _SEED_ID.fullmatch(seed_id) or seed_id == HOST:
            raise GrowthError(f"seed id {seed_id!r} is not made of letters, digits, '-' and '_'")
        if seed_id in self._records:
            raise CommandConflictError(f"there is a seed {seed_id!r} already")
        status = self.slot_status(slot, epoch)
        if status.occupancy is not SlotOccupancy.FREE:
            until = "" if status.free_epoch is None else f" until epoch {status.free_epoch}"
            raise SlotUnavailableError(f"slot {slot!r} is {status.occupancy}{until}")
        if blueprint in self._quarantined:
            raise GrowthError(f"blueprint {blueprint!r} is quarantined after a rollback")
        interface = self._network.interface(slot)
        _check_family(family, interface, size)
        record = SeedRecord(
            seed=seed_id,
            slot=slot,
            blueprint=blueprint,
            family=family,
            size=size,
            state=SeedState.DORMANT,
            command_id=command_id,
            interface_signature=interface_signature(interface),
            germinated_step=step,
            germinated_epoch=epoch,
        )
        self._records[seed_id] = record
        self._commands[command_id] = seed_id
        self._move(seed_id, SeedState.GERMINATED, step, "a kernel is chosen")
        return self._records[seed_id]

    def load(
        self, seed_id: str, kernel: Kernel, *, step: int, digest: str = "", epoch: int | None = None
    ) -> list[SeedTransition]:
        """Graft a verified kernel.

        A widening enters the forward pass at once with its output unchanged; a branch starts isolated (or blending,
        if ``growth.isolation_steps`` is 0). A kernel that does not fit culls the seed, the host untouched.

        Args:
            seed_id: A germinated seed.
            kernel: The kernel; its digest and signature were verified before it was parsed.
            step: Optimizer step of this safe point.
            digest: SHA-256 of the kernel's file, hex; kept in the record.
            epoch: Epoch of this safe point; the last one the engine heard of if left out.

        Raises:
            UnknownSeedError: There is no such seed.
            IllegalTransitionError: The seed is not germinated.
        """
        self._epoch = self._epoch if epoch is None else epoch
        record = self.seed(seed_id)
        done = [self._move(seed_id, SeedState.LOADING, step, "its kernel is there", kernel=digest)]
        before = self.flops()
        try:
            self._check_kernel(record, kernel)
            if record.slot in self._analysis.slots:
                self._widen(record, kernel)
            else:
                self._bridge(record, kernel)
        except (SpecError, GrowthError) as error:
            return [*done, self._leave(seed_id, SeedState.CULLED, step, f"its kernel does not fit: {error}")]
        manifest = kernel.manifest
        family = families.FAMILIES[record.family]
        interface = manifest.interface
        self._update(
            seed_id,
            birth_step=step,
            parameters=family.parameters(manifest.parameters, interface, record.size),
            flops=family.flops(manifest.parameters, interface, record.size) or 0,
        )
        if record.slot in self._analysis.slots:
            # By the network's own cost: products of an attention are no layers, so the family does not know them.
            self._update(seed_id, flops=self.flops() - before)
            blends = self._network.blends(record.slot)
            self._update(seed_id, alpha=0.0 if blends else 1.0, graft_epoch=self._epoch)
            done.append(self._move(seed_id, SeedState.GRAFTING, step, "widened, output unchanged"))
            if not blends:
                self._network.set_share(seed_id, 1.0)
                done.append(self._move(seed_id, SeedState.EVALUATING, step, "there is nothing to blend"))
            return done
        return [*done, self._advance(seed_id, step, "its branch is built")]

    def _check_kernel(self, record: SeedRecord, kernel: Kernel) -> None:
        manifest = kernel.manifest
        for name, found, expected in (
            ("family", manifest.family, record.family),
            ("size", manifest.size, record.size),
            ("blueprint", manifest.blueprint.id, record.blueprint),
            ("interface", manifest.interface_signature, record.interface_signature),
        ):
            if found != expected:
                raise GrowthError(f"its {name} is {found}, germinated was {expected}")
        families.check_fit(manifest.blueprint, manifest.interface, manifest.size)

    def _widen(self, record: SeedRecord, kernel: Kernel) -> None:
        generator = _generator("widen", kernel.manifest.seed, record.slot)
        draw = Draw(generator, kernel.manifest.initialization.scale)
        self._network.widen(record.seed, record.slot, record.size, draw)

    def _bridge(self, record: SeedRecord, kernel: Kernel) -> None:
        manifest = kernel.manifest
        plan = BranchPlan(manifest.blueprint, manifest.interface)
        bridge = self._build_bridge(record, plan, manifest.seed)
        tensors = {name: torch.from_numpy(array.copy()) for name, array in kernel.tensors.items()}
        load_tensors(bridge.branch, tensors)
        self._plans[record.seed] = plan
        if self._settings.isolation_steps > 0:
            bridge.isolate(self._outputs, _generator("head", self._seed, record.seed))
        self._network.bridge(record.seed, record.slot, record.size, bridge)

    def _build_bridge(self, record: SeedRecord, plan: BranchPlan, seed: int) -> Bridge:
        branch = build_branch(plan.blueprint, plan.interface, record.size, seed)
        reference = next(self.model.parameters())
        branch.to(device=reference.device, dtype=reference.dtype)
        family = families.FAMILIES[record.family]
        reads, writes = _ends(family, plan.interface)
        return Bridge(
            self._network.spanned(record.slot),
            branch,
            reads=reads,
            channels=writes,
            spatial=len(plan.interface.output_shape) == 3,
            source=family.source,
        )

    # ------------------------------------------------------------------ its life

    def tick(self, step: int, loss: float | None = None) -> list[SeedTransition]:
        """Advance what depends on steps: isolation, blending, stabilization. Call after each optimizer step.

        Args:
            step: Optimizer steps made.
            loss: The task's loss in this step, for schedules of alpha that look at it.
        """
        self._step = step
        done: list[SeedTransition] = []
        if not self._network.grafts:
            return done
        for record in [self._records[seed] for seed in self._network.grafts]:
            elapsed = step - record.state_step
            if record.state is SeedState.TRAINING and elapsed >= self._settings.isolation_steps:
                done.append(self._end_isolation(record.seed, step))
            elif record.state is SeedState.GRAFTING:
                done += self._blend(record.seed, step, elapsed, loss)
            elif record.state is SeedState.STABILIZATION and elapsed >= self._settings.stabilization_steps:
                done.append(self._advance(record.seed, step, f"settled for {elapsed} steps"))
        return done

    def _end_isolation(self, seed_id: str, step: int) -> SeedTransition:
        bridge = self._bridge_of(seed_id)
        if seed_id not in self._measured:
            return self._leave(seed_id, SeedState.CULLED, step, "its own loss was never measured while isolated")
        parameters = list(bridge.branch.parameters())
        if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
            return self._leave(seed_id, SeedState.CULLED, step, "its weights are not finite after isolation")
        return self._advance(seed_id, step, f"learned alone for {self._settings.isolation_steps} steps")

    def _blend(self, seed_id: str, step: int, elapsed: int, loss: float | None) -> list[SeedTransition]:
        """One step of a seed's way from alpha 0 to 1."""
        bridge, before = self._network.grafts[seed_id].bridge, self._records[seed_id].blend or BlendState()
        schedule = blending.schedule_of(self._settings, widening=bridge is None)
        seen = Evidence(loss) if bridge is None else bridge.take_evidence(loss)
        after = blending.advance(schedule, self._settings, before, elapsed, seen)
        self._network.set_share(seed_id, after.share)
        self._update(seed_id, alpha=after.share, blend=after)
        if after.share == 1.0:
            if bridge is not None:
                bridge.observed = ""
            return [self._advance(seed_id, step, "alpha reached 1")]
        reason = blending.overdue(schedule, self._settings, after, elapsed)
        return [self._leave(seed_id, SeedState.CULLED, step, reason)] if reason else []

    def _advance(self, seed_id: str, step: int, reason: str) -> SeedTransition:
        """To the next stage of the family's path; sets up what that stage needs."""
        record = self._records[seed_id]
        path = FAMILY_PATHS[families.FAMILIES[record.family].path]
        stages = {
            SeedState.TRAINING: self._settings.isolation_steps,
            SeedState.STABILIZATION: self._settings.stabilization_steps,
            SeedState.FINE_TUNING: self._settings.fine_tuning_steps,
        }
        skip = frozenset(state for state, steps in stages.items() if steps == 0)
        state = next_on_path(path, record.state, skip=skip)
        if state is SeedState.FOSSILIZED:
            return self._fossilize(seed_id, step, reason)
        if state is SeedState.GRAFTING:
            self._bridge_of(seed_id).blend(blending.observed(self._settings))
            self._measured.discard(seed_id)
            self._update(seed_id, graft_epoch=self._epoch)
        transition = self._move(seed_id, state, step, reason)
        self._apply_freeze(seed_id)
        return transition

    def _apply_freeze(self, seed_id: str) -> None:
        bridge = self._network.grafts[seed_id].bridge
        if bridge is not None:
            bridge.branch.requires_grad_(self._records[seed_id].state is not SeedState.STABILIZATION)

    def _bridge_of(self, seed_id: str) -> Bridge:
        return cast("Bridge", self._network.grafts[seed_id].bridge)

    def auxiliary_loss(self, targets: Tensor, loss: _Loss = F.cross_entropy) -> Tensor | None:
        """Sum of the own losses of isolated seeds for the batch that was just forwarded in training mode.

        Add it to the task's loss or run backward on it alone: no gradient reaches the host.

        Args:
            targets: Targets of the batch, as ``loss`` takes them.
            loss: Of (logits, targets).

        Returns:
            A 0-d tensor, or ``None`` when no seed is isolated.
        """
        total: Tensor | None = None
        for graft in self._network.grafts.values():
            if graft.bridge is not None and graft.bridge.logits is not None:
                own = loss(graft.bridge.logits, targets)
                graft.bridge.logits = None
                self._measured.add(graft.seed)
                total = own if total is None else total + own
        return total

    # ------------------------------------------------------------------ worth

    def due_for_evaluation(self, epoch: int) -> list[str]:
        """Seeds whose counterfactual is to be taken now, oldest first."""
        self._epoch = epoch
        due: list[str] = []
        for seed in self._network.grafts:
            record = self._records[seed]
            old_enough = epoch - (record.graft_epoch or 0) >= self._settings.evaluation.min_epochs
            tuned = self._step - record.state_step >= self._settings.fine_tuning_steps
            evaluating = record.state is SeedState.EVALUATING and old_enough
            if evaluating or (record.state is SeedState.FINE_TUNING and tuned):
                due.append(seed)
        return due

    @contextmanager
    def without(self, seed_ids: Iterable[str]) -> Iterator[None]:
        """Exactly the network without these seeds, as long as the context lasts.

        Raises:
            UnknownSeedError: One of them is not in the forward path, or is fused into the host.
        """
        chosen = list(seed_ids)
        for seed in chosen:
            if seed not in self._network.grafts:
                raise UnknownSeedError(f"seed {seed!r} is not in the network as a part of its own")
        with self._network.without(chosen):
            yield

    def record_contribution(
        self,
        seed_id: str,
        contribution: Contribution | None,
        *,
        step: int,
        epoch: int,
        plan: Contribution | None = None,
    ) -> list[SeedTransition]:
        """Judge a seed by its counterfactual.

        An interval above the threshold goes on, one below zero is culled, anything between (and no measurement) is
        measured once more. A seed that is doubtful even then goes on if it did good on the sample and its plan as a
        whole lies above the threshold, else it is culled: many small widenings are each within the noise of a
        validation set that proves their sum, and taking them out one by one ruins the network. With a threshold of
        zero, a seed without any effect on the sample goes.

        Args:
            seed_id: Which seed.
            contribution: What it is worth; ``None``: could not be measured.
            step: Steps made so far.
            epoch: Finished epochs.
            plan: What it is worth together with the other seeds of its decision; the first one counts, later there
                may be fewer left. ``None``: not measured.

        Raises:
            UnknownSeedError: There is no such seed.
            IllegalTransitionError: The seed is not being evaluated.
        """
        self._epoch = epoch
        record = self.seed(seed_id)
        if record.state not in {SeedState.EVALUATING, SeedState.FINE_TUNING}:
            raise IllegalTransitionError(record.state, SeedState.FOSSILIZED, "; it is not being evaluated")
        measurements = record.measurements + 1
        plan = record.plan_contribution or plan
        self._update(
            seed_id,
            contribution=contribution or record.contribution,
            plan_contribution=plan,
            measurements=measurements,
        )
        if contribution is not None:
            worth = _in_words(contribution)
            if self._proven(contribution):
                return [self._advance(seed_id, step, f"worth {worth}")]
            if contribution.high < 0.0:
                return [self._leave(seed_id, SeedState.CULLED, step, f"harmful: {worth}")]
        else:
            worth = "unmeasured"
        if measurements >= 2:
            did_good = contribution is not None and contribution.points > 0.0
            if did_good and self._settings.evaluation.doubtful == "plan" and plan is not None and self._proven(plan):
                reason = f"worth {worth} alone, within the noise; its plan is worth {_in_words(plan)}"
                return [self._advance(seed_id, step, reason)]
            return [self._leave(seed_id, SeedState.CULLED, step, f"no proven worth after two measurements: {worth}")]
        return []

    def _proven(self, contribution: Contribution) -> bool:
        return contribution.low > self._settings.evaluation.threshold and math.isfinite(contribution.low)

    def _fossilize(self, seed_id: str, step: int, reason: str) -> SeedTransition:
        record = self._records[seed_id]
        self._move(seed_id, SeedState.FOSSILIZED, step, reason)
        self._update(seed_id, outcome=SeedState.FOSSILIZED, alpha=1.0)
        if record.slot in self._analysis.spans:
            self._bridge_of(seed_id).settle()
        return self._settled(record.slot)

    def _settled(self, slot: str) -> SeedTransition:
        """Make free what can be free after the last transition, in this slot and of branches that waited for it."""
        replaced = self._fuse_settled(slot)
        self._merge_settled()
        return self._with_replaced(replaced)

    def _merge_settled(self) -> None:
        """Merge fossilized branches into their layers; around a layer that still has seeds of its own they wait.

        Oldest first: a merge uncovers the layer to the branch around it.
        """
        for graft in list(self._network.grafts.values()):
            fossilized = self._records[graft.seed].state is SeedState.FOSSILIZED
            if graft.bridge is not None and fossilized and merge(graft.bridge):
                self._network.remove(graft.seed)
                del self._plans[graft.seed]
                self._update(graft.seed, parameters=0, flops=0)

    def _fuse_settled(self, slot: str) -> list[Replacement]:
        """Fuse fossilized widenings of a slot, oldest first; one above a seed that may still leave has to wait."""
        replaced: list[Replacement] = []
        if slot in self._analysis.slots:
            for seed in self._network.stack(slot):
                if self._records[seed].state is not SeedState.FOSSILIZED:
                    break
                replaced += self._network.absorb(seed)
        return replaced

    def _with_replaced(self, replaced: list[Replacement]) -> SeedTransition:
        self._history[-1] = replace(self._history[-1], replaced=tuple(replaced))
        return self._history[-1]

    # ------------------------------------------------------------------ a seed's way out

    def cancel(self, seed_id: str, *, step: int, reason: str) -> list[SeedTransition]:
        """Withdraw a seed that has not touched the host (germinated or isolated).

        Raises:
            UnknownSeedError: There is no such seed.
            IllegalTransitionError: It is past that.
        """
        self.seed(seed_id)
        return [self._leave(seed_id, SeedState.CANCELLED, step, reason)]

    def cull(self, seed_id: str, *, step: int, reason: str) -> list[SeedTransition]:
        """Remove a seed that is not fossilized. The slot rests, the blueprint is penalized there.

        Culled before it was grafted, the network is bit-identical to one that never had it; later it is exactly
        the network with alpha 0 at its present weights. Who wants its steps taken back too has a state from before
        the graft: see :meth:`take_out`.

        Raises:
            UnknownSeedError: There is no such seed.
            IllegalTransitionError: It is not in a state that can be culled.
        """
        self.seed(seed_id)
        return [self._leave(seed_id, SeedState.CULLED, step, reason)]

    def explain(self, seed_id: str, more: str) -> None:
        """Add to the reason why a seed is in its state. Raises UnknownSeedError."""
        self._update(seed_id, reason=f"{self.seed(seed_id).reason}; {more}")

    def take_out(self, ended: Iterable[SeedRecord], penalties: Mapping[str, Mapping[str, float]]) -> None:
        """Go on without seeds that ended after this state was saved: their records stay, as they ended.

        Right after a graft, before any optimizer step, this leaves the network bit-identical to one without them.

        Args:
            ended: The records of these seeds, as of their end.
            penalties: Of blueprints by slot, as of their end: see :meth:`state`.
        """
        for record in ended:
            if record.seed in self._network.grafts:
                self._network.remove(record.seed)
            self._plans.pop(record.seed, None)
            self._records[record.seed] = record
            self._commands[record.command_id] = record.seed
        self._penalties = {slot: dict(found) for slot, found in penalties.items()}

    def roll_back(self, seed_ids: Iterable[str], *, step: int, reason: str) -> list[SeedTransition]:
        """Remove seeds on the governor's word: their slots are locked, their blueprints quarantined.

        Raises:
            UnknownSeedError: There is no such seed.
            IllegalTransitionError: One of them is fossilized or gone.
        """
        chosen = list(seed_ids)
        for seed_id in chosen:
            check_transition(self.seed(seed_id).state, SeedState.ROLLED_BACK)
        return [self._leave(seed_id, SeedState.ROLLED_BACK, step, reason) for seed_id in chosen]

    def _leave(self, seed_id: str, state: SeedState, step: int, reason: str) -> SeedTransition:
        record = self._records[seed_id]
        check_transition(record.state, state)
        if seed_id in self._network.grafts:
            self._network.remove(seed_id)
        self._plans.pop(seed_id, None)
        self._measured.discard(seed_id)
        rest = {SeedState.CULLED: 1, SeedState.ROLLED_BACK: LOCK_FACTOR}.get(state, 0)
        self._update(seed_id, outcome=state, alpha=0.0, free_epoch=self._epoch + rest * self._settings.embargo_epochs)
        if state is not SeedState.CANCELLED:
            penalties = self._penalties.setdefault(record.slot, {})
            penalties[record.blueprint] = penalties.get(record.blueprint, 0.0) + PENALTY_PER_CULL
        if state is SeedState.ROLLED_BACK:
            self._quarantined.add(record.blueprint)
        self._move(seed_id, state, step, reason)
        return self._settled(record.slot)

    def expire(self, epoch: int) -> list[SeedTransition]:
        """End embargoes and locks that are over by ``epoch``."""
        self._epoch = epoch
        over = [
            record
            for record in self._records.values()
            if record.state in _LEAVING and record.free_epoch is not None and record.free_epoch <= epoch
        ]
        made = []
        for record in over:
            made.append(self._move(record.seed, SeedState.DORMANT, self._step, "its slot is free again"))
            # Of a seed that is gone people want to know how it ended.
            self._update(record.seed, reason=record.reason)
        return made

    # ------------------------------------------------------------------ for the optimizer

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters by owner: the host's first, then those of seeds in the order of their grafting.

        The order is a function of the topology alone, so it is the same after a restore.
        """
        groups: list[ParameterGroup] = []
        owned: set[int] = set()
        for seed in self._network.grafts:
            record = self._records[seed]
            if record.state is SeedState.FOSSILIZED and seed in self._plans:
                continue
            parameters = tuple(self._network.parameters_of(seed))
            owned.update(id(parameter) for parameter in parameters)
            trainable = record.state is not SeedState.STABILIZATION
            groups.append(ParameterGroup(seed, record.birth_step or 0, parameters, trainable))
        rest = tuple(p for p in self.model.parameters() if id(p) not in owned)
        return [ParameterGroup(HOST, 0, rest), *groups]

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Topology and lives as JSON; weights are in the model's own state dict."""
        return SavedTopology(
            host=self._fingerprint(),
            step=self._step,
            epoch=self._epoch,
            fused=self._network.fused,
            grafts=tuple(self._network.grafts),
            plans=self._plans,
            records=self._records,
            penalties=self._penalties,
            quarantined=frozenset(self._quarantined),
        ).to_json()

    def _fingerprint(self) -> str:
        """Of the host's slots before growth: a state fits only the host it was taken from."""
        text = repr([(slot.name, slot.width, slot.writers, slot.readers) for slot in self._analysis.slots.values()])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def restore(
        self, state: Mapping[str, Any], *, keep_gone: Iterable[str] = (), reason: str = "the run was rolled back"
    ) -> list[SeedTransition]:
        """Give the network the topology of a saved state; load the model's state dict afterwards.

        Works on a fresh host and on one that has grown otherwise since. Parameters whose shape stays keep their
        identity.

        Args:
            state: What :meth:`state` returned.
            keep_gone: Seeds of the present that the state does not know and that are blamed for the rollback: their
                records are kept as rolled back, with their slots locked and their blueprints quarantined.
            reason: Why they are.

        Returns:
            The transitions of the seeds in ``keep_gone``.

        Raises:
            TopologyError: The state is of another version or another host; the network is as it was.
        """
        saved = SavedTopology.from_json(state, host=self._fingerprint(), analysis=self._analysis)
        gone = [self.seed(seed) for seed in keep_gone if seed not in saved.records]
        now, this_epoch = self._step, self._epoch
        self._records, self._plans = dict(saved.records), dict(saved.plans)
        self._penalties = {slot: dict(penalties) for slot, penalties in saved.penalties.items()}
        self._quarantined |= saved.quarantined
        self._commands = {record.command_id: record.seed for record in self._records.values()}
        self._measured = set()
        self._step, self._epoch = saved.step, saved.epoch
        self._network.reset(saved.fused)
        for seed in saved.grafts:
            self._graft_again(self._records[seed])
        return self._carry_over(gone, now, this_epoch, reason)

    def _carry_over(self, gone: Iterable[SeedRecord], step: int, epoch: int, reason: str) -> list[SeedTransition]:
        """Keep the records of seeds that a rollback would forget, as rolled back at ``step`` of ``epoch``."""
        done: list[SeedTransition] = []
        before, self._epoch = self._epoch, epoch
        for record in gone:
            self._records[record.seed] = record
            self._commands[record.command_id] = record.seed
            after = SeedState.CANCELLED if record.state is SeedState.GERMINATED else SeedState.ROLLED_BACK
            if after in TRANSITIONS[record.state]:
                done.append(self._leave(record.seed, after, step, reason))
        self._epoch = before
        return done

    def _graft_again(self, record: SeedRecord) -> None:
        plan = self._plans.get(record.seed)
        if plan is None:
            self._network.widen(record.seed, record.slot, record.size, None)
            self._network.set_share(record.seed, record.alpha)
            return
        bridge = self._build_bridge(record, plan, 0)
        if record.state is SeedState.TRAINING:
            bridge.isolate(self._outputs, _generator("head", self._seed, record.seed))
        bridge.set_share(record.alpha)
        if record.state is SeedState.GRAFTING:
            bridge.blend(blending.observed(self._settings))
        if record.state is SeedState.FOSSILIZED:
            bridge.settle()
        self._network.bridge(record.seed, record.slot, record.size, bridge)
        self._apply_freeze(record.seed)

    def lineage(self) -> dict[str, Any]:
        """Who came when, from what and with which result, as JSON."""
        return {
            "run": self.run,
            "slots": {
                name: {"host_width": slot.width, "width": self._network.width(name)}
                for name, slot in self._analysis.slots.items()
            },
            "seeds": [record_json(record) for record in self._records.values()],
        }

    # ------------------------------------------------------------------ bookkeeping

    def _check_slot(self, slot: str) -> None:
        if slot not in self._slots:
            reason = self._refused.get(slot.removeprefix("span:"))
            raise UnknownSlotError(f"there is no slot {slot!r}" + (f": {reason}" if reason else ""))

    def _update(self, seed_id: str, **changes: Any) -> None:
        self._records[seed_id] = replace(self._records[seed_id], **changes)

    def _move(self, seed_id: str, state: SeedState, step: int, reason: str, **changes: Any) -> SeedTransition:
        record = self._records[seed_id]
        check_transition(record.state, state)
        transition = SeedTransition(
            seed_id, record.slot, record.state, state, step, self._epoch, record.command_id, reason
        )
        self._update(seed_id, state=state, state_step=step, measurements=0, reason=reason, **changes)
        self._history.append(transition)
        return transition


def _in_words(worth: Contribution) -> str:
    return f"{worth.points:+.2f} points [{worth.low:+.2f}, {worth.high:+.2f}]"


def _ends(family: families.Family, interface: Interface) -> tuple[int, int]:
    """Channels that a branch reads and writes."""
    return channels_of(families.entering_shape(family, interface)), channels_of(interface.output_shape)


def _check_family(family: str, interface: Interface, size: int) -> None:
    known = families.FAMILIES.get(family)
    if known is None:
        raise GrowthError(f"family {family!r} is none of {', '.join(sorted(families.FAMILIES))}")
    refusal = known.applies_to(interface)
    if refusal is not None:
        raise GrowthError(refusal)
    if size < 1:
        raise GrowthError(f"size {size} is below 1")


def _generator(purpose: str, seed: int, name: str) -> torch.Generator:
    """A private generator that depends on its arguments only."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

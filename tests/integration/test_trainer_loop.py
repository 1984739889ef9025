"""The training loop against the growth engine: exactness, growth, faults; kernels are real, the mesh is scripted."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.kasmina.v1 import seed_pb2
from esper.tamiyo.v1 import observation_pb2
from esper.tolaria.v1 import run_pb2
from services.blueprints.spec import Blueprint, SlotKind
from services.kasmina.lifecycle import SeedState
from services.kasmina.model import SlotOccupancy
from services.tamiyo import wire
from services.tamiyo.observation import cost_of
from services.tolaria import controls, models, rebuild
from services.tolaria.checkpoint import CheckpointStore, State
from services.tolaria.errors import BudgetError, CheckpointError, JournalError, TestSetTouchedError, TrainingFailedError
from services.tolaria.export import changes, export
from services.tolaria.interrupt import TrainingInterruptedError
from services.tolaria.journal import Clock, Journal
from services.tolaria.ports import Command, CommandKind, NoDecision, OfflineMesh
from services.tolaria.progress import DecisionProgress, SeedProgress, StatusProgress
from services.tolaria.schedule import Schedule
from services.tolaria.seeds import derive
from services.tolaria.trainer import TolariaTrainer, decision_epochs
from tests.integration.trainer_harness import (
    BRANCH,
    WIDEN,
    Harness,
    Policy,
    config_of,
    grow_once,
    same,
    weights,
)
from tests.support.growth import DepthwiseNet, Perceptron, ResidualNet, VisionTransformer
from tests.support.networks import EncoderStack

pytestmark = pytest.mark.parallel

ONCE = grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv1", WIDEN, 3))
#: Keeps whatever was measured, so that what is tested does not depend on luck with 40 images.
KEEP = {"threshold": -100.0, "min_epochs": 1}


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")


def keep_config(**growth: Any) -> Any:
    return config_of(growth={"evaluation": KEEP, **growth})


# ---- exactness ---------------------------------------------------------------------------------------------------


def bare_loop(harness: Harness) -> dict[str, torch.Tensor]:
    """The same training in plain PyTorch: no engine, no trainer, no optimizer wrapper."""
    from services.tolaria.data.batches import Batches

    config = harness.config
    model = harness.build_host().train()
    batches = Batches(harness.data.training, harness.data.normalization, config.data, config.run.seed)
    settings = config.training.optimizer
    total = config.training.epochs * batches.per_epoch
    schedule = Schedule.of(settings, total)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=settings.momentum, nesterov=True, weight_decay=settings.weight_decay
    )
    torch.manual_seed(derive(config.run.seed, "training"))
    for step in range(total):
        batch = batches.at(step // batches.per_epoch, step % batches.per_epoch)
        loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_without_growth_it_equals_a_bare_loop_bit_for_bit(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer(grow=False, mesh=OfflineMesh())
    trainer.train()
    assert same(weights(trainer), bare_loop(harness))


def test_deciding_nothing_equals_a_bare_loop_bit_for_bit(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    trainer.train()
    assert len(harness.scripted.asked) == 2
    assert same(weights(trainer), bare_loop(harness))


def test_the_same_run_twice_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trainer = Harness(tmp_path / name, keep_config(), ONCE).trainer()
        result = trainer.train()
        found.append((weights(trainer), result.test_accuracy, result.training_flops))
    assert same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_its_journal_alone_makes_the_same_run_again(tmp_path: Path) -> None:
    """No controller, no compiler: nobody is asked anything."""
    grown = Harness(tmp_path / "grown", keep_config(), ONCE).trainer()
    expected = grown.train()
    grown.journal.close()
    for name in ("kernels", "keys"):
        shutil.copytree(tmp_path / "grown" / name, tmp_path / "again" / name)
    shutil.copy(tmp_path / "grown" / "journal.jsonl", tmp_path / "again")
    again = Harness(tmp_path / "again", keep_config()).trainer(mesh=OfflineMesh())
    again.resume()
    result = again.train()
    assert not again.journal.replaying
    assert same(weights(again), weights(grown))
    assert (result.test_accuracy, result.training_flops) == (expected.test_accuracy, expected.training_flops)
    assert [record.outcome for record in again.engine.seeds()] == [SeedState.FOSSILIZED] * 2


def test_a_seed_whose_kernel_never_comes_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(growth={"kernel_timeout_epochs": 2}), ONCE, polls=10**9)
    trainer = harness.trainer()
    trainer.train()
    assert {record.outcome for record in trainer.engine.seeds()} == {SeedState.CANCELLED}
    assert same(weights(trainer), bare_loop(harness))


# ---- growth ------------------------------------------------------------------------------------------------------


def test_blocks_of_torchs_own_grow_in_a_run(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(4)
        model = EncoderStack()
        model.head = nn.Linear(8, 10)
        return model

    policy = grow_once(("encoder.layers.1.linear1", WIDEN, 2), ("last.linear1", WIDEN, 3))
    trainer = Harness(tmp_path, keep_config(), policy).trainer(build_host=build)
    result = trainer.train()
    assert [record.state for record in trainer.engine.seeds()] == [SeedState.FOSSILIZED] * 2
    assert result.test_accuracy is not None
    widths = [trainer.model.get_parameter(f"{path}.linear1.weight").shape[0] for path in ("encoder.layers.1", "last")]
    assert widths == [8, 8]
    rebuilt = rebuild.grow(build(), changes(trainer.engine))
    rebuilt.load_state_dict(weights(trainer))
    batch = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(batch), trainer.model.eval()(batch))


@pytest.mark.parametrize("host", [Perceptron, ResidualNet, DepthwiseNet, VisionTransformer])
def test_every_kind_of_network_grows_wherever_it_can_in_one_run(tmp_path: Path, host: type[nn.Module]) -> None:
    """All its slots at once: residual streams, the two sides of a depthwise layer, features of a transformer."""

    def build() -> nn.Module:
        torch.manual_seed(4)
        model = host()
        holder, name = (model.layers, "6") if isinstance(model, Perceptron) else (model, "head")
        before = holder.get_submodule(name)
        assert isinstance(before, nn.Linear)
        setattr(holder, name, nn.Linear(before.in_features, 10))  # the digits have ten classes
        return model

    def everywhere(observation: observation_pb2.Observation) -> Sequence[tuple[str, Blueprint, int]]:
        return [(name, WIDEN, 2) for name in slots] if observation.decisions_left > 1 else ()

    harness = Harness(tmp_path, keep_config(), everywhere)
    trainer = harness.trainer(build_host=build)
    slots = [slot.name for slot in trainer.engine.slots() if slot.kind is SlotKind.WIDTH]
    result = trainer.train()
    records = trainer.engine.seeds()
    assert sorted(record.slot for record in records) == sorted(slots)
    assert {record.state for record in records} == {SeedState.FOSSILIZED}
    assert result.parameters > trainer.host_parameters
    rebuilt = rebuild.grow(build(), changes(trainer.engine))
    rebuilt.load_state_dict(weights(trainer))
    batch = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(rebuilt.eval()(batch), trainer.model.eval()(batch), rtol=1e-5, atol=1e-6)


class Cropped(nn.Module):
    """Keeps as many columns as the size of the batch says."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[..., : 3 + images.shape[0] % 5]


def test_a_layer_whose_shapes_change_with_the_batch_is_refused_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(4)
        around = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), Cropped(), nn.ReLU())
        return nn.Sequential(
            *around, nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )

    policy = grow_once(("0", WIDEN, 2), ("2", WIDEN, 2), ("5", WIDEN, 2))
    harness = Harness(tmp_path, keep_config(), policy)
    trainer = harness.trainer(build_host=build)
    per_batch = {len(batch) for batch in trainer.health_batches()} | {harness.config.data.batch_size}
    assert len({size % 5 for size in per_batch}) > 1, "batches of other sizes are looked at than trained on"
    result = trainer.train()
    assert "takes a part of it" in trainer.engine.refused()["2"]
    assert "2 was not germinated: there is no slot '2': getitem takes a part of it" in caplog.text
    grown = {record.slot: record.outcome for record in trainer.engine.seeds()}
    assert grown == {"0": SeedState.FOSSILIZED, "5": SeedState.FOSSILIZED}
    assert result.test_accuracy is not None


def test_a_plan_is_grafted_judged_and_fossilized(tmp_path: Path) -> None:
    harness = Harness(tmp_path, keep_config(), ONCE)
    trainer = harness.trainer()
    host_parameters = trainer.host_parameters
    result = trainer.train()
    records = trainer.engine.seeds()
    assert [record.state for record in records] == [SeedState.FOSSILIZED] * 2
    assert all(record.contribution is not None for record in records)
    # Measured together, too: once for both.
    together = [record.plan_contribution for record in records]
    assert together[0] is not None
    assert together[0] == together[1]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [line["plan_contribution"] for line in events if line.get("to_state") == "FOSSILIZED"]
    assert told == [asdict(together[0])] * 2
    # Applied together: at one step, at a safe point after the decision.
    assert len({record.birth_step for record in records}) == 1
    assert result.parameters > host_parameters
    assert result.growth_flops > 0
    assert [group.name for group in trainer.engine.parameter_groups()] == ["host"]
    # Newborns that were fused kept their momentum.
    assert all(name.startswith("host/") for name in trainer.optimizer.state())
    mesh = harness.scripted
    assert [outcome.state for outcome in mesh.outcomes] == [9, 9]
    assert [outcome.decision for outcome in mesh.outcomes] == ["decisions/decision-run-1-0-1"] * 2
    topics = {topic for topic, _ in mesh.events}
    assert topics >= {
        "telemetry.seed.health",
        "telemetry.seed.transitions",
        "innovation.field_reports",
        "system.events.epoch",
    }
    told = [message.to_state for message in harness.progress.heard if isinstance(message, SeedProgress)]
    assert told == ["GERMINATED"] * 2 + ["LOADING", "GRAFTING", "EVALUATING"] * 2 + ["FOSSILIZED"] * 2
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    assert [seed["state"] for seed in lineage["seeds"]] == ["FOSSILIZED"] * 2
    assert lineage == json.loads(json.dumps(trainer.engine.lineage()))
    # Every epoch once, and the decision with its plan.
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [len(decision["plan"]) for decision in decisions] == [2, 0]


def test_a_branch_walks_its_whole_path(tmp_path: Path) -> None:
    growth = {"isolation_steps": 6, "blend_steps": 6, "stabilization_steps": 3, "fine_tuning_steps": 4}
    config = config_of(model={"widths": [3, 3, 3]}, growth={"evaluation": KEEP, **growth})
    harness = Harness(tmp_path, config, grow_once(("span:groups.2", BRANCH, 2)))
    trainer = harness.trainer()
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.state is SeedState.FOSSILIZED, record.reason
    told = [message.to_state for message in harness.progress.heard if isinstance(message, SeedProgress)]
    assert told == [
        "GERMINATED",
        "LOADING",
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "FINE_TUNING",
        "FOSSILIZED",
    ]


@pytest.mark.parametrize("schedule", ["performance", "drift", "gradient"])
def test_a_branch_is_let_in_by_every_schedule_and_by_one_that_died_halfway(tmp_path: Path, schedule: str) -> None:
    growth = {"isolation_steps": 4, "blend_steps": 4, "stabilization_steps": 2, "fine_tuning_steps": 2}
    # No bound of the change per step that lets alpha jump, and none that outlasts the run.
    blend = {"schedule": schedule, "max_steps": 60, "drift": 0.05}
    config = config_of(
        model={"widths": [3, 3, 3]},
        training={"epochs": 12},
        growth={"evaluation": KEEP, "window": [0.05, 0.2], "blend": blend, **growth},
    )
    policy = grow_once(("span:groups.2", BRANCH, 2))
    (tmp_path / "whole").mkdir()
    whole = Harness(tmp_path / "whole", config, policy).trainer()
    shares = watch_shares(whole)
    whole.train()
    (record,) = whole.engine.seeds()
    assert record.state is SeedState.FOSSILIZED, record.reason
    blending = {step: share for step, (state, share) in shares.items() if state is SeedState.GRAFTING}
    assert next(iter(blending.values())) == 0.0
    assert list(shares.values())[-1] == (SeedState.FOSSILIZED, 1.0)
    between = {step: share for step, share in blending.items() if 0.0 < share < 1.0}
    assert len(set(between.values())) >= 3, blending
    halfway = sorted(between)[len(between) // 2]
    resumed, _ = run_killed_at(tmp_path / "killed", halfway, policy, config)
    again = watch_shares(resumed)
    resumed.train()
    assert again == {step: shares[step] for step in again}
    assert set(between) & set(again)
    assert same(weights(resumed), weights(whole))


def watch_shares(trainer: TolariaTrainer) -> dict[int, tuple[SeedState, float]]:
    """State and alpha of the newest seed before each step that is made."""
    seen: dict[int, tuple[SeedState, float]] = {}
    original = trainer.train_step

    def watching() -> None:
        if records := trainer.engine.seeds():
            seen[trainer.step] = records[-1].state, records[-1].alpha
        original()

    trainer.train_step = watching  # type: ignore[method-assign]  # a look between two steps
    return seen


def test_a_refused_kernel_cancels_its_seed_and_training_goes_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(), ONCE)
    trainer = harness.trainer()
    harness.scripted.refuse_kernels = "compileJobs/x ended without a kernel: out of memory"
    trainer.train()
    assert {record.outcome for record in trainer.engine.seeds()} == {SeedState.CANCELLED}
    assert "out of memory" in trainer.coordinator.reason(trainer.engine.seeds()[0])


def test_no_decision_is_said_and_training_goes_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    harness.scripted.decide = lambda *_, **__: NoDecision("Tamiyo did not answer within 0.5 s", 500.0)  # type: ignore[method-assign]  # what a slow Tamiyo looks like
    trainer.train()
    told = [message for message in harness.progress.heard if isinstance(message, DecisionProgress)]
    assert [message.explanation for message in told] == ["Tamiyo did not answer within 0.5 s"] * 2
    assert told[0].decision is None


def test_without_blueprints_nobody_is_asked(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    harness.scripted.blueprints = ()
    trainer.train()
    assert harness.scripted.asked == []


def test_waiting_for_the_kernel_makes_the_run_independent_of_compile_time(tmp_path: Path) -> None:
    found = []
    for polls in (0, 40):
        folder = tmp_path / str(polls)
        folder.mkdir()
        trainer = Harness(folder, keep_config(wait_for_kernel=True), ONCE, polls=polls).trainer()
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


def test_a_stale_plan_germinates_what_it_can(tmp_path: Path) -> None:
    other = Blueprint("widen", {"made": "up"})
    policy = grow_once(("nowhere", WIDEN, 2), ("groups.0.conv1", other, 2), ("groups.0.conv1", WIDEN, 2))
    trainer = Harness(tmp_path, keep_config(), policy).trainer()
    trainer.train()
    assert [record.slot for record in trainer.engine.seeds()] == ["groups.0.conv1"]


def test_seeds_under_way_at_the_end_are_settled(tmp_path: Path) -> None:
    # The evaluation would come after the end; so would the kernels of the second decision.
    def always(observation: observation_pb2.Observation) -> Sequence[tuple[str, Blueprint, int]]:
        first = observation.decisions_left == 2
        return [("groups.0.conv1", WIDEN, 2)] if first else [("groups.1.conv1", WIDEN, 3)]

    harness = Harness(tmp_path, config_of(growth={"evaluation": {"threshold": -100.0, "min_epochs": 50}}), always)
    trainer = harness.trainer()
    original = harness.scripted.decide

    def late(observation: observation_pb2.Observation, **arguments: Any) -> Any:
        harness.scripted.polls = 3 if observation.decisions_left == 2 else 10**9
        return original(observation, **arguments)

    harness.scripted.decide = late  # type: ignore[method-assign]  # the second compile takes for ever
    trainer.train()
    assert [record.outcome for record in trainer.engine.seeds()] == [SeedState.FOSSILIZED, SeedState.CANCELLED]
    assert not trainer.coordinator.alive()


def test_what_cannot_be_judged_at_the_end_is_removed(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(growth={"evaluation": {"threshold": 100.0, "min_epochs": 50}}), ONCE)
    trainer = harness.trainer()
    host = trainer.host_parameters
    trainer.train()
    assert {record.outcome for record in trainer.engine.seeds()} == {SeedState.CULLED}
    assert trainer.parameter_count() == host


def test_a_branch_that_is_still_learning_at_the_end_is_removed(tmp_path: Path) -> None:
    config = config_of(growth={"isolation_steps": 10**6}, model={"name": "cnn", "widths": [2, 3, 3]})
    harness = Harness(tmp_path, config, grow_once(("span:groups.2", BRANCH, 2)))
    trainer = harness.trainer()
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert "the run ended before it was settled" in trainer.coordinator.reason(record)
    assert same(weights(trainer), bare_loop(harness))


def test_a_budget_of_parameters_is_told_in_parameters(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(growth={"budget": {"flops": None, "parameters": 3.0}}), ONCE)
    trainer = harness.trainer()
    host = trainer.host_parameters
    trainer.train()
    told = [observation.budget for observation in harness.scripted.asked]
    assert {budget.kind for budget in told} == {observation_pb2.BUDGET_KIND_PARAMETERS}
    assert {budget.limit for budget in told} == {3.0 * host}
    assert told[0].current == host


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ({"flops_absolute": 1e5}, ""),
        ({"parameters_absolute": 2e4}, ""),
        ({"flops_absolute": 10}, r"growth\.budget\.flops_absolute: 10 forward FLOPs per sample is below what the host"),
        ({"parameters_absolute": 9.0}, r"growth\.budget\.parameters_absolute: 9 parameters is below what the host"),
    ],
)
def test_an_absolute_budget_is_taken_as_it_is(tmp_path: Path, limit: dict[str, float], why: str) -> None:
    harness = Harness(tmp_path, config_of(growth={"budget": limit}))
    if why:
        with pytest.raises(BudgetError, match=why):
            harness.trainer()
        harness.trainer(grow=False)  # a control does not grow: no budget, no complaint
        return
    harness.trainer().train()
    assert {observation.budget.limit for observation in harness.scripted.asked} == set(limit.values())


def test_a_budget_of_time_is_measured_once_in_a_runs_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(growth={"budget": {"latency": 1.5}, "evaluation": KEEP})
    harness = Harness(tmp_path, config, grow_once(("groups.0.conv1", WIDEN, 2), ("span:groups.1", BRANCH, 2)))
    trainer = harness.trainer()
    command_at(trainer, harness, 20, Command(command_id="s", kind=CommandKind.STOP))
    with pytest.raises(TrainingInterruptedError):
        trainer.train()
    trainer.journal.close()
    told = harness.scripted.asked[0]
    assert told.budget.kind == observation_pb2.BUDGET_KIND_LATENCY
    assert trainer.latency is not None
    assert told.budget.current == pytest.approx(trainer.latency.host)
    assert told.budget.limit == pytest.approx(1.5 * trainer.latency.host)
    seen = wire.read_observation(told)
    widths = {slot.name: slot.width for slot in seen.slots}
    assert cost_of(seen.cost_terms, widths) == pytest.approx(seen.budget_current)
    # Whatever a machine's noise: no price is negative.
    assert all(term.coefficient >= 0 for term in seen.cost_terms)
    branches = next(candidate for candidate in seen.candidates if candidate.family != "widen")
    assert all(price.per_size >= 0 for price in branches.branch_costs.values())

    monkeypatch.setattr("services.tolaria.calibration.measure", None)  # never again
    grown = []
    for resumed_at in ("checkpoint", "beginning"):
        if resumed_at == "beginning":
            shutil.rmtree(tmp_path / "checkpoints")
        again = harness.trainer()
        again.resume()
        again.train()
        assert again.latency == trainer.latency
        assert all(asked.budget.limit == told.budget.limit for asked in harness.scripted.asked)
        again.journal.close()
        grown.append(weights(again))
    assert same(*grown)


def test_measuring_time_changes_nothing_else(tmp_path: Path) -> None:
    found = []
    for name, limit in (("flops", {"flops": 2.0}), ("time", {"latency": 2.0})):
        harness = Harness(tmp_path / name, keep_config(budget=limit), ONCE)
        trainer = harness.trainer()
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


def test_a_budget_below_the_hosts_own_time_ends_the_run(tmp_path: Path) -> None:
    trainer = Harness(tmp_path, config_of(growth={"budget": {"latency_ms": 0.001}})).trainer()
    with pytest.raises(BudgetError, match=r"growth\.budget\.latency_ms: 0\.001 ms per training step is below"):
        trainer.train()


# ---- resume ------------------------------------------------------------------------------------------------------


def run_killed_at(folder: Path, step: int, policy: Policy, config: Any) -> tuple[TolariaTrainer, Harness]:
    """A run that dies at ``step`` without a word and is resumed by a new process' worth of objects."""
    folder.mkdir()
    harness = Harness(folder, config, policy)

    class KilledError(BaseException):
        pass

    trainer = harness.trainer()
    original = trainer.train_step

    def dying() -> None:
        if trainer.step == step:
            raise KilledError
        original()

    trainer.train_step = dying  # type: ignore[method-assign]  # kill -9 between two steps
    with pytest.raises(KilledError):
        trainer.train()
    trainer.journal.close()
    resumed = harness.trainer()
    # The mesh would answer otherwise today: only the journal may be heard for what is past.
    harness.scripted.policy = lambda _: ()
    resumed.resume()
    return resumed, harness


@pytest.mark.parametrize(
    ("step", "wait"), [(4, False), (9, True), (11, True), (14, False), (22, False), (30, False), (47, False)]
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, step: int, wait: bool) -> None:
    # Where the kernel was not there yet when the run died, only wait_for_kernel makes its arrival the same.
    (tmp_path / "whole").mkdir()
    config = keep_config(wait_for_kernel=wait)
    whole = Harness(tmp_path / "whole", config, ONCE).trainer()
    expected = whole.train()
    trainer, _ = run_killed_at(tmp_path / "killed", step, ONCE, config)
    if step < 9:
        trainer.mesh.policy = ONCE  # type: ignore[attr-defined]  # the decision still lies ahead
    result = trainer.train()
    assert same(weights(trainer), weights(whole))
    assert (result.test_accuracy, result.training_flops) == (expected.test_accuracy, expected.training_flops)
    assert [r.birth_step for r in trainer.engine.seeds()] == [r.birth_step for r in whole.engine.seeds()]
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_an_interrupt_saves_in_the_middle_of_an_epoch_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = Harness(tmp_path / "whole", keep_config(), ONCE).trainer()
    whole.train()
    harness = Harness(tmp_path / "stopped", keep_config(), ONCE)
    trainer = harness.trainer()
    original = trainer.train_step

    def stopping() -> None:
        original()
        if trainer.step == 16:
            harness.interrupt.request("interrupted by SIGTERM")
            harness.interrupt.request("a later reason does not count")

    trainer.train_step = stopping  # type: ignore[method-assign]  # a signal at that moment
    with pytest.raises(TrainingInterruptedError, match="SIGTERM"):
        trainer.train()
    assert CheckpointStore(tmp_path / "stopped" / "checkpoints", 5).steps()[-1] == 16
    assert harness.scripted.pictures[-1].state == run_pb2.RUN_STATE_STOPPED  # type: ignore[union-attr]  # the run is shown last
    trainer.journal.close()
    resumed = harness.trainer()
    resumed.resume()
    assert resumed.step == 16
    resumed.train()
    assert same(weights(resumed), weights(whole))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    trainer.save()
    other = harness.trainer(run="run-2")
    with pytest.raises(CheckpointError, match=r"belongs to run run-1 \(grown\), not to run-2"):
        other.resume()


def test_another_environment_is_warned_of(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    trainer.environment["threads"] = 7
    trainer.save()
    harness.trainer().resume()
    told = [message.message for message in harness.progress.heard if isinstance(message, StatusProgress)]
    assert any("results will differ in the last bits" in message for message in told)


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("load", Clock(0, 30), {"kernels": {}, "failed": {}})
    journal.close()
    trainer = harness.trainer()
    trainer.resume()  # no checkpoint: from the beginning
    with pytest.raises(JournalError, match="knows no decision at step 9"):
        trainer.train()


def test_a_kernel_that_is_gone_cancels_its_seed_on_replay(tmp_path: Path) -> None:
    harness = Harness(tmp_path, keep_config(), ONCE)
    trainer = harness.trainer()
    trainer.train()
    trainer.journal.close()
    for path in (tmp_path / "kernels").glob("*.safetensors"):
        path.write_bytes(b"something else")
    for path in (tmp_path / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
        (path / "tensors.safetensors").unlink()
        path.rmdir()
    again = harness.trainer()
    again.resume()
    again.train()
    assert {record.outcome for record in again.engine.seeds()} == {SeedState.CANCELLED}


def test_a_full_disk_is_said_and_training_goes_on(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        assert not trainer.save()
        trainer.reporter.status("training", "still here")
        for _ in range(20):
            trainer.reporter.rolled_back(from_step=1, to_step=0, reason="x" * 100, seeds=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = [message.message for message in harness.progress.heard if isinstance(message, StatusProgress)]
    assert any("was not written: File too large; training goes on" in message for message in told)
    assert any("events.jsonl cannot be written: File too large" in message for message in told)
    assert trainer.reporter.lost_lines > 0
    assert trainer.save()


# ---- governor ----------------------------------------------------------------------------------------------------


def poison(trainer: TolariaTrainer, at: int, *, times: int = 1) -> None:
    """A loss that is NaN at step ``at``, the first ``times`` times it comes there."""
    original = trainer.train_step
    left = [times]

    def poisoned() -> None:
        if trainer.step == at and left[0]:
            left[0] -= 1
            observe = trainer.governor.observe_loss
            trainer.governor.observe_loss = lambda loss: observe(loss * float("nan"))  # type: ignore[method-assign]  # one bad step
            try:
                original()
            finally:
                trainer.governor.observe_loss = observe  # type: ignore[method-assign]  # back to normal
        else:
            original()

    trainer.train_step = poisoned  # type: ignore[method-assign]  # see above


def test_a_rollback_restores_the_last_good_state_exactly_and_changes_the_rate(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer(grow=False)
    poison(trainer, 13)
    seen: list[dict[str, torch.Tensor]] = []
    end = trainer._end_epoch

    def ending(epoch: int) -> None:
        end(epoch)
        seen.append(weights(trainer))

    trainer._end_epoch = ending  # type: ignore[method-assign]  # a look after each epoch
    roll_back = trainer._roll_back

    def looking(unstable: Any) -> None:
        roll_back(unstable)
        assert trainer.step == 9
        assert same(weights(trainer), seen[0])

    trainer._roll_back = looking  # type: ignore[method-assign]  # a look right after the rollback
    trainer.train()
    assert trainer.governor.rollbacks == 1
    assert trainer.optimizer.rate_scale == 0.5
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (rolled,) = [event for event in events if event["kind"] == "rollback"]
    assert (rolled["from_step"], rolled["to_step"], rolled["seeds"]) == (13, 9, [])
    # Steps 10 to 13 were made twice: they are billed twice, and said to be lost once.
    step = trainer.account.training_flops / (trainer.total_steps + 4)
    assert trainer.account.discarded_flops == pytest.approx(4 * step)


def test_what_a_run_fell_back_to_stays_as_it_was(tmp_path: Path) -> None:
    """It may have to fall back there once more."""
    trainer = Harness(tmp_path, config_of(), ONCE).trainer()
    good = trainer.capture().detached()
    said = json.dumps(good.values)
    trainer.restore(good)
    trainer.train()
    assert trainer.coordinator.state()["next_seed"] == 3
    assert json.dumps(good.values) == said


def test_a_rollback_blames_the_seeds_under_way(tmp_path: Path) -> None:
    config = config_of(growth={"evaluation": {"threshold": -100.0, "min_epochs": 3}})
    harness = Harness(tmp_path, config, ONCE)
    trainer = harness.trainer()
    poison(trainer, 16)
    trainer.train()
    assert {record.outcome for record in trainer.engine.seeds()} == {SeedState.ROLLED_BACK}
    assert trainer.optimizer.rate_scale == 1.0
    assert {outcome.state for outcome in harness.scripted.outcomes} == {12}
    assert any(topic == "system.events.rollback" for topic, _ in harness.scripted.events)


def test_a_control_waits_for_its_kernels_as_long_as_its_run_did(tmp_path: Path) -> None:
    found = []
    grafts: dict[int, int] = {}
    for polls in (8, 0):
        folder = tmp_path / str(polls)
        trainer = Harness(folder, keep_config(), ONCE, polls=polls).trainer(grafts=grafts)
        trainer.train()
        grafts = {record.germinated_step: record.birth_step or 0 for record in trainer.engine.seeds()}
        found.append(grafts)
    assert found[0] == found[1]
    ((germinated, born),) = found[0].items()
    assert born > germinated + 1, "kernels that are there at once are grafted at once, unless held back"


def test_a_kernel_on_its_way_is_asked_for_again_after_a_rollback(tmp_path: Path) -> None:
    harness = Harness(tmp_path, keep_config(), ONCE, polls=8)
    trainer = harness.trainer()
    obtain = harness.scripted.obtain_kernel
    requests: list[Any] = []

    def noting(target: Any) -> Any:
        # Those of the state that is gone are withdrawn before new ones are made.
        assert all(request.cancelled for request in requests[:2] if len(requests) >= 2)
        requests.append(obtain(target))
        return requests[-1]

    harness.scripted.obtain_kernel = noting  # type: ignore[method-assign]  # to see what becomes of the requests
    poison(trainer, 13)
    trainer.train()
    assert trainer.governor.rollbacks == 1
    assert len(requests) == 4
    assert [record.outcome for record in trainer.engine.seeds()] == [SeedState.FOSSILIZED] * 2


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path) -> None:
    trainer, _ = run_killed_at(tmp_path / "killed", 31, ONCE, keep_config())
    metrics = tmp_path / "killed" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"arm": "grown", "ep')
    trainer.reporter.rewind(trainer.step)
    assert metrics.read_text() == whole


def test_a_run_that_was_rolled_back_resumes_exactly(tmp_path: Path) -> None:
    found = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        folder.mkdir()
        harness = Harness(folder, keep_config(), ONCE)
        trainer = harness.trainer()
        poison(trainer, 13)
        if killed:
            step = trainer.train_step

            def dying(trainer: TolariaTrainer = trainer, step: Any = step) -> None:
                if trainer.step == 31:
                    raise KeyboardInterrupt
                step()

            trainer.train_step = dying  # type: ignore[method-assign]  # kill -9
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.journal.close()
            trainer = harness.trainer()
            trainer.resume()
            assert trainer.governor.rollbacks == 1
        trainer.train()
        found.append(weights(trainer))
    assert same(*found)


def test_the_governors_patience_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(governor={"max_rollbacks": 2}))
    trainer = harness.trainer(grow=False)
    poison(trainer, 5, times=9)
    with pytest.raises(TrainingFailedError, match=r"unstable at step 5 \(the loss is nan\) after 2 rollbacks"):
        trainer.train()


def test_a_collapse_to_chance_is_rolled_back(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer(grow=False)
    trainer.governor.best_accuracy = 90.0
    observe = trainer.governor.observe_accuracy
    answers = iter([5.0])
    trainer.governor.observe_accuracy = lambda accuracy: observe(next(answers, accuracy))  # type: ignore[method-assign]  # one collapse
    trainer.train()
    assert trainer.governor.rollbacks == 1


@pytest.mark.parametrize(("rate", "scale", "recovers"), [(20.0, 0.01, True), (1e4, 0.5, False)])
def test_a_rate_a_hundred_times_too_high_is_found_and_lowered_or_named(
    tmp_path: Path, rate: float, scale: float, recovers: bool
) -> None:
    """Real losses: they explode within a few steps, before there are statistics, and some networks die of it calmly."""
    config = config_of(training={"epochs": 8, "optimizer": {"learning_rate": rate}}, governor={"rate_scale": scale})
    trainer = Harness(tmp_path, config).trainer(grow=False)
    if recovers:
        assert trainer.train().test_accuracy > 25
        assert trainer.governor.rollbacks == 1
        assert trainer.optimizer.rate_scale == scale
        return
    with pytest.raises(TrainingFailedError, match=r"the loss .* after 3 rollbacks; try a lower training\.optimizer"):
        trainer.train()


def test_a_rate_that_leaps_in_the_middle_of_a_run_is_taken_back(tmp_path: Path) -> None:
    trainer = Harness(tmp_path, config_of(training={"epochs": 8})).trainer(grow=False)
    make = trainer.train_step
    leapt: list[int] = []

    def leaping() -> None:
        if trainer.step == 30 and not leapt:
            leapt.append(trainer.step)
            trainer.optimizer.rate_scale *= 100
        make()

    trainer.train_step = leaping  # type: ignore[method-assign]  # what a wrong schedule would do
    assert trainer.train().test_accuracy > 25
    assert trainer.governor.rollbacks == 1
    assert trainer.optimizer.rate_scale == 0.5


def test_a_seed_whose_weights_break_is_blamed_alone_and_leaves_no_trace(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(growth={"evaluation": {"threshold": -100.0, "min_epochs": 3}}), ONCE)
    trainer = harness.trainer()
    make = trainer.train_step
    seen: list[State] = []

    def breaking() -> None:
        if trainer.step == 16 and not seen:
            assert trainer.last_good is not None
            seen.append(trainer.last_good)
            groups = {group.name: group for group in trainer.engine.parameter_groups()}
            with torch.no_grad():
                groups["seed-2"].parameters[0].fill_(float("nan"))
        make()

    trainer.train_step = breaking  # type: ignore[method-assign]  # a bit flip, a bad kernel
    roll_back = trainer._roll_back
    after: list[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def looking(unstable: Any) -> None:
        roll_back(unstable)
        moments = {name: value.clone() for name, value in trainer.optimizer.state().items()}
        after.append((trainer.step, weights(trainer), moments))

    trainer._roll_back = looking  # type: ignore[method-assign]  # a look right after the rollback
    trainer.train()
    ((step, restored, moments),) = after
    good = seen[0]
    assert step == good.values["step"]
    # Bit for bit what it was, but for the seed: the other one and the host keep their weights and their momentum.
    kept = {name: value for name, value in restored.items() if f"model/{name}" in good.tensors}
    assert kept
    assert all(torch.equal(value, good.tensors[f"model/{name}"]) for name, value in kept.items())
    assert all(torch.equal(value, good.tensors[f"optimizer/{name}"]) for name, value in moments.items())
    assert moments
    groups = [group.name for group in trainer.engine.parameter_groups()]
    assert "seed-2" not in groups
    one, two = trainer.engine.seeds()
    assert (one.outcome, two.outcome) == (SeedState.FOSSILIZED, SeedState.ROLLED_BACK)
    status = trainer.engine.slot_status(two.slot, 3)
    assert status.occupancy is SlotOccupancy.LOCKED
    assert status.penalties[two.blueprint] > 0
    assert two.blueprint in trainer.engine.state()["quarantined"]
    # Tamiyo hears of it, and the run goes on at its own rate.
    told = {outcome.seed.rsplit("/", 1)[-1]: outcome.state for outcome in harness.scripted.outcomes}
    assert told["seed-2"] == seed_pb2.SEED_STATE_ROLLED_BACK
    assert trainer.optimizer.rate_scale == 1.0
    assert trainer.step == trainer.total_steps


def test_a_loss_that_never_was_a_number_ends_the_run_with_what_to_look_at(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    build = harness.build_host

    def build_broken() -> torch.nn.Module:
        model = build()
        with torch.no_grad():
            next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("nan"))
        return model

    trainer = harness.trainer(grow=False, build_host=build_broken)
    with pytest.raises(TrainingFailedError, match=r"at step 0 .*after 3 rollbacks; it was so before the first update"):
        trainer.train()


def test_a_checkpoint_of_another_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(training={"epochs": 2}))
    first = harness.trainer(grow=False)
    first.train()
    first.journal.close()
    other = Harness(tmp_path / "other", config_of(model={"widths": [2, 4]}))
    changed = harness.trainer(grow=False, build_host=other.build_host)
    with pytest.raises(CheckpointError, match=r"step 18 does not fit the network .*put the code behind model"):
        changed.resume()


# ---- commands ----------------------------------------------------------------------------------------------------


def command_at(trainer: TolariaTrainer, harness: Harness, step: int, *commands: Command) -> None:
    """Let ``commands`` arrive just after ``step``, the first time it is made."""
    original = trainer.train_step
    arriving = list(commands)

    def commanding() -> None:
        original()
        if trainer.step == step:
            harness.scripted.waiting_commands += arriving
            arriving.clear()

    trainer.train_step = commanding  # type: ignore[method-assign]  # a caller at that moment


def test_callers_germinate_and_cull(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of(growth={"evaluation": {"threshold": -100.0, "min_epochs": 50}}), polls=1)
    trainer = harness.trainer()
    wish = Command(command_id="c1", kind=CommandKind.GERMINATE, slot="groups.0.conv2", blueprint=WIDEN.id, size=1)
    wrong = [
        Command(command_id="c2", kind=CommandKind.GERMINATE, slot="nowhere", blueprint=WIDEN.id, size=1),
        Command(command_id="c3", kind=CommandKind.GERMINATE, slot="groups.0.conv2", blueprint="none", size=1),
        Command(command_id="c4", kind=CommandKind.GERMINATE, slot="span:groups.0", blueprint=WIDEN.id, size=1),
        Command(command_id="c5", kind=CommandKind.CULL, seed="seed-9"),
    ]
    command_at(trainer, harness, 4, wish, *wrong)
    command_at(trainer, harness, 12, wish, wrong[0], Command(command_id="c6", kind=CommandKind.CULL, seed="seed-1"))
    command_at(trainer, harness, 14, Command(command_id="c7", kind=CommandKind.CULL, seed="seed-1"))
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert record.birth_step is not None
    assert trainer.coordinator.trial_steps(record) == 12 - record.birth_step > 0
    answers = {(answer.command.command_id, answer.step): answer for answer in harness.scripted.answers}
    assert answers["c1", 4].seed == "seed-1"
    assert answers["c1", 12].seed == "seed-1"  # the same wish again is not a second seed
    # What was refused stays refused, in the same words, and is no second input of the run.
    assert answers["c2", 12].error_reason == "SLOT_NOT_FOUND"
    assert answers["c2", 12].error_message == answers["c2", 4].error_message
    journal = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    heard = [entry["content"]["command"]["command_id"] for entry in journal if entry["kind"] == "command"]
    assert heard == ["c1", "c2", "c3", "c4", "c5", "c6", "c7"]
    assert {key[0]: answer.error_reason for key, answer in answers.items() if answer.error_reason} == {
        "c2": "SLOT_NOT_FOUND",
        "c3": "UNKNOWN_BLUEPRINT",
        "c4": "BLUEPRINT_DOES_NOT_FIT",
        "c5": "SEED_NOT_FOUND",
        "c7": "ILLEGAL_TRANSITION",
    }
    # The outcome of a seed that a caller wished for belongs to no decision.
    assert [outcome.decision for outcome in harness.scripted.outcomes] == [""]


def test_commands_of_callers_are_replayed(tmp_path: Path) -> None:
    wish = Command(command_id="c1", kind=CommandKind.GERMINATE, slot="groups.0.conv2", blueprint=WIDEN.id, size=1)
    found = []
    for killed in (False, True):
        folder = tmp_path / str(killed)
        folder.mkdir()
        harness = Harness(folder, keep_config(), polls=1)
        trainer = harness.trainer()
        command_at(trainer, harness, 13, wish)
        if killed:
            step = trainer.train_step

            def dying(trainer: TolariaTrainer = trainer, step: Any = step) -> None:
                if trainer.step == 17:
                    raise KeyboardInterrupt
                step()

            trainer.train_step = dying  # type: ignore[method-assign]  # kill -9
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.journal.close()
            trainer = harness.trainer()
            trainer.resume()
            harness.scripted.waiting_commands.append(wish)  # the gateway passes it on again
        trainer.train()
        assert len(trainer.engine.seeds()) == 1
        found.append(weights(trainer))
    assert same(*found)


def test_pause_resume_stop_and_checkpoint(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    command_at(trainer, harness, 3, Command(command_id="p", kind=CommandKind.PAUSE))
    looks: list[int] = []

    def while_paused() -> None:
        looks.append(trainer.step)
        if len(looks) == 2:
            harness.scripted.waiting_commands += [
                Command(command_id="k", kind=CommandKind.CHECKPOINT),
                Command(command_id="r", kind=CommandKind.RESUME),
            ]

    harness.scripted.on_wait = while_paused
    command_at(trainer, harness, 20, Command(command_id="r2", kind=CommandKind.RESUME))
    command_at(trainer, harness, 21, Command(command_id="s", kind=CommandKind.STOP, reason="enough"))
    with pytest.raises(TrainingInterruptedError, match="enough"):
        trainer.train()
    assert looks == [3, 3]
    assert [answer.command.command_id for answer in harness.scripted.answers] == ["p", "r", "k", "r2", "s"]
    assert harness.interrupt.asked_by_caller
    assert {3, 21} <= set(CheckpointStore(tmp_path / "checkpoints", 5).steps())


@pytest.mark.parametrize("how", ["signal", "command"])
def test_a_paused_run_can_be_stopped(tmp_path: Path, how: str) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    command_at(trainer, harness, 3, Command(command_id="p", kind=CommandKind.PAUSE))

    def while_paused() -> None:
        if how == "signal":
            harness.interrupt.request("interrupted by SIGINT")
        else:
            harness.scripted.waiting_commands.append(Command(command_id="s", kind=CommandKind.STOP))

    harness.scripted.on_wait = while_paused
    with pytest.raises(TrainingInterruptedError):
        trainer.train()
    assert trainer.step == 3


def test_a_caller_rolls_back_to_a_checkpoint(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer(grow=True)
    command_at(trainer, harness, 22, Command(command_id="x", kind=CommandKind.ROLLBACK, checkpoint="77"))
    command_at(trainer, harness, 23, Command(command_id="y", kind=CommandKind.ROLLBACK, checkpoint="9"))
    result = trainer.train()
    answers = {answer.command.command_id: answer for answer in harness.scripted.answers}
    assert answers["x"].error_reason == "CHECKPOINT_NOT_FOUND"
    assert answers["y"].checkpoint_step == 9
    assert result.steps == trainer.total_steps
    assert trainer.governor.rollbacks >= 1


@pytest.mark.parametrize("when", ["before it was saved", "later"])
def test_a_resume_after_a_callers_rollback_equals_its_twin(tmp_path: Path, when: str) -> None:
    back = Command(command_id="b", kind=CommandKind.ROLLBACK, checkpoint="9")
    wish = Command(command_id="c", kind=CommandKind.GERMINATE, slot="groups.0.conv2", blueprint=WIDEN.id, size=1)
    found = []
    for name in ("twin", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        harness = Harness(folder, keep_config(), polls=1)
        trainer = harness.trainer()
        # A command behind the rollback is met after it, at the step that the run went back to.
        commands = [back, wish] if when == "later" else [back]
        command_at(trainer, harness, 24, *commands)
        if name == "resumed":
            save, step = trainer.save, trainer.train_step

            def dying_save(trainer: TolariaTrainer = trainer, save: Any = save, *, newest: bool = False) -> bool:
                if trainer.governor.rollbacks and when == "before it was saved":
                    raise KeyboardInterrupt
                return bool(save(newest=newest))

            def dying_step(trainer: TolariaTrainer = trainer, step: Any = step) -> None:
                if trainer.governor.rollbacks and trainer.step == 15:
                    raise KeyboardInterrupt
                step()

            trainer.save = dying_save  # type: ignore[method-assign]  # kill -9
            trainer.train_step = dying_step  # type: ignore[method-assign]  # the same, later
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.journal.close()
            trainer = harness.trainer()
            trainer.resume()
            assert trainer.governor.rollbacks == (when == "later")
            command_at(trainer, harness, 30, back)  # the gateway passes it on again
        trainer.train()
        assert trainer.governor.rollbacks == trainer.governor.asked_for == 1
        assert len(trainer.engine.seeds()) == len(commands) - 1
        found.append(weights(trainer))
    assert same(*found)


def test_what_follows_a_checkpoint_at_its_own_safe_point_is_replayed(tmp_path: Path) -> None:
    harness = Harness(tmp_path, keep_config(), polls=1)
    trainer = harness.trainer()
    wish = Command(command_id="c", kind=CommandKind.GERMINATE, slot="groups.0.conv2", blueprint=WIDEN.id, size=1)
    stop = Command(command_id="s", kind=CommandKind.STOP)
    command_at(trainer, harness, 13, Command(command_id="k", kind=CommandKind.CHECKPOINT), wish)
    command_at(trainer, harness, 15, stop)
    with pytest.raises(TrainingInterruptedError):
        trainer.train()
    trainer.journal.close()
    CheckpointStore(tmp_path / "checkpoints", 5).discard_after(13)  # as if it had been killed instead
    again = harness.trainer()
    again.resume()
    assert not again.engine.seeds()
    again.train()
    assert len(again.engine.seeds()) == 1


# ---- the end -----------------------------------------------------------------------------------------------------


def test_the_test_set_is_locked_until_the_end(tmp_path: Path) -> None:
    trainer = Harness(tmp_path, config_of()).trainer()
    with pytest.raises(TestSetTouchedError):
        trainer.test_set.take()
    trainer.train()
    with pytest.raises(TestSetTouchedError):
        trainer.test_set.take()


def test_controls_train_on_the_same_batches(tmp_path: Path) -> None:
    harness = Harness(tmp_path, keep_config(), ONCE)
    grown = harness.trainer()
    grown.train()
    table = changes(grown.engine)
    shapes = {}
    for name in ("host", "bigger"):
        build = controls.builder(name, harness.build_host, table, 0)
        control = harness.trainer(
            arm=name,
            grow=False,
            mesh=OfflineMesh(),
            build_host=build,
            checkpoints=None,
            journal=Journal(tmp_path / f"{name}.jsonl"),
        )
        assert torch.equal(control.batches.at(3, 2).images, grown.batches.at(3, 2).images)
        assert not control.save()
        control.train()
        shapes[name] = {key: tuple(tensor.shape) for key, tensor in weights(control).items()}
    assert shapes["bigger"] == {key: tuple(tensor.shape) for key, tensor in weights(grown).items()}
    assert shapes["host"] == {key: tuple(tensor.shape) for key, tensor in harness.build_host().state_dict().items()}


def test_decision_epochs_are_spread_over_the_window() -> None:
    assert decision_epochs(100, (0.05, 0.3), 3) == [5, 18, 30]
    assert decision_epochs(100, (0.05, 0.3), 1) == [5]
    assert decision_epochs(4, (0.0, 0.3), 3) == [1]
    assert decision_epochs(1, (0.0, 1.0), 3) == []
    assert decision_epochs(4, (0.0, 0.3), 2, trained=True) == [0, 1]
    assert decision_epochs(1, (0.0, 1.0), 3, trained=True) == [0]
    assert decision_epochs(4, (0.9, 1.0), 2) == [3]


def test_a_trained_host_is_extended(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer(grow=False)
    trainer.train()
    export(trainer.engine, tmp_path / "export", harness.config.model, harness.data)
    config = harness.config.model.model_copy(update={"weights": tmp_path / "export" / "weights.safetensors"})
    again = models.build_host(config, harness.data, 5)
    assert same({k: v.clone() for k, v in again.state_dict().items()}, weights(trainer))


def test_what_grew_before_the_first_step_grows_again_on_replay_and_nobody_is_asked(tmp_path: Path) -> None:
    host = Harness(tmp_path / "host", config_of(training={"epochs": 1})).trainer(grow=False)
    host.train()
    export(host.engine, tmp_path / "export", host.config.model, host.data)
    config = config_of(
        model={"weights": str(tmp_path / "export" / "weights.safetensors")},
        training={"epochs": 3},
        growth={"evaluation": KEEP, "window": [0.0, 0.4], "decisions": 2},
    )
    harness = Harness(tmp_path / "grown", config, ONCE)
    trainer = harness.trainer()
    trainer.train()
    assert [record.germinated_step for record in trainer.engine.seeds()] == [0, 0]
    assert len(harness.scripted.targets) == 2
    trainer.journal.close()
    shutil.rmtree(tmp_path / "grown" / "checkpoints")
    again = harness.trainer()
    again.resume()
    again.train()
    assert [record.birth_step for record in again.engine.seeds()] == [r.birth_step for r in trainer.engine.seeds()]
    assert same(weights(again), weights(trainer))
    assert (harness.scripted.asked, harness.scripted.targets) == ([], [])

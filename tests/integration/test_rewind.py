"""Culled seeds under ``evaluation.cull: rewind``: the trial never was, but for what it cost."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from services.kasmina.lifecycle import SeedState
from services.tolaria.errors import CheckpointWriteError
from services.tolaria.ports import Command, CommandKind
from services.tolaria.trainer import ArmResult, TolariaTrainer
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, Policy, config_of, grow_once, same, weights

pytestmark = pytest.mark.parallel

#: An epoch has nine steps. Planned at step 9, grafted when the kernels are there, measured at 18 and at 27: culled.
ONCE = grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv1", WIDEN, 3))
GRAFT, CULLED = 12, 27
#: Nothing is worth a hundred points: every seed is culled after its second measurement.
HOPELESS = {"threshold": 100.0, "min_epochs": 1, "cull": "rewind"}
BRANCHED = grow_once(("span:groups.2", BRANCH, 2))
CULL = Command(command_id="c1", kind=CommandKind.CULL, seed="seed-1")
SAVE = Command(command_id="c2", kind=CommandKind.CHECKPOINT)


@pytest.fixture(autouse=True, scope="module")
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")


def made(folder: Path, policy: Policy = ONCE, **growth: Any) -> Harness:
    folder.mkdir()
    growth = {"evaluation": HOPELESS, **growth}
    training = {"epochs": 6, "device": "cpu", "ema_decay": 0.9, "optimizer": {"learning_rate": 0.2}}
    return Harness(folder, config_of(model={"widths": [2, 3, 3]}, growth=growth, training=training), policy)


@pytest.fixture(scope="module")
def twin(_deterministic: None, tmp_path_factory: pytest.TempPathFactory) -> TolariaTrainer:
    """A finished run in which nothing was ever grafted."""
    trainer = made(tmp_path_factory.mktemp("twin") / "run", lambda _: ()).trainer()
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def whole(_deterministic: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[TolariaTrainer, ArmResult]:
    """A finished run that was rewound once, and that nobody disturbed."""
    trainer = made(tmp_path_factory.mktemp("whole") / "run").trainer()
    return trainer, trainer.train()


def before_step(trainer: TolariaTrainer, step: int, rewinds: int, act: Callable[[], None]) -> None:
    """``act`` once, before the step after ``step`` is made for the first time since ``rewinds`` rewinds."""
    original = trainer.train_step
    acted: list[int] = []

    def acting() -> None:
        if (trainer.step, trainer.rewinds) == (step, rewinds) and not acted:
            acted.append(step)
            act()
        original()

    trainer.train_step = acting  # type: ignore[method-assign]  # somebody acts at that moment


def die() -> None:
    """As a kill -9 between two steps."""
    raise KeyboardInterrupt


def command_at(trainer: TolariaTrainer, harness: Harness, step: int, *commands: Command, rewinds: int = 0) -> None:
    """A caller's commands wait at the safe point after ``step``."""
    before_step(trainer, step - 1, rewinds, lambda: harness.scripted.waiting_commands.extend(commands))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def all_of(trainer: TolariaTrainer) -> dict[str, torch.Tensor]:
    """Weights, their average, optimizer and random numbers."""
    return {name: tensor.clone() for name, tensor in trainer.capture().tensors.items()}


def resumed_after_death(harness: Harness, trainer: TolariaTrainer) -> TolariaTrainer:
    """The run goes on in a new process from what is on the disk, once it died."""
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.journal.close()
    trainer = harness.trainer()
    trainer.resume()
    return trainer


def reasons(trainer: TolariaTrainer) -> list[str]:
    """Why the seeds are gone, as the summary tells it."""
    return [trainer.coordinator.reason(record) for record in trainer.engine.seeds()]


def test_a_rewound_run_equals_one_without_the_trial(
    twin: TolariaTrainer, whole: tuple[TolariaTrainer, ArmResult]
) -> None:
    trainer, _ = whole
    assert same(all_of(trainer), all_of(twin))
    assert trainer.rewinds == 1
    assert trainer.accuracies == twin.accuracies
    assert [record.outcome for record in trainer.engine.seeds()] == [SeedState.CULLED] * 2
    (event,) = events(trainer.folder, "rewind")
    assert (event["seeds"], event["from_step"], event["to_step"]) == (["seed-1", "seed-2"], CULLED, GRAFT)
    # The steps taken back were paid for: they are in the training's FLOPs, and said to be lost.
    lost = trainer.account.discarded_flops
    assert lost > trainer.account.training_flops * (CULLED - GRAFT) / (trainer.total_steps + CULLED - GRAFT)
    assert trainer.account.training_flops == twin.account.training_flops + lost


def test_a_rewind_is_told_wherever_its_seeds_are(whole: tuple[TolariaTrainer, ArmResult]) -> None:
    trainer, _ = whole
    assert all(reason.endswith(f"; rewound to step {GRAFT}") for reason in reasons(trainer))
    mesh: Any = trainer.mesh
    (told,) = [event for topic, event in mesh.events if topic == "system.events.rollback"]
    assert (told.from_step, told.to_step, list(told.seeds)) == (CULLED, GRAFT, [])
    shown = [picture for picture in mesh.pictures if getattr(picture, "reason", "").endswith(f"to step {GRAFT}")]
    assert {picture.name for picture in shown} == {"runs/run-1/seeds/seed-1", "runs/run-1/seeds/seed-2"}
    # In the record, too, and for good: their slots are free again by now.
    lineage = json.loads((trainer.folder / "lineage.json").read_text())["seeds"]
    assert [(seed["state"], seed["reason"]) for seed in lineage] == [("DORMANT", reason) for reason in reasons(trainer)]
    # Epochs that were taken back are not in the curve, and decisions are not made twice.
    curve = [json.loads(line)["epoch"] for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert curve == list(range(1, 7))
    decided = [json.loads(line)["epoch"] for line in (trainer.folder / "decisions.jsonl").read_text().splitlines()]
    assert decided == sorted(set(decided))
    assert len(decided) == len(mesh.asked)


def test_a_seed_that_is_only_removed_leaves_its_mark(tmp_path: Path, twin: TolariaTrainer) -> None:
    trainer = made(tmp_path / "removed", evaluation={**HOPELESS, "cull": "remove"}).trainer()
    trainer.train()
    assert trainer.rewinds == 0
    assert not same(weights(trainer), weights(twin))
    assert not any("rewound" in reason for reason in reasons(trainer))


@pytest.mark.parametrize("killed", [False, True])
def test_a_branch_that_a_caller_culls_is_rewound(
    tmp_path: Path, twin: TolariaTrainer, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    harness = made(tmp_path / "culled", BRANCHED, isolation_steps=3, blend_steps=6)
    trainer = harness.trainer()
    # The checkpoint is of a moment at which the seed is gone and its steps are not yet taken back.
    command_at(trainer, harness, 26, CULL, SAVE)
    if killed:
        monkeypatch.setattr(trainer, "_rewind", lambda *_, **__: die())
        trainer = resumed_after_death(harness, trainer)
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert record.graft_epoch is not None
    assert trainer.rewinds == 1
    assert same(all_of(trainer), all_of(twin))


def test_a_branch_that_is_not_let_in_is_rewound(tmp_path: Path, twin: TolariaTrainer) -> None:
    blend = {"schedule": "drift", "drift": 1e-9, "max_steps": 5}
    trainer = made(tmp_path / "run", BRANCHED, isolation_steps=3, blend=blend, blend_steps=4).trainer()
    trainer.train()
    (event,) = events(tmp_path / "run", "rewind")
    assert event["from_step"] - event["to_step"] == 5
    (reason,) = reasons(trainer)
    assert reason.endswith(f"; rewound to step {event['to_step']}")
    assert same(all_of(trainer), all_of(twin))


def test_a_decision_that_was_made_is_not_made_again(tmp_path: Path, twin: TolariaTrainer) -> None:
    harness = made(tmp_path / "run", evaluation={**HOPELESS, "min_epochs": 3}, window=[0.1, 0.5])
    trainer = harness.trainer()
    # At the end of an epoch after which Tamiyo was asked.
    (*_, last) = trainer.decision_epochs
    seconds = Command(command_id="c2", kind=CommandKind.CULL, seed="seed-2")
    command_at(trainer, harness, 9 * last, CULL, seconds)
    trainer.train()
    assert trainer.rewinds == 1
    assert len(harness.scripted.asked) == len(trainer.decision_epochs)
    assert same(all_of(trainer), all_of(twin))


def test_without_a_snapshot_it_is_said_that_the_seed_was_only_removed(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run").trainer()
    # As resumed from a checkpoint that was made under cull: remove.
    trainer._take_snapshots = lambda: None  # type: ignore[method-assign]  # none are taken
    trainer.train()
    assert trainer.rewinds == 0
    (event,) = events(tmp_path / "run", "rewind refused")
    assert "no snapshot" in event["reason"]
    told = "; removed, not rewound: there is no snapshot of its graft: the run was not asked to rewind then"
    assert all(reason.endswith(told) for reason in reasons(trainer))


def test_a_seed_that_the_end_finds_unsettled_is_only_removed(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", evaluation={**HOPELESS, "min_epochs": 9}).trainer()
    trainer.train()
    assert trainer.rewinds == 0
    assert all(reason.endswith("; removed, not rewound: the schedule is over") for reason in reasons(trainer))


def test_a_trial_culled_before_its_graft_leaves_the_run_as_it_was(tmp_path: Path, twin: TolariaTrainer) -> None:
    harness = made(tmp_path / "culled", BRANCHED, isolation_steps=1000)
    trainer = harness.trainer()
    command_at(trainer, harness, 25, CULL)
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert record.graft_epoch is None
    assert trainer.rewinds == 0
    assert reasons(trainer) == ["asked for by a caller"]
    assert same(all_of(trainer), all_of(twin))


def test_a_trial_culled_where_it_was_grafted_has_no_steps_to_take_back(tmp_path: Path, twin: TolariaTrainer) -> None:
    harness = made(tmp_path / "culled")
    trainer = harness.trainer()
    command_at(trainer, harness, GRAFT, CULL, Command(command_id="c2", kind=CommandKind.CULL, seed="seed-2"))
    trainer.train()
    assert {record.outcome for record in trainer.engine.seeds()} == {SeedState.CULLED}
    assert trainer.rewinds == 0
    assert not events(tmp_path / "culled", "rewind refused")
    assert same(all_of(trainer), all_of(twin))


# The checkpoints of a run of ten steps an epoch: killed before the rewind, and at three places of the replay.
@pytest.mark.parametrize(("step", "rewinds"), [(15, 0), (15, 1), (21, 1), (30, 1)])
def test_killed_in_the_replay_and_resumed_equals_uninterrupted(
    tmp_path: Path, whole: tuple[TolariaTrainer, ArmResult], step: int, rewinds: int
) -> None:
    undisturbed, expected = whole
    harness = made(tmp_path / "killed")
    trainer = harness.trainer()
    # What a caller saves at the very safe point of the graft is whole, too.
    command_at(trainer, harness, GRAFT, SAVE)
    before_step(trainer, step, rewinds, die)
    trainer = resumed_after_death(harness, trainer)
    assert (trainer.step, trainer.rewinds) == (max(GRAFT, step // 9 * 9), rewinds)
    result = trainer.train()
    assert same(all_of(trainer), all_of(undisturbed))
    assert trainer.rewinds == undisturbed.rewinds == 1
    assert result.training_flops == expected.training_flops
    assert result.discarded_flops == expected.discarded_flops
    assert reasons(trainer) == reasons(undisturbed)


def test_its_journal_alone_rewinds_again(tmp_path: Path, whole: tuple[TolariaTrainer, ArmResult]) -> None:
    undisturbed, _ = whole
    shutil.copytree(undisturbed.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    harness = Harness(tmp_path / "run", undisturbed.config)
    again = harness.trainer()
    again.resume()
    again.train()
    assert again.rewinds == 1
    assert same(all_of(again), all_of(undisturbed))
    assert harness.scripted.asked == []


# ---- what else happens in a replay ---------------------------------------------------------------------------------


def poison(trainer: TolariaTrainer, step: int, rewinds: int) -> None:
    """The loss of the step after ``step`` is not a number, once."""

    def poisoning() -> None:
        original = trainer.objective

        class _Poisoned:
            own_loss = staticmethod(original.own_loss)

            def step(self, *_: Any) -> torch.Tensor:
                trainer.objective = original
                return torch.tensor(float("nan"))

        trainer.objective = _Poisoned()  # type: ignore[assignment]  # for one step

    before_step(trainer, step, rewinds, poisoning)


def test_a_rollback_of_the_governor_in_a_replay(tmp_path: Path) -> None:
    twin = made(tmp_path / "twin", lambda _: ()).trainer()
    poison(twin, 22, 0)
    twin.train()
    harness = made(tmp_path / "run")
    trainer = harness.trainer()
    poison(trainer, 22, 1)
    before_step(trainer, 30, 1, die)
    trainer = resumed_after_death(harness, trainer)
    trainer.train()
    assert (trainer.governor.rollbacks, trainer.rewinds) == (twin.governor.rollbacks, 1) == (1, 1)
    assert trainer.optimizer.rate_scale == twin.optimizer.rate_scale < 1.0
    assert same(all_of(trainer), all_of(twin))
    # Steps lost by both are lost once.
    steps = trainer.account.training_flops - twin.account.training_flops
    assert trainer.account.discarded_flops == twin.account.discarded_flops + steps


# To the state of the graft, which the rewind saved at once; and to one from before the decision: all happens again.
@pytest.mark.parametrize(("wanted", "found"), [("", (GRAFT, 1)), ("5", (5, 2))])
def test_a_rollback_of_a_caller_in_a_replay(
    tmp_path: Path, twin: TolariaTrainer, wanted: str, found: tuple[int, int]
) -> None:
    harness = made(tmp_path / "run")
    trainer = harness.trainer()
    command_at(trainer, harness, 5, SAVE)
    back = Command(command_id="c1", kind=CommandKind.ROLLBACK, checkpoint=wanted)
    command_at(trainer, harness, 15, back, rewinds=1)
    before_step(trainer, 17, 1, die)
    trainer = resumed_after_death(harness, trainer)
    trainer.train()
    assert [event["to_step"] for event in events(tmp_path / "run", "rollback")] == [found[0]]
    assert (trainer.governor.asked_for, trainer.rewinds) == (1, found[1])
    assert same(all_of(trainer), all_of(twin))


def test_a_rollback_does_not_lead_into_the_past_that_was_taken_back(
    tmp_path: Path, twin: TolariaTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = made(tmp_path / "run")
    trainer = harness.trainer()
    assert trainer.checkpoints is not None
    save = trainer.checkpoints.save

    def full(*arguments: Any, newest: bool = False) -> Path:
        if newest:
            raise CheckpointWriteError("the disk is full")
        return save(*arguments)

    monkeypatch.setattr(trainer.checkpoints, "save", full)
    # Saved with the seeds that are gone.
    back = Command(command_id="c1", kind=CommandKind.ROLLBACK, checkpoint="18")
    command_at(trainer, harness, 15, back, rewinds=1)
    trainer.train()
    (answer,) = harness.scripted.answers
    assert "there is no checkpoint of step 18; there are [9]" in answer.error_message
    assert answer.error_reason == "CHECKPOINT_NOT_FOUND"
    assert same(all_of(trainer), all_of(twin))


# ---- other seeds ---------------------------------------------------------------------------------------------------


def test_another_seed_that_left_no_trace_does_not_hinder_a_rewind(tmp_path: Path, twin: TolariaTrainer) -> None:
    harness = made(tmp_path / "run", BRANCHED, isolation_steps=3, blend_steps=6)
    trainer = harness.trainer()

    def plant() -> None:
        harness.scripted.refuse_kernels = "there is none"
        harness.scripted.waiting_commands.append(
            Command(command_id="c2", kind=CommandKind.GERMINATE, slot="groups.0.conv1", blueprint=WIDEN.id, size=2)
        )

    before_step(trainer, 17, 0, plant)
    command_at(trainer, harness, 26, CULL)
    trainer.train()
    assert [record.outcome for record in trainer.engine.seeds()] == [SeedState.CULLED, SeedState.CANCELLED]
    assert trainer.rewinds == 1
    assert same(all_of(trainer), all_of(twin))


def _either(good: bool, judge: Any, engine: Any, worth: Any) -> bool:
    return good or bool(judge(engine, worth))


def test_what_another_seed_became_is_not_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made(tmp_path / "run").trainer()
    record = trainer.engine.__class__._proven
    proven = {"seed-2"}
    judge = trainer.coordinator._judge

    def partial(seeds: Any, *arguments: Any) -> Any:
        # The second seed is kept when it is first judged; the other one is culled an epoch later.
        engine = trainer.engine
        found = []
        for seed in seeds:
            monkeypatch.setattr(engine, "_proven", functools.partial(_either, seed in proven, record, engine))
            found += judge([seed], *arguments)
        return found

    monkeypatch.setattr(trainer.coordinator, "_judge", partial)
    trainer.train()
    outcomes = {seed.seed: seed.outcome for seed in trainer.engine.seeds()}
    assert outcomes == {"seed-1": SeedState.CULLED, "seed-2": SeedState.FOSSILIZED}
    assert trainer.rewinds == 0
    (event,) = events(tmp_path / "run", "rewind refused")
    assert event["seeds"] == ["seed-1"]
    assert "seed-2" in event["reason"]
    assert reasons(trainer)[0].endswith("removed, not rewound: it would undo what became of seed-2 since the graft")

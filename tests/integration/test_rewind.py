"""Culled seeds under ``evaluation.cull: rewind``: the trial never was, but for what it cost."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from services.kasmina.lifecycle import SeedState
from services.tolaria.ports import Command, CommandKind
from services.tolaria.trainer import TolariaTrainer
from tests.integration.trainer_harness import BRANCH, WIDEN, Harness, Policy, config_of, grow_once, same, weights

pytestmark = pytest.mark.parallel

ONCE = grow_once(("groups.0.conv1", WIDEN, 2), ("groups.1.conv1", WIDEN, 3))
#: Nothing is worth a hundred points: every seed is culled after its second measurement.
HOPELESS = {"threshold": 100.0, "min_epochs": 1, "cull": "rewind"}
BRANCHED = grow_once(("span:groups.2", BRANCH, 2))
CULL = Command(command_id="c1", kind=CommandKind.CULL, seed="seed-1")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")


def made(folder: Path, policy: Policy = ONCE, **growth: Any) -> Harness:
    folder.mkdir()
    growth = {"evaluation": HOPELESS, "wait_for_kernel": True, **growth}
    return Harness(folder, config_of(model={"widths": [2, 3, 3]}, growth=growth), policy)


def command_at(trainer: TolariaTrainer, harness: Harness, step: int, *commands: Command) -> None:
    """A caller's commands wait at the safe point after ``step``."""
    original = trainer.train_step

    def commanding() -> None:
        original()
        if trainer.step == step and not trainer.rewinds:
            harness.scripted.waiting_commands.extend(commands)

    trainer.train_step = commanding  # type: ignore[method-assign]  # a caller at that moment


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def all_of(trainer: TolariaTrainer) -> dict[str, torch.Tensor]:
    """Weights, optimizer and random numbers."""
    return {name: tensor.clone() for name, tensor in trainer.capture().tensors.items()}


def kill_at(trainer: TolariaTrainer, step: int, rewinds: int) -> None:
    original = trainer.train_step

    def dying() -> None:
        if (trainer.step, trainer.rewinds) == (step, rewinds):
            raise KeyboardInterrupt
        original()

    trainer.train_step = dying  # type: ignore[method-assign]  # kill -9 between two steps


def test_a_rewound_run_equals_one_without_the_trial(tmp_path: Path) -> None:
    twin = made(tmp_path / "twin", lambda _: ()).trainer()
    twin.train()
    trainer = made(tmp_path / "rewound").trainer()
    trainer.train()
    assert same(all_of(trainer), all_of(twin))
    assert trainer.rewinds == 1
    assert trainer.accuracies == twin.accuracies
    assert [record.outcome for record in trainer.engine.seeds()] == [SeedState.CULLED] * 2
    (event,) = events(tmp_path / "rewound", "rewind")
    assert event["seeds"] == ["seed-1", "seed-2"]
    # The steps taken back were paid for: they are in the training's FLOPs, and said to be lost.
    lost = trainer.account.discarded_flops
    assert lost > 0
    assert trainer.account.training_flops == twin.account.training_flops + lost


def test_a_seed_that_is_only_removed_leaves_its_mark(tmp_path: Path) -> None:
    twin = made(tmp_path / "twin", lambda _: ()).trainer()
    twin.train()
    trainer = made(tmp_path / "removed", evaluation={**HOPELESS, "cull": "remove"}).trainer()
    trainer.train()
    assert trainer.rewinds == 0
    assert not same(weights(trainer), weights(twin))


@pytest.mark.parametrize("killed", [False, True])
def test_a_branch_that_a_caller_culls_is_rewound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool) -> None:
    twin = made(tmp_path / "twin", lambda _: ()).trainer()
    twin.train()
    harness = made(tmp_path / "culled", BRANCHED, isolation_steps=3, blend_steps=6)
    trainer = harness.trainer()
    # The checkpoint is of a moment at which the seed is gone and its steps are not yet taken back.
    command_at(trainer, harness, 26, CULL, Command(command_id="c2", kind=CommandKind.CHECKPOINT))
    if killed:

        def dying(*arguments: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, "_rewind", dying)  # kill -9 right before it
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        trainer.journal.close()
        trainer = harness.trainer()
        trainer.resume()
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert record.graft_epoch is not None
    assert trainer.rewinds == 1
    assert same(all_of(trainer), all_of(twin))


def test_without_a_snapshot_it_is_said_that_the_seed_was_only_removed(tmp_path: Path) -> None:
    trainer = made(tmp_path / "run").trainer()
    # As resumed from a checkpoint that was made under cull: remove.
    trainer._take_snapshots = lambda: None  # type: ignore[method-assign]  # none are taken
    trainer.train()
    assert trainer.rewinds == 0
    (event,) = events(tmp_path / "run", "rewind refused")
    assert "no snapshot" in event["reason"]


def test_a_trial_culled_before_its_graft_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    twin = made(tmp_path / "twin", lambda _: ()).trainer()
    twin.train()
    harness = made(tmp_path / "culled", BRANCHED, isolation_steps=1000)
    trainer = harness.trainer()
    command_at(trainer, harness, 25, CULL)
    trainer.train()
    (record,) = trainer.engine.seeds()
    assert record.outcome is SeedState.CULLED
    assert record.graft_epoch is None
    assert trainer.rewinds == 0
    assert same(all_of(trainer), all_of(twin))


# The checkpoints of a run of ten steps an epoch: killed before the rewind, and at three places of the replay.
@pytest.mark.parametrize(("step", "rewinds"), [(15, 0), (15, 1), (23, 1), (33, 1)])
def test_killed_in_the_replay_and_resumed_equals_uninterrupted(tmp_path: Path, step: int, rewinds: int) -> None:
    whole = made(tmp_path / "whole").trainer()
    expected = whole.train()
    harness = made(tmp_path / "killed")
    trainer = harness.trainer()
    kill_at(trainer, step, rewinds)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.journal.close()
    resumed = harness.trainer()
    resumed.resume()
    result = resumed.train()
    assert same(all_of(resumed), all_of(whole))
    assert resumed.rewinds == whole.rewinds == 1
    assert result.training_flops == expected.training_flops
    assert result.discarded_flops == expected.discarded_flops


def test_its_journal_alone_rewinds_again(tmp_path: Path) -> None:
    harness = made(tmp_path / "run")
    first = harness.trainer()
    first.train()
    first.journal.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    again = harness.trainer()
    harness.scripted.policy = lambda _: ()
    again.resume()
    again.train()
    assert again.rewinds == 1
    assert same(all_of(again), all_of(first))
    assert harness.scripted.asked == []


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

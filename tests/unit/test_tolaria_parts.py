"""Schedule, optimizer, evaluation, governor, checkpoints, journal, progress: each alone."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import json
import math
import os
import resource
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from services.chassis.config.schema import GovernorConfig, OptimizerConfig
from services.kasmina.model import ParameterGroup, Replacement
from services.tolaria import checkpoint, progress
from services.tolaria.accounting import Account, LapClock, breakdown
from services.tolaria.checkpoint import CheckpointStore, State
from services.tolaria.data.splits import Normalization, Split
from services.tolaria.errors import CheckpointError, CheckpointWriteError, JournalError
from services.tolaria.evaluation import Evaluation, contribution, evaluate, evaluation_mode
from services.tolaria.governor import Governor
from services.tolaria.journal import Clock, Journal
from services.tolaria.optimizer import GrowingOptimizer
from services.tolaria.ports import KernelUnavailableError, PendingKernel
from services.tolaria.schedule import Schedule
from services.tolaria.task import Classification

# ---- schedule ----------------------------------------------------------------------------------------------------


def test_rate_warms_up_and_decays_linearly() -> None:
    schedule = Schedule.of(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.2, newborn_warmup_steps=4), 100)
    assert schedule.warmup_steps == 20
    assert schedule.rate(0) == pytest.approx(0.05)
    assert schedule.rate(19) == pytest.approx(1.0)
    assert schedule.rate(20) == pytest.approx(1.0)
    assert schedule.rate(60) == pytest.approx(0.5)
    assert schedule.rate(100) == 0.0


def test_newborns_warm_up_on_their_own() -> None:
    schedule = Schedule(peak=1.0, total_steps=100, warmup_steps=0, newborn_warmup_steps=4)
    assert schedule.rate(50, birth_step=50) == pytest.approx(schedule.rate(50) / 4)
    assert schedule.rate(53, birth_step=50) == pytest.approx(schedule.rate(53))
    assert schedule.rate(54, birth_step=50) == schedule.rate(54)


def test_a_schedule_that_is_all_warm_up_ends() -> None:
    assert Schedule(peak=1.0, total_steps=4, warmup_steps=4, newborn_warmup_steps=0).rate(4) == 0.0


# ---- optimizer ---------------------------------------------------------------------------------------------------


def group_of(name: str, *parameters: nn.Parameter, birth_step: int = 0, trainable: bool = True) -> ParameterGroup:
    return ParameterGroup(name, birth_step, parameters, trainable)


def optimizer_of(name: str, total: int = 100, **config: object) -> GrowingOptimizer:
    settings = OptimizerConfig.model_validate({"name": name, "learning_rate": 0.1, **config})
    return GrowingOptimizer(settings, Schedule.of(settings, total))


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def give_gradients(parameters: Sequence[nn.Parameter], seed: int) -> None:
    for index, item in enumerate(parameters):
        item.grad = torch.randn(item.shape, generator=torch.Generator().manual_seed(1000 * seed + index))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_equals_torchs_bit_for_bit(name: str) -> None:
    ours, theirs = [parameter(3, 2), parameter(4)], [parameter(3, 2), parameter(4)]
    optimizer = optimizer_of(name, warmup_ratio=0.0)
    optimizer.sync([group_of("host", *ours)])
    reference: torch.optim.Optimizer = (
        torch.optim.AdamW(theirs, lr=0.1, weight_decay=5e-4)
        if name == "adamw"
        else torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    )
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        reference.param_groups[0]["lr"] = 0.1 * (100 - step) / 100
        optimizer.step(step)
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_survivors_keep_their_state_and_newborns_have_their_own_rate() -> None:
    host, newborn = parameter(3), parameter(2, seed=1)
    optimizer = optimizer_of("adamw", warmup_ratio=0.0, newborn_warmup_steps=2)
    optimizer.sync([group_of("host", host)])
    for step in range(3):
        give_gradients([host], step)
        optimizer.step(step)
    before = {name: value.clone() for name, value in optimizer.state().items()}
    optimizer.sync([group_of("host", host), group_of("seed-1", newborn, birth_step=3)])
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state().items())
    assert optimizer.rate(3, 3) == pytest.approx(optimizer.rate(3) / 2)
    give_gradients([host, newborn], 3)
    optimizer.step(3)
    state = optimizer.state()
    assert float(state["host/0/step"]) == 4
    assert float(state["seed-1/0/step"]) == 1
    optimizer.sync([group_of("host", host)])
    assert not any(name.startswith("seed-1") for name in optimizer.state())


def test_frozen_groups_do_not_move_and_the_norm_is_clipped_per_group() -> None:
    host, frozen = parameter(3), parameter(3, seed=1)
    before = frozen.detach().clone()
    optimizer = optimizer_of("sgd", clip_norm=0.5, momentum=0.0, weight_decay=0.0, warmup_ratio=0.0)
    optimizer.sync([group_of("host", host), group_of("seed-1", frozen, trainable=False)])
    host.grad, frozen.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([100.0, 0.0, 0.0])
    start = host.detach().clone()
    optimizer.step(0)
    assert torch.equal(frozen, before)
    assert torch.allclose(start - host.detach(), torch.tensor([0.05, 0.0, 0.0]), atol=1e-6)
    optimizer.zero_grad()
    assert host.grad is None


def test_fused_parameters_inherit_state() -> None:
    old, new = parameter(2, 2), parameter(1, 2, seed=1)
    optimizer = optimizer_of("sgd")
    optimizer.sync([group_of("host", old), group_of("seed-1", new)])
    give_gradients([old, new], 0)
    optimizer.step(0)
    momenta = [
        optimizer.state()["host/0/momentum_buffer"].clone(),
        optimizer.state()["seed-1/0/momentum_buffer"].clone(),
    ]
    fused = nn.Parameter(torch.cat([old, new]).detach())
    parts = ((old, (slice(0, 2), slice(None))), (new, (slice(2, 3), slice(None))))
    optimizer.sync([group_of("host", fused)], [Replacement(fused, parts)])
    assert torch.equal(optimizer.state()["host/0/momentum_buffer"], torch.cat(momenta))


def test_fusing_adamw_keeps_each_parts_corrected_moments() -> None:
    old, new = parameter(2), parameter(1, seed=1)
    optimizer = optimizer_of("adamw")
    optimizer.sync([group_of("host", old)])
    for step in range(6):
        if step == 4:
            optimizer.sync([group_of("host", old), group_of("seed-1", new, birth_step=4)])
        give_gradients([old, new], step)
        optimizer.step(step)
    state = optimizer.state()

    def corrected(moments: torch.Tensor, beta: float, step: float) -> torch.Tensor:
        return moments.div(1 - beta**step)

    expected = {
        name: torch.cat([corrected(state[f"host/0/{name}"], beta, 6), corrected(state[f"seed-1/0/{name}"], beta, 2)])
        for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999))
    }
    fused = nn.Parameter(torch.cat([old, new]).detach())
    optimizer.sync([group_of("host", fused)], [Replacement(fused, ((old, (slice(0, 2),)), (new, (slice(2, 3),))))])
    state = optimizer.state()
    assert float(state["host/0/step"]) == 6
    for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        assert torch.allclose(corrected(state[f"host/0/{name}"], beta, 6), expected[name], rtol=1e-5)


def test_fusing_what_was_never_stepped_leaves_no_state() -> None:
    old, fused = parameter(2), parameter(2)
    optimizer = optimizer_of("sgd")
    optimizer.sync([group_of("host", old)])
    optimizer.sync([group_of("host", fused)], [Replacement(fused, ((old, (slice(0, 2),)),))])
    assert optimizer.state() == {}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_state_comes_back(name: str) -> None:
    one = [parameter(3), parameter(2, seed=1)]
    optimizer = optimizer_of(name)
    groups = [group_of("host", one[0]), group_of("seed-1", one[1], birth_step=2)]
    optimizer.sync(groups)
    give_gradients(one, 0)
    optimizer.step(2)
    two = [nn.Parameter(item.detach().clone()) for item in one]
    other = optimizer_of(name)
    other.sync([group_of("host", two[0]), group_of("seed-1", two[1], birth_step=2)])
    other.load_state(optimizer.state())
    for items, which in ((one, optimizer), (two, other)):
        give_gradients(items, 1)
        which.step(3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(CheckpointError, match="'seed-9/0'"):
        other.load_state({"seed-9/0/momentum_buffer": torch.zeros(2)})


# ---- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_and_leaves_modes_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    images = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(10) % 3)
    plain = Normalization(torch.zeros(1, 1), torch.ones(1, 1))
    before = copy.deepcopy(model.state_dict())
    result = evaluate(model, split, plain, Classification(3), batch_size=4, flops_per_sample=7)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with evaluation_mode(model), torch.no_grad():
        logits = model(images)
    assert result.accuracy == pytest.approx(100.0 * float((logits.argmax(1) == split.labels).float().mean()))
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert result.flops == 70


def test_contribution_is_paired() -> None:
    def judged(correct: list[int]) -> Evaluation:
        return Evaluation(torch.tensor(correct, dtype=torch.bool), torch.zeros(len(correct)), 0.0)

    worth = contribution(judged([1, 1, 1, 0] * 25), judged([1, 0, 1, 0] * 25), 0.95)
    assert worth.points == pytest.approx(25.0)
    # Differences are 0 and 1: standard error 100 * sqrt(0.25 * 0.75 / 99), times 1.96.
    assert worth.high - worth.points == pytest.approx(1.959964 * 100 * math.sqrt(0.25 * 0.75 / 99), rel=1e-6)
    assert worth.low == pytest.approx(2 * worth.points - worth.high)
    assert worth.samples == 100
    same = contribution(judged([1, 0]), judged([1, 0]), 0.9)
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="two images"):
        contribution(judged([1]), judged([0]), 0.95)


# ---- governor ----------------------------------------------------------------------------------------------------


def noisy_losses(count: int) -> Iterator[float]:
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        yield 2.0 * math.exp(-step / 200) + 0.1 * float(torch.randn((), generator=generator))


def test_governor_is_quiet_while_a_noisy_loss_falls() -> None:
    governor = Governor(GovernorConfig(), chance=10.0, samples=5000)
    assert all(governor.observe_loss(loss) is None for loss in noisy_losses(600))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_governor_sees_nan_at_once(bad: float) -> None:
    unstable = Governor(GovernorConfig(), chance=10.0, samples=5000).observe_loss(bad)
    assert unstable is not None
    assert "the loss is" in unstable.reason


def test_governor_needs_patience_for_spikes() -> None:
    governor = Governor(GovernorConfig(patience_steps=3), chance=10.0, samples=5000)
    for loss in noisy_losses(60):
        governor.observe_loss(loss)
    assert governor.observe_loss(50.0) is None
    assert governor.observe_loss(1.5) is None  # one spike is forgiven
    assert governor.observe_loss(50.0) is None
    assert governor.observe_loss(50.0) is None
    unstable = governor.observe_loss(60.0)
    assert unstable is not None
    assert "for 3 steps, last 60" in unstable.reason


@pytest.mark.parametrize("window", [10, 25, 50])
def test_governor_judges_by_the_median_and_its_deviation(window: int) -> None:
    """Against the definition, worked out anew from the whole window at each step."""
    config = GovernorConfig(window_steps=window, spike_sigmas=3.0, patience_steps=2)
    governor = Governor(config, chance=10.0, samples=5000)
    kept: list[float] = []
    spikes = told = normal = 0
    first = abs(next(noisy_losses(1))) * 2.5
    for step, loss in enumerate(noisy_losses(400)):
        value = loss * 2.5 if step % 17 in (0, 1) else loss
        unstable = governor.observe_loss(value)
        if len(kept) >= window // 2:
            middle = statistics.median(kept)
            sigma = 1.4826 * statistics.median(abs(one - middle) for one in kept)
            limit = middle + 3.0 * max(sigma, 0.02 * abs(middle), 0.005 * first)
            if value > limit:
                spikes += 1
                told += spikes >= 2
                assert (unstable is not None) == (spikes >= 2)
                assert unstable is None or f"above {limit:.4g} for {spikes} steps" in unstable.reason
                continue
        assert unstable is None
        spikes = 0
        normal += 1
        kept = [*kept, value][-window:]
    assert told > 5
    assert normal > 100
    assert governor.state()["losses"] == kept


def test_governor_lets_a_loss_near_zero_leap() -> None:
    governor = Governor(GovernorConfig(), chance=10.0, samples=5000)
    assert governor.observe_loss(2.3) is None
    for step in range(100):
        governor.observe_loss(0.003 + 0.0001 * (step % 3))
    # Eight times the median and hundreds of deviations, but a hundredth of what it began with.
    assert [governor.observe_loss(0.024) for _ in range(20)] == [None] * 20
    for _ in range(GovernorConfig().patience_steps - 1):
        assert governor.observe_loss(0.5) is None
    assert governor.observe_loss(0.5) is not None


def test_governor_sees_collapse_to_chance() -> None:
    governor = Governor(GovernorConfig(), chance=10.0, samples=5000)
    assert governor.observe_accuracy(10.0) is None  # never was better than chance
    assert governor.observe_accuracy(80.0) is None
    unstable = governor.observe_accuracy(10.5)
    assert unstable is not None
    assert "from 80.0 % to 10.5 %" in unstable.reason


@pytest.mark.parametrize(
    ("chance", "samples", "good", "gone"),
    [
        (10.0, 5000, 20.0, 12.0),
        (1.0, 5000, 2.0, 1.2),
        (10.0, 40, 28.97, 12.0),  # few images are good by luck
        (50.0, 5000, 55.55, 51.11),  # nothing is twice as good as a coin
        (50.0, 100, 70.0, 51.11),
        (90.0, 5000, 91.69, 90.22),  # nine of ten are of one class
        (0.0, 5000, 0.0, 0.0),
    ],
)
def test_governor_knows_chance_with_many_classes_and_with_two(
    chance: float, samples: int, good: float, gone: float
) -> None:
    for best, now, collapsed in [
        (good + 0.1, gone, True),
        (good - 0.1, gone, False),
        (good + 0.1, gone + 0.1, False),
    ]:
        governor = Governor(GovernorConfig(), chance, samples)
        assert governor.observe_accuracy(best) is None
        # A hundredth below: the limits here are rounded.
        assert (governor.observe_accuracy(max(0.0, now - 0.01)) is not None) == collapsed, (best, now)


def test_governor_can_be_switched_off_and_has_patience() -> None:
    off = Governor(GovernorConfig(enabled=False), chance=10.0, samples=5000)
    assert off.observe_loss(math.nan) is None
    off.observe_accuracy(90.0)
    assert off.observe_accuracy(10.0) is None
    governor = Governor(GovernorConfig(max_rollbacks=1), chance=10.0, samples=5000)
    assert not governor.patience_spent
    governor.rollbacks = 1
    assert governor.patience_spent


def test_governor_sees_an_explosion_at_once_and_before_any_statistics() -> None:
    governor = Governor(GovernorConfig(), chance=10.0, samples=5000)
    assert [governor.observe_loss(loss) for loss in (2.5, 40.0, 2400.0)] == [None] * 3
    unstable = governor.observe_loss(2600.0)
    assert unstable is not None
    assert "exploded to 2600; it began at 2.5" in unstable.reason
    perfect = Governor(GovernorConfig(), chance=10.0, samples=5000)
    assert [perfect.observe_loss(loss) for loss in (0.0, 1e-3)] == [None] * 2, "nothing is a thousand times nothing"


def test_governor_state_comes_back() -> None:
    one, two = (Governor(GovernorConfig(), chance=10.0, samples=5000) for _ in range(2))
    for loss in noisy_losses(40):
        one.observe_loss(loss)
    one.observe_loss(99.0)
    two.restore(**json.loads(json.dumps(one.state())))
    assert two.state() == one.state()


def test_guessing_is_to_say_the_most_frequent_class() -> None:
    assert Classification(4).guessing(torch.tensor([0, 1, 2, 3])) == 0.25
    assert Classification(2).guessing(torch.tensor([1, 1, 1, 0])) == 0.75
    assert Classification(4).guessing(torch.tensor([2, 1])) == 0.5


# ---- checkpoints -------------------------------------------------------------------------------------------------


def state(value: float) -> State:
    weight = torch.full((4,), value)
    return State({"model/a": weight, "model/tied": weight, "rng/cpu": torch.get_rng_state()}, {"step": int(value)})


def test_checkpoints_come_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.steps() == []
    for step in (1, 2, 3):
        store.save(step, state(step))
    store.save(3, state(3))  # again, as after a resume
    assert store.steps() == [2, 3]
    loaded = store.load(3)
    assert torch.equal(loaded.tensors["model/tied"], torch.full((4,), 3.0))
    assert loaded.values == {"step": 3}
    store.discard_after(2)
    assert store.steps() == [2]


def test_a_full_disk_leaves_the_old_checkpoint_intact(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (64, hard)
    )  # the kernel now refuses to write further, as a full disk does
    try:
        with pytest.raises(CheckpointWriteError, match="was not written: File too large"):
            store.save(2, state(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.steps() == [1]
    assert store.load(1).values == {"step": 1}
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    folder = store.save(1, state(1))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        store.load(2)
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensors.safetensors is damaged"):
        store.load(1)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"step": 1', '"step": 7'))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        store.load(1)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        store.load(1)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    store.save(1, state(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        store.load(1)


def test_a_detached_state_does_not_follow_the_weights() -> None:
    live = state(1)
    copy_of_it = live.detached()
    live.tensors["model/a"].fill_(9.0)
    assert torch.equal(copy_of_it.tensors["model/a"], torch.ones(4))
    assert checkpoint.environment(2, "cpu")["threads"] == 2


# ---- journal -----------------------------------------------------------------------------------------------------


def test_journal_is_met_again_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state" / "journal.jsonl")
    journal.append("decision", Clock(0, 18), {"plan": []})
    journal.append("load", Clock(0, 18), {"value": math.nan})
    journal.append("load", Clock(1, 3), {})
    assert not journal.replaying
    assert journal.next_at(Clock(1, 4), "load") is None
    journal.close()

    again = Journal(tmp_path / "state" / "journal.jsonl")
    again.position = 0
    assert again.replaying
    assert again.next_at(Clock(0, 17), "decision") is None
    assert again.next_at(Clock(0, 18), "load") is None  # the decision comes first
    entry = again.next_at(Clock(0, 18), "decision")
    assert entry is not None
    assert entry.content == {"plan": []}
    entry = again.next_at(Clock(0, 18), "load", "command")
    assert entry is not None
    assert entry.content == {"value": None}
    with pytest.raises(JournalError, match="was passed at step 5: this journal belongs to another run"):
        again.next_at(Clock(1, 5), "load")


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("load", Clock(0, 1), {})
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"kind": "lo')
    journal = Journal(path)
    assert journal.position == 1
    journal.append("load", Clock(0, 2), {})
    journal.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_damaged_or_unwritable_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"kind": 1}\n')
    with pytest.raises(JournalError, match="is damaged"):
        Journal(path)
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    journal = Journal(tmp_path / "other.jsonl")
    journal._file.close()
    journal._file = full.open("ab")
    with pytest.raises(JournalError, match=f"cannot be written: {os.strerror(errno.ENOSPC)}"):
        journal.append("load", Clock(0, 1), {})
    assert journal.position == 0
    with pytest.raises(OSError, match="No space left"):
        journal.close()


# ---- progress and accounting -------------------------------------------------------------------------------------


MESSAGES: list[progress.Progress] = [
    progress.EpochProgress(
        arm="grown",
        epoch=1,
        epochs=2,
        step=3,
        steps=6,
        train_loss=1.0,
        validation_loss=2.0,
        validation_accuracy=50.0,
        learning_rate=0.1,
        seconds=1.5,
        parameters=10,
        flops=20,
        seeds={"GRAFTING": 1},
    ),
    progress.StepProgress(arm="host", epoch=0, step=1, steps=2, loss=0.5, learning_rate=0.1, steps_per_second=9.0),
    progress.SeedProgress(
        seed="s",
        slot="conv1",
        blueprint="b",
        family="widen",
        size=2,
        from_state="DORMANT",
        to_state="GERMINATED",
        step=1,
        epoch=1,
        reason="",
        contribution=None,
    ),
    progress.DecisionProgress(decision=None, epoch=1, step=2, plan=({"slot": "a"},), explanation="x", latency_ms=1.0),
    progress.StatusProgress(state="training", message="now", detail={"import_seconds": 2.0}),
    progress.SummaryProgress(summary={"accuracy": {"grown": 90.0, "host": None}}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_progress_lines_come_back(message: progress.Progress) -> None:
    line = progress.encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert progress.decode(line) == message


def test_progress_reader_is_tolerant_of_the_new_and_strict_about_the_broken() -> None:
    assert progress.decode('{"kind": "weather"}') is None
    assert progress.decode('{"kind": "status", "state": "a", "message": "b", "new": 1}') == progress.StatusProgress(
        state="a", message="b"
    )
    for line in ("[]", '{"a": 1}', '{"kind": "status"}', "x"):
        with pytest.raises(ValueError):
            progress.decode(line)


def test_what_is_not_finite_becomes_null() -> None:
    message = progress.StepProgress(
        arm="a", epoch=0, step=1, steps=2, loss=math.nan, learning_rate=0.1, steps_per_second=math.inf
    )
    content = json.loads(progress.encode(message))
    assert content["loss"] is None
    assert content["steps_per_second"] is None


def test_progress_writer_sends_json_objects() -> None:
    sent: list[Mapping[str, Any]] = []

    class Pipe:
        def send(self, message: Mapping[str, Any]) -> bool:
            sent.append(message)
            return True

    progress.ProgressWriter(Pipe()).write(MESSAGES[4])
    assert progress.decode(json.dumps(sent[0])) == MESSAGES[4]


def test_scores_are_kept_in_few_letters() -> None:
    losses = torch.zeros(3)
    assert Evaluation(torch.tensor([True, False, True]), losses, 0.0).packed() == "101"
    assert Evaluation(torch.tensor([0.5, 1.0, 0.0]), losses, 0.0).packed() == [0.5, 1.0, 0.0]


def test_what_was_spent_adds_up() -> None:
    account = Account(
        training_flops=60.0, discarded_flops=5.0, growth_flops=30.0, health_flops=10.0, validation_flops=10.0
    )
    assert breakdown(account.state(), culled=7.0) == {
        "training": 60.0,
        "culled_seeds": 7.0,
        "discarded": 5.0,
        "growth": 30.0,
        "health": 10.0,
        "counterfactuals": 20.0,
        "validation": 10.0,
        "total": 100.0,
    }


def test_account_bills_forward_and_backward() -> None:
    account = Account()
    account.bill_steps(100, 8)
    assert account.training_flops == 2400
    earlier = account.state()
    account.bill_steps(100, 8)
    account.discard_since(earlier)
    account.bill_health(70.0)
    account.bill_counterfactual(30.0)
    assert (account.training_flops, account.discarded_flops) == (4800, 2400)
    assert (account.growth_flops, account.health_flops) == (100, 70)
    assert Account(**account.state()) == account
    lap = LapClock().lap()
    assert lap.seconds >= 0
    assert lap.cpu_seconds >= 0


# ---- kernels that are on their way ---------------------------------------------------------------------------------


def test_a_kernel_that_is_late_or_unwanted_is_not_there() -> None:
    late, unwanted = PendingKernel(concurrent.futures.Future()), PendingKernel(concurrent.futures.Future())
    assert not late.done
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        late.result(0.0)
    unwanted.cancel()
    assert unwanted.done
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        unwanted.result()
    late.future.set_result("digest")
    assert late.result(0.0) == "digest"

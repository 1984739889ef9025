"""Schedules of alpha: exact ends, bounded, a function of what was recorded, the same after a resume."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from services.kasmina.blending import BlendState, Evidence, advance, overdue, schedule_of
from services.kasmina.branches import Bridge
from services.kasmina.lifecycle import SeedState
from tests.support.growth import Loop, PlainNet, engine_for, equal, fresh, graft, resume, save, settings, snapshot

SPAN = "span:groups.1"


def run(schedule: str, *seen: Evidence, **blend: float) -> list[float]:
    """Alpha after each step."""
    chosen = settings(blend={"schedule": schedule, "max_steps": 100, **blend})
    state, shares = BlendState(), []
    for elapsed, evidence in enumerate(seen, 1):
        state = advance(schedule, chosen, state, elapsed, evidence)
        shares.append(state.share)
    return shares


def test_a_fixed_ramp_is_the_step_count() -> None:
    assert run("fixed", *[Evidence()] * 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_performance_waits_for_the_noise_and_while_the_loss_is_up() -> None:
    falling = [Evidence(1.0 - 0.01 * step) for step in range(14)]
    shares = run("performance", *falling)
    assert shares[:9] == [0.0] * 9
    assert shares[9:13] == [0.25, 0.5, 0.75, 1.0]
    risen = run("performance", *falling[:11], *[Evidence(3.0)] * 30)
    assert set(risen[11:]) == {risen[10]}, "a rise must not become the new normal"
    back = run("performance", *falling[:11], *[Evidence(3.0)] * 3, *[Evidence(0.8)] * 30)
    assert back[-1] == 1.0
    assert run("performance", *[Evidence(loss) for loss in (None, math.nan, math.inf)]) == [0.0] * 3


def test_drift_bounds_the_change_of_the_output_in_each_step() -> None:
    shares = run("drift", *[Evidence(change=0.5)] * 60, drift=0.02)
    steps = [after - before for before, after in zip([0.0, *shares], shares, strict=False)]
    assert max(steps) * 0.5 <= 0.02 + 1e-12
    assert shares[24] == 1.0
    assert shares[23] < 1.0
    assert run("drift", *[Evidence(change=0.01)] * 4, drift=0.02) == [0.25, 0.5, 0.75, 1.0]
    assert run("drift", Evidence(), Evidence(change=math.inf), Evidence(change=math.nan)) == [0.0] * 3


def test_gradient_waits_while_more_of_the_branch_would_raise_the_loss() -> None:
    assert run("gradient", *[Evidence(agreement=0.1)] * 4) == [0.25, 0.5, 0.75, 1.0]
    against = run("gradient", Evidence(agreement=0.1), *[Evidence(agreement=-0.5)] * 20)
    assert against == [0.25] * 21
    assert run("gradient", Evidence(), Evidence(agreement=math.nan)) == [0.0, 0.0]


@pytest.mark.parametrize("schedule", ["performance", "drift", "gradient"])
def test_who_is_not_let_in_in_time_is_said_to_be_late(schedule: str) -> None:
    chosen = settings(blend={"schedule": schedule, "max_steps": 9})
    assert overdue(schedule, chosen, BlendState(), 8) is None
    assert "alpha was only 0.00 after 9 steps" in str(overdue(schedule, chosen, BlendState(), 9))
    assert schedule_of(chosen, widening=False) == schedule
    assert schedule_of(chosen, widening=True) == ("performance" if schedule == "performance" else "fixed")


def test_a_ramp_that_cannot_end_is_refused() -> None:
    with pytest.raises(ValidationError, match="not enough for a ramp of 4"):
        settings(blend={"schedule": "drift", "max_steps": 4})


class Even(PlainNet):
    """Two groups of one width: the second keeps its shape."""

    def __init__(self) -> None:
        super().__init__((4, 4))


class Told(Loop):
    """A loop that tells the engine its loss."""

    losses: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        engine = self.engine
        assert engine is not None
        tick = engine.tick
        engine.tick = lambda step, loss=None: tick(step, self.losses)  # type: ignore[method-assign]  # what the trainer adds


def loop_of(schedule: str, *, seed: int = 0, drift: float = 0.02) -> Told:
    model = fresh(Even, seed)
    return Told(model, engine_for(model, blend={"schedule": schedule, "max_steps": 60, "drift": drift}))


def blended(schedule: str, drift: float = 0.02) -> Told:
    loop = loop_of(schedule, drift=drift)
    assert loop.engine is not None
    loop.train(2)
    loop.sync(graft(loop.engine, SPAN, 2, step=2))
    loop.train(3)
    assert loop.engine.seed("s1").state is SeedState.GRAFTING
    return loop


@pytest.mark.parametrize("schedule", ["fixed", "performance", "drift", "gradient"])
def test_a_resumed_blending_goes_on_bit_for_bit(schedule: str) -> None:
    loop = blended(schedule, drift=0.5)
    loop.train(2)
    other = loop_of(schedule, seed=3, drift=0.5)
    again = resume(save(loop), other)
    assert loop.engine is not None
    assert again.engine is not None
    loop.train(12)
    again.train(12)
    assert equal(snapshot(loop.model), snapshot(again.model))
    assert loop.engine.state() == again.engine.state()
    assert loop.engine.seed("s1").alpha > 0.0


@pytest.mark.parametrize("schedule", ["performance", "drift"])
def test_a_seed_that_is_never_let_in_is_culled_at_the_bound(schedule: str) -> None:
    loop = blended(schedule, drift=1e-9)
    loop.losses = None
    loop.train(60)
    assert loop.engine is not None
    record = loop.engine.seed("s1")
    assert record.state is SeedState.CULLED
    assert "alpha was only 0.00 after 60 steps" in record.reason
    assert loop.model.state_dict().keys() == fresh(Even).state_dict().keys()


@pytest.mark.parametrize("schedule", ["drift", "gradient"])
def test_looking_at_a_branch_at_alpha_zero_leaves_the_network_alone(schedule: str) -> None:
    """The host's output and gradients are those of the network without the branch."""
    loop = blended(schedule)
    bridge = loop.model.get_submodule("groups.1")
    assert isinstance(bridge, Bridge)
    bridge.zero_grad()
    values = torch.randn(3, 4, 4, 4)
    alone = bridge.host(values)
    joined = bridge(values)
    assert torch.equal(joined, alone)
    torch.autograd.backward(joined.square().sum())
    evidence = bridge.take_evidence(None)
    measured = evidence.change if schedule == "drift" else evidence.agreement
    assert measured is not None
    assert math.isfinite(measured)
    assert all(parameter.grad is None for parameter in bridge.branch.parameters())

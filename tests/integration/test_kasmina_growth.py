"""Growth in real training loops, bit for bit: against twins without a seed, and across kill and resume."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

from services.kasmina.branches import Bridge
from services.kasmina.lifecycle import SeedState
from services.kasmina.widening import GrownLayer
from tests.support.growth import (
    DepthwiseNet,
    Loop,
    Perceptron,
    PlainNet,
    ResidualNet,
    VisionTransformer,
    engine_for,
    equal,
    fresh,
    germinate,
    graft,
    images,
    kernel_for,
    resume,
    save,
    snapshot,
    worth,
)

pytestmark = pytest.mark.parallel

HOSTS = [PlainNet, ResidualNet, DepthwiseNet, Perceptron, VisionTransformer]


class Bridgeable(PlainNet):
    """Its second group keeps the shape, so that a residual branch fits."""

    def __init__(self) -> None:
        super().__init__((4, 4))


SPANS = [(Bridgeable, "span:groups.1"), (ResidualNet, "span:stage1.0"), (VisionTransformer, "span:blocks.1")]


def twin(host: type[nn.Module], steps: int) -> nn.Module:
    """The host trained alone by the same loop, with no engine near it."""
    loop = Loop(fresh(host))
    loop.train(steps)
    return loop.model


@pytest.mark.parametrize("host", HOSTS)
def test_a_dormant_engine_and_waiting_seeds_change_no_bit(host: type[nn.Module]) -> None:
    torch.manual_seed(5)
    expected = snapshot(twin(host, 6))
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    model = fresh(host)
    modules = list(model.modules())
    engine = engine_for(model)
    loop = Loop(model, engine)
    loop.train(2)
    germinate(engine, engine.slots()[0].name, 2, step=2)
    engine.measure_health([images(64)])
    loop.train(4)
    engine.cancel("s1", step=6, reason="a test")
    assert equal(expected, snapshot(model))
    assert torch.equal(stream, torch.get_rng_state())
    assert list(model.modules()) == modules


@pytest.mark.parametrize(("host", "span"), SPANS)
@pytest.mark.parametrize("end", ["cull", "cancel", "roll_back"])
def test_a_trial_culled_before_grafting_equals_no_trial(host: type[nn.Module], span: str, end: str) -> None:
    torch.manual_seed(5)
    expected = snapshot(twin(host, 9))
    stream = torch.get_rng_state()
    torch.manual_seed(5)
    model = fresh(host)
    engine = engine_for(model, isolation_steps=50)
    loop = Loop(model, engine)
    loop.train(2)
    loop.sync(graft(engine, span, 2, step=2))
    assert engine.seed("s1").state is SeedState.TRAINING
    born = [parameter.detach().clone() for parameter in engine.parameter_groups()[1].parameters]
    loop.train(4)
    assert not any(
        torch.equal(one, other) for one, other in zip(born, engine.parameter_groups()[1].parameters, strict=True)
    )
    gone = {
        "cull": lambda: engine.cull("s1", step=6, reason="a test"),
        "cancel": lambda: engine.cancel("s1", step=6, reason="a test"),
        "roll_back": lambda: engine.roll_back(["s1"], step=6, reason="a test"),
    }[end]()
    loop.sync(gone)
    loop.train(3)
    assert equal(expected, snapshot(model))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize(("host", "span"), SPANS)
def test_host_gradients_are_bit_identical_while_a_branch_is_isolated(host: type[nn.Module], span: str) -> None:
    alone, model = fresh(host), fresh(host)
    engine = engine_for(model)
    graft(engine, span, 2)
    batch, targets = images(8), torch.arange(8) % 5
    for network, seeded in ((alone, False), (model, True)):
        network.train()
        loss = nn.functional.cross_entropy(network(batch), targets)
        own = engine.auxiliary_loss(targets) if seeded else None
        torch.autograd.backward(loss if own is None else loss + own)
    group = engine.parameter_groups()[0].parameters
    for one, other in zip(alone.parameters(), group, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("host", HOSTS)
def test_a_network_grows_trains_is_judged_and_ends_as_plain_pytorch(host: type[nn.Module]) -> None:
    model = fresh(host)
    engine = engine_for(model)
    loop = Loop(model, engine)
    before = snapshot(model)
    names = [slot.name for slot in engine.slots() if slot.kind == "width"]
    for round_number in range(2):
        loop.train(2)
        for number, slot in enumerate(names):
            loop.sync(graft(engine, slot, 2, f"r{round_number}-{number}", step=loop.step))
        loop.train(3)
        for seed in engine.due_for_evaluation(round_number):
            loop.sync(engine.record_contribution(seed, worth(), step=loop.step, epoch=round_number))
        assert all(momentum is not None for momentum in save(loop).momentum[0])
    loop.train(2)
    assert not any(isinstance(module, GrownLayer | Bridge) for module in model.modules())
    after = snapshot(model)
    assert list(after) == list(before)
    changed = {row.path for row in engine.growth_table()}
    assert changed == {
        path
        for path in {n.rpartition(".")[0] for n in before}
        if any(before[n].shape != after[n].shape for n in before if n.rpartition(".")[0] == path)
    }
    assert all(slot.width == slot.host_width + 4 for slot in engine.slots() if slot.kind == "width")


def test_momentum_survives_fusing_as_if_the_layers_had_stayed_apart() -> None:
    fused, apart = fresh(PlainNet), fresh(PlainNet)
    loops = []
    for model in (fused, apart):
        engine = engine_for(model)
        loop = Loop(model, engine)
        loop.train(1)
        loop.sync(graft(engine, "groups.0.0", 2, step=1))
        loop.train(3)
        loops.append(loop)
    first = loops[0].engine
    assert first is not None
    loops[0].sync(first.record_contribution("s1", worth(), step=4, epoch=0))
    for loop in loops:
        loop.train(1)
    # Training mode: newborn running statistics move faster only until they are fused.
    assert torch.allclose(fused(images()), apart(images()), rtol=0, atol=1e-5)


def test_a_seed_removed_later_leaves_its_hosts_present_weights() -> None:
    model = fresh(ResidualNet)
    engine = engine_for(model)
    loop = Loop(model, engine)
    loop.sync(graft(engine, "stem", 3))
    loop.train(4)
    weights = {name.replace(".host.", "."): value for name, value in snapshot(model).items() if ".cells." not in name}
    loop.sync(engine.cull("s1", step=4, reason="a test"))
    kept = snapshot(model)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    loop.train(1)


# ------------------------------------------------------------------ kill and resume


def scenario(loop: Loop, until: int) -> None:
    """A life with everything in it; goes on from any step to ``until``.

    Widens one slot twice and bridges a span; one widening fossilizes beneath another; one is culled.
    """
    engine = loop.engine
    assert engine is not None
    span = "span:groups.1"
    while loop.step < until:
        step = loop.step
        if step == 1:
            germinate(engine, "groups.0.0", 2, "w1", step=step)
        if step == 2:
            loop.sync(engine.load("w1", kernel_for(engine.interface("groups.0.0"), 2), step=step, epoch=0))
            loop.sync(graft(engine, span, 2, "b1", step=step))
        if step == 4:
            loop.sync(graft(engine, "groups.0.0", 1, "w2", step=step))
            loop.sync(graft(engine, "groups.0.4", 2, "w3", step=step))
        if step == 6:
            loop.sync(engine.record_contribution("w2", worth(), step=step, epoch=0))
        if step == 8:
            loop.sync(engine.record_contribution("w1", worth(), step=step, epoch=1))
            loop.sync(engine.record_contribution("w3", worth(-2, -1), step=step, epoch=1))
        if step == 11:
            loop.sync(engine.record_contribution("b1", worth(), step=step, epoch=1))
        if step == 13:
            loop.sync(engine.record_contribution("b1", worth(), step=step, epoch=2))
            engine.expire(9)
        loop.train(1)


END = 16


@pytest.fixture(scope="module")
def uninterrupted() -> Loop:
    model = fresh(Bridgeable)
    loop = Loop(model, engine_for(model))
    scenario(loop, END)
    return loop


@pytest.mark.parametrize("killed_after", range(END))
def test_killed_at_any_step_and_resumed_equals_the_uninterrupted_run(uninterrupted: Loop, killed_after: int) -> None:
    model = fresh(Bridgeable)
    first = Loop(model, engine_for(model))
    scenario(first, killed_after)
    saved = save(first)
    again = fresh(Bridgeable, seed=99)
    second = resume(saved, Loop(again, engine_for(again)))
    assert equal(saved.weights, snapshot(again))
    scenario(second, END)
    compare(uninterrupted, second)


@pytest.mark.parametrize("back_to", [0, 1, 3, 5, 7, 9, 12])
@pytest.mark.parametrize("grown_to", [3, 8, 16])
def test_a_rollback_in_place_equals_a_fresh_resume(uninterrupted: Loop, back_to: int, grown_to: int) -> None:
    model = fresh(Bridgeable)
    loop = Loop(model, engine_for(model))
    scenario(loop, back_to)
    saved = save(loop)
    scenario(loop, max(grown_to, back_to))
    resume(saved, loop)
    scenario(loop, END)
    compare(uninterrupted, loop)


def compare(one: Loop, other: Loop) -> None:
    assert one.engine is not None
    assert other.engine is not None
    first, second = save(one), save(other)
    assert equal(first.weights, second.weights)
    assert list(first.weights) == list(second.weights)
    assert first.topology == second.topology
    for mine, theirs in zip(first.momentum, second.momentum, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)
    assert [dataclasses.replace(record) for record in one.engine.seeds()] == other.engine.seeds()


def test_the_scenario_passes_through_every_state_that_a_checkpoint_can_meet(uninterrupted: Loop) -> None:
    assert uninterrupted.engine is not None
    met = {transition.to_state for transition in uninterrupted.engine.transitions()}
    assert met == set(SeedState) - {SeedState.CANCELLED, SeedState.ROLLED_BACK}


@pytest.mark.parametrize(("host", "span"), SPANS)
def test_growth_works_in_mixed_precision(host: type[nn.Module], span: str) -> None:
    model = fresh(host)
    engine = engine_for(model)
    loop = Loop(model, engine)
    loop.sync(graft(engine, span, 2, "b"))
    loop.sync(graft(engine, engine.slots()[0].name, 2, "w"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = loop.train(9)
    assert done[-1].to_state is SeedState.EVALUATING
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("host", HOSTS)
def test_a_grown_network_exports_like_any_other(host: type[nn.Module]) -> None:
    model = fresh(host)
    engine = engine_for(model)
    for number, slot in enumerate([slot.name for slot in engine.slots() if slot.kind == "width"]):
        graft(engine, slot, 2, f"s{number}")
        engine.record_contribution(f"s{number}", worth(), step=0, epoch=0)
    model.eval()
    program = torch.export.export(model, (images(),)).module()
    assert torch.allclose(program(images()), model(images()), rtol=0, atol=1e-6)


# ------------------------------------------------------------------ any order of events


@pytest.mark.parametrize("host", [Bridgeable, ResidualNet, DepthwiseNet])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_events_keeps_costs_outputs_and_resumes_exact(host: type[nn.Module], seed: int) -> None:
    chance = random.Random(seed)
    model = fresh(host)
    engine = engine_for(model, **SHORT)
    loop = Loop(model, engine)
    for number in range(24):
        loop.sync(engine.expire(number))
        alive = [record for record in engine.seeds() if record.seed in {g.name for g in engine.parameter_groups()}]
        slot = chance.choice([slot.name for slot in engine.slots()])
        fits = not slot.startswith("span:") or engine.interface(slot).input_shape == engine.interface(slot).output_shape
        action = chance.choice(["graft", "graft", "train", "keep", "cull", "resume"])
        if action == "graft" and fits and engine.slot_status(slot, number).occupancy == "free":
            model.eval()
            before = model(images())
            kernel = kernel_for(engine.interface(slot), 1 + number % 3)
            blueprint = kernel.manifest.blueprint
            engine.germinate(
                seed_id=f"s{number}",
                slot=slot,
                blueprint=blueprint.id,
                family=blueprint.family,
                size=kernel.manifest.size,
                command_id=f"c{number}",
                step=loop.step,
                epoch=number,
            )
            loop.sync(engine.load(f"s{number}", kernel, step=loop.step))
            assert torch.allclose(before, model.eval()(images()), rtol=0, atol=1e-5)
        elif action == "keep":
            for due in engine.due_for_evaluation(number):
                loop.sync(engine.record_contribution(due, worth(), step=loop.step, epoch=number))
        elif action == "cull" and alive:
            chosen = chance.choice(alive)
            if chosen.state in {SeedState.TRAINING, SeedState.GRAFTING, SeedState.EVALUATING, SeedState.FINE_TUNING}:
                with engine.without([chosen.seed]):
                    expected = model.eval()(images())
                loop.sync(engine.cull(chosen.seed, step=loop.step, reason="a test"))
                # A removal may let an older seed be fused, which adds up in another order.
                assert torch.allclose(expected, model.eval()(images()), rtol=0, atol=1e-5)
        elif action == "resume":
            other = fresh(host, seed=50)
            again = resume(save(loop), Loop(other, engine_for(other, **SHORT)))
            assert torch.equal(model.eval()(images()), other.eval()(images()))
            loop, model = again, other
            assert loop.engine is not None
            engine = loop.engine
        loop.train(1)
        heads = sum(p.numel() for m in model.modules() if isinstance(m, Bridge) and m.head for p in m.head.parameters())
        assert engine.parameters() + heads == sum(parameter.numel() for parameter in model.parameters())
        owned = [parameter for group in engine.parameter_groups() for parameter in group.parameters]
        assert len(owned) == len({id(parameter) for parameter in owned}) == len(list(model.parameters()))


SHORT = {"isolation_steps": 1, "blend_steps": 2, "stabilization_steps": 1, "fine_tuning_steps": 1}

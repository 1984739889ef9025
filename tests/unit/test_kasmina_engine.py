"""The growth engine: lives of seeds, gates, occupancy, commands, costs, saved topologies."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from services.blueprints.spec import SlotKind
from services.kasmina.errors import (
    CommandConflictError,
    GrowthError,
    SlotUnavailableError,
    TopologyError,
    UnknownSeedError,
    UnknownSlotError,
)
from services.kasmina.lifecycle import IllegalTransitionError, SeedState
from services.kasmina.model import Contribution, SeedTransition, SlotOccupancy
from tests.support.growth import (
    BRANCH,
    WIDEN,
    Loop,
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
    labels,
    snapshot,
    worth,
)

S = SeedState
SPAN = "span:groups.1"


class Bridgeable(PlainNet):
    """Its second group keeps the shape, so that a residual branch fits."""

    def __init__(self) -> None:
        super().__init__((4, 4))


def path(transitions: list[SeedTransition]) -> list[str]:
    return [transition.to_state.value for transition in transitions]


def test_slots_are_listed_with_their_widths_and_layers_and_may_be_restricted() -> None:
    engine = engine_for(fresh(Bridgeable))
    slots = {slot.name: slot for slot in engine.slots()}
    assert slots["groups.0.0"].kind is SlotKind.WIDTH
    assert slots["groups.0.0"].readers == ("groups.0.4",)
    assert slots[SPAN].kind is SlotKind.SPAN
    assert slots[SPAN].width == 4
    some = engine_for(fresh(Bridgeable), slots=["groups.0.*"])
    assert [slot.name for slot in some.slots()] == ["groups.0.0", "groups.0.4"]
    assert some.refused()["groups.1.0"] == "not selected by growth.slots"
    chosen = {slot.name for slot in some.slots()}
    assert {slot for term in some.cost_terms() for slot in term.slots} <= chosen, "a planner knows no other widths"
    whole = engine_for(fresh(Bridgeable))
    assert (some.flops(), some.parameters()) == (whole.flops(), whole.parameters())
    with pytest.raises(UnknownSlotError, match="not selected"):
        some.interface("groups.1.0")
    with pytest.raises(UnknownSlotError, match="model's output"):
        some.interface("head")
    with pytest.raises(UnknownSlotError):
        some.slot_status("nowhere", 0)


def test_interfaces_follow_the_widths_and_span_interfaces_the_settled_ones() -> None:
    engine = engine_for(fresh(ResidualNet))
    stem = engine.interface("stem")
    assert stem.input_shape == (1, 8, 8)
    assert [layer.weight_shape for layer in stem.writers] == [(4, 1, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3)]
    assert [layer.path for layer in stem.followers] == ["bn", "stage1.0.bn2", "stage1.1.bn2"]
    assert stem.writers[0].bias
    assert not stem.readers[0].bias
    head = engine.interface("stage2.conv2").readers[0]
    assert (head.weight_shape, head.output_shape) == ((5, 24), (5,))
    graft(engine, "stem", 2)
    assert engine.interface("stem").output_shape == (6, 8, 8)
    assert engine.interface("stage1.0.conv1").input_shape == (6, 8, 8)
    assert engine.interface("span:stage1.0").input_shape == (4, 8, 8)
    engine.record_contribution("s1", worth(), step=0, epoch=0)
    assert engine.interface("span:stage1.0").output_shape == (6, 8, 8)
    tokens = engine_for(fresh(VisionTransformer)).interface("span:blocks.0")
    assert (tokens.input_shape, tokens.output_shape) == ((4, 8), (4, 8))


def test_a_widening_walks_its_path_and_its_records_tell_the_story() -> None:
    engine = engine_for(fresh(PlainNet))
    before = engine.parameters(), engine.flops()
    record = germinate(engine, "groups.0.0", 3)
    assert (record.state, record.germinated_epoch) == (S.GERMINATED, 0)
    assert engine.seed("s1") == record
    done = engine.load("s1", kernel_for(engine.interface("groups.0.0"), 3), step=4, digest="ab", epoch=2)
    assert path(done) == ["LOADING", "GRAFTING", "EVALUATING"]
    assert {transition.step for transition in done} == {4}
    assert {transition.epoch for transition in done} == {2}
    assert {transition.command_id for transition in done} == {"c-s1"}
    record = engine.seed("s1")
    assert (record.kernel, record.birth_step, record.graft_epoch, record.alpha) == ("ab", 4, 2, 1.0)
    assert engine.parameters() - before[0] == record.parameters
    assert engine.flops() - before[1] == record.flops
    [end] = engine.record_contribution("s1", worth(1, 3), step=9, epoch=3)
    assert (end.to_state, end.replaced != ()) == (S.FOSSILIZED, True)
    record = engine.seed("s1")
    assert record.outcome is S.FOSSILIZED
    assert record.contribution == worth(1, 3)
    assert "worth +2.00 points [+1.00, +3.00]" in record.reason
    assert path(engine.transitions())[0] == "GERMINATED"
    lineage = engine.lineage()
    assert lineage["slots"]["groups.0.0"] == {"host_width": 4, "width": 7}
    assert json.loads(json.dumps(lineage))["seeds"][0]["state"] == "FOSSILIZED"
    assert lineage["seeds"] == [dataclasses.asdict(record) for record in engine.seeds()]
    rows = {row.path: (row.operation, row.before_shape, row.after_shape) for row in engine.growth_table()}
    assert rows["groups.0.0"] == ("conv2d", (4, 1, 3, 3), (7, 1, 3, 3))
    assert rows["groups.0.2"] == ("batch_norm2d", (4,), (7,))
    assert rows["groups.0.4"] == ("conv2d", (4, 4, 3, 3), (4, 7, 3, 3))
    assert set(rows) == {"groups.0.0", "groups.0.2", "groups.0.4"}


def test_a_branch_walks_the_whole_path_by_its_steps() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model)
    loop = Loop(model, engine)
    base = engine.parameters(), engine.flops()
    loop.sync(graft(engine, SPAN, 2))
    assert engine.seed("s1").state is S.TRAINING
    assert engine.parameters() - base[0] == engine.seed("s1").parameters
    assert engine.flops() - base[1] == engine.seed("s1").flops
    shares = []
    seen = []
    for _ in range(9):
        seen += path(loop.train(1))
        shares.append(engine.seed("s1").alpha)
    assert seen == ["GRAFTING", "STABILIZATION", "EVALUATING"]
    assert shares == [0, 0, 0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert engine.due_for_evaluation(0) == ["s1"]
    loop.sync(engine.record_contribution("s1", worth(), step=9, epoch=0))
    assert engine.seed("s1").state is S.FINE_TUNING
    assert engine.due_for_evaluation(0) == []
    loop.train(2)
    assert engine.due_for_evaluation(0) == ["s1"]
    [end] = engine.record_contribution("s1", worth(), step=11, epoch=0)
    assert (end.to_state, end.replaced) == (S.FOSSILIZED, ())
    assert [group.name for group in engine.parameter_groups()] == ["host"]
    [row] = engine.growth_table()
    assert (row.path, row.operation, row.after_shape) == ("groups.1", "branch:residual_bottleneck", (4, 2, 4))
    assert [layer.name for layer in row.layers] == ["reduce", "activation", "expand"]
    tensors = {name for name in model.state_dict() if name.startswith("groups.1.") and ".host." not in name}
    assert tensors == {f"groups.1.branch.{name}" for layer in row.layers for name in layer.tensor_shapes()}
    assert json.loads(json.dumps(dataclasses.asdict(row)))["layers"][0]["operation"] == "conv2d"
    loop.sync([end])
    loop.train(1)
    assert engine.slot_status(SPAN, 0).occupancy is SlotOccupancy.FREE


def test_a_span_is_bridged_again_once_its_branch_is_fossilized() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model, isolation_steps=0, stabilization_steps=0, fine_tuning_steps=0)
    loop = Loop(model, engine)
    for number in range(3):
        assert path(graft(engine, SPAN, 2, f"s{number}", step=loop.step)) == ["LOADING", "GRAFTING"]
        loop.sync(())
        assert path(loop.train(4)) == ["EVALUATING"]
        if number < 2:
            loop.sync(engine.record_contribution(f"s{number}", worth(), step=loop.step, epoch=0))
    model.eval()
    with engine.without(["s2"]):
        expected = model(images())
    engine.cull("s2", step=loop.step, reason="a test")
    assert torch.equal(model(images()), expected)
    assert "groups.1.host.host.0.weight" in model.state_dict()


def test_branches_and_widenings_of_the_same_channels_do_not_disturb_each_other() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model, isolation_steps=0)
    loop = Loop(model, engine)
    graft(engine, SPAN, 2, "branch")
    loop.sync(())
    loop.train(4)
    model.eval()
    before = model(images())
    loop.sync(graft(engine, "groups.0.4", 3, "before"))
    loop.sync(graft(engine, "groups.1.4", 3, "behind"))
    assert torch.allclose(before, model.eval()(images()), rtol=0, atol=1e-6)
    loop.train(1)
    for seed in ("before", "behind"):
        loop.sync(engine.record_contribution(seed, worth(), step=loop.step, epoch=0))
    loop.train(1)
    engine.cull("branch", step=loop.step, reason="a test")
    loop.sync(())
    loop.train(1)
    assert "groups.1.0.weight" in model.state_dict()


def test_stabilization_freezes_the_branch_and_says_so_to_the_optimizer() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model, isolation_steps=0, blend_steps=1)
    loop = Loop(model, engine)
    loop.sync(graft(engine, SPAN, 2))
    loop.train(1)
    assert engine.seed("s1").state is S.STABILIZATION
    group = engine.parameter_groups()[1]
    assert (group.name, group.birth_step, group.trainable) == ("s1", 0, False)
    frozen = [parameter.detach().clone() for parameter in group.parameters]
    assert not any(parameter.requires_grad for parameter in group.parameters)
    loop.train(1)
    assert all(torch.equal(one, other) for one, other in zip(frozen, group.parameters, strict=True))
    loop.train(1)
    assert engine.seed("s1").state is S.EVALUATING
    assert engine.parameter_groups()[1].trainable


def test_an_isolated_seed_that_was_never_measured_or_is_not_finite_is_culled() -> None:
    engine = engine_for(fresh(Bridgeable))
    graft(engine, SPAN, 2)
    assert engine.tick(1) == []
    [gone] = engine.tick(3)
    assert (gone.to_state, gone.reason) == (S.CULLED, "its own loss was never measured while isolated")
    model = fresh(Bridgeable)
    engine = engine_for(model)
    graft(engine, SPAN, 2)
    model.train()(images())
    assert engine.auxiliary_loss(labels()) is not None
    assert engine.auxiliary_loss(labels()) is None
    with torch.no_grad():
        engine.parameter_groups()[1].parameters[0].fill_(math.nan)
    assert "not finite" in engine.tick(3)[0].reason


def test_own_losses_add_up_and_may_be_the_users() -> None:
    model = fresh(ResidualNet)
    engine = engine_for(model)
    assert engine.auxiliary_loss(labels()) is None
    graft(engine, "span:stage1.0", 2, "a")
    model.train()(images())
    alone = engine.auxiliary_loss(labels())
    graft(engine, "span:stage1.1", 2, "b")
    model(images())
    both = engine.auxiliary_loss(labels())
    assert alone is not None
    assert both is not None
    assert both.item() > alone.item()

    def squared(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.mean(1) - targets).square().mean()

    model(images())
    assert engine.auxiliary_loss(labels(), squared) is not None


GATES = [
    (worth(0.01, 2.0), ["FOSSILIZED"]),
    (worth(0.0, 0.0), []),
    (worth(-3.0, -0.1), ["CULLED"]),
    (worth(-1.0, 1.0), []),
    (None, []),
    (worth(math.nan, math.nan), []),
    (worth(-math.inf, math.inf), []),
]


DOUBTFUL = [
    # alone, with its plan, which rule, what becomes of it
    (worth(-1.0, 3.0), worth(2.0, 9.0), "plan", "FOSSILIZED"),
    (worth(-1.0, 3.0), worth(-0.5, 9.0), "plan", "CULLED"),
    (worth(-3.0, 1.0), worth(2.0, 9.0), "plan", "CULLED"),
    (worth(0.0, 0.0), worth(2.0, 9.0), "plan", "CULLED"),
    (None, worth(2.0, 9.0), "plan", "CULLED"),
    (worth(-1.0, 3.0), worth(2.0, 9.0), "cull", "CULLED"),
]


@pytest.mark.parametrize(("alone", "plan", "rule", "end"), DOUBTFUL)
def test_a_doubtful_seed_is_judged_by_its_plan(alone: Contribution, plan: Contribution, rule: str, end: str) -> None:
    engine = engine_for(fresh(PlainNet), evaluation={"min_epochs": 0, "doubtful": rule})
    graft(engine, "groups.0.0", 2)
    assert engine.record_contribution("s1", alone, step=0, epoch=0, plan=plan) == []
    assert engine.seed("s1").plan_contribution == plan
    # What is left of the plan later on does not count.
    assert path(engine.record_contribution("s1", alone, step=0, epoch=1, plan=worth(-9, -8))) == [end]
    assert engine.seed("s1").plan_contribution == plan


@pytest.mark.parametrize(("contribution", "expected"), GATES)
def test_gates_of_the_evaluation(contribution: None, expected: list[str]) -> None:
    engine = engine_for(fresh(PlainNet))
    graft(engine, "groups.0.0", 2)
    assert path(engine.record_contribution("s1", contribution, step=0, epoch=0)) == expected
    if not expected:
        [gone] = engine.record_contribution("s1", contribution, step=0, epoch=0)
        assert gone.to_state is S.CULLED
        assert "after two measurements" in gone.reason


def test_evaluation_waits_for_its_epochs_and_only_seeds_under_evaluation_are_judged() -> None:
    engine = engine_for(fresh(PlainNet), evaluation={"min_epochs": 2, "threshold": 0.5})
    germinate(engine, "groups.0.0", 2)
    with pytest.raises(IllegalTransitionError, match="not being evaluated"):
        engine.record_contribution("s1", worth(), step=0, epoch=0)
    with pytest.raises(UnknownSeedError):
        engine.record_contribution("nobody", worth(), step=0, epoch=0)
    engine.load("s1", kernel_for(engine.interface("groups.0.0"), 2), step=0, epoch=1)
    assert engine.due_for_evaluation(2) == []
    assert engine.due_for_evaluation(3) == ["s1"]
    assert engine.record_contribution("s1", worth(0.4, 2.0), step=0, epoch=3) == []


def test_a_slot_is_occupied_free_under_embargo_or_locked() -> None:
    engine = engine_for(fresh(Bridgeable))
    slot = "groups.0.0"
    assert engine.slot_status(slot, 0).occupancy is SlotOccupancy.FREE
    kernel = kernel_for(engine.interface(slot), 2)
    germinate(engine, slot, 2)
    assert engine.slot_status(slot, 0).occupancy is SlotOccupancy.OCCUPIED
    with pytest.raises(SlotUnavailableError, match="occupied"):
        germinate(engine, slot, 2, "s2")
    engine.load("s1", kernel, step=0, epoch=1)
    assert engine.slot_status(slot, 1).occupancy is SlotOccupancy.FREE
    assert engine.slot_status(slot, 1).seeds == ("s1",)
    engine.cull("s1", step=1, reason="a test")
    status = engine.slot_status(slot, 2)
    assert (status.occupancy, status.free_epoch, status.seeds) == (SlotOccupancy.EMBARGO, 3, ())
    assert status.penalties == engine.penalties(slot) == {WIDEN.id: 1.0}
    assert engine.penalties("groups.0.4") == {}
    with pytest.raises(SlotUnavailableError, match="embargo until epoch 3"):
        engine.germinate(
            seed_id="s2", slot=slot, blueprint=WIDEN.id, family="widen", size=2, command_id="x", step=0, epoch=2
        )
    assert engine.slot_status(slot, 3).occupancy is SlotOccupancy.FREE
    assert engine.expire(2) == []
    assert path(engine.expire(3)) == ["DORMANT"]
    assert engine.seed("s1").outcome is S.CULLED
    assert engine.seed("s1").reason == "a test", "how it ended, not that its slot is free"
    graft(engine, SPAN, 2, "b1")
    [rolled] = engine.roll_back(["b1"], step=5, reason="the loss spiked")
    assert rolled.to_state is S.ROLLED_BACK
    status = engine.slot_status(SPAN, 3)
    assert (status.occupancy, status.free_epoch) == (SlotOccupancy.LOCKED, 4)
    assert engine.quarantined() == {BRANCH.id}
    engine.expire(4)
    with pytest.raises(GrowthError, match="quarantined"):
        germinate(engine, SPAN, 2, "b2")


def test_germination_is_idempotent_and_refuses_what_makes_no_sense() -> None:
    engine = engine_for(fresh(Bridgeable))
    first = germinate(engine, "groups.0.0", 2)
    assert germinate(engine, "groups.0.0", 2) == first
    assert len(engine.seeds()) == 1

    def attempt(**changes: object) -> None:
        values: dict[str, object] = {
            "seed_id": "s2",
            "slot": "groups.0.4",
            "blueprint": WIDEN.id,
            "family": "widen",
            "size": 2,
            "command_id": "c2",
            "step": 0,
            "epoch": 0,
        }
        engine.germinate(**(values | changes))  # type: ignore[arg-type]  # values of the right types by name

    with pytest.raises(CommandConflictError, match="c-s1"):
        attempt(command_id="c-s1")
    with pytest.raises(CommandConflictError, match="'s1' already"):
        attempt(seed_id="s1")
    for bad in ("a.b", "a:b", "", "host", "x" * 65):
        with pytest.raises(GrowthError, match="seed id"):
            attempt(seed_id=bad)
    with pytest.raises(GrowthError, match="family 'columns'"):
        attempt(family="columns")
    with pytest.raises(GrowthError, match="SPAN"):
        attempt(family="residual_bottleneck")
    with pytest.raises(GrowthError, match="size 0"):
        attempt(size=0)
    assert len(engine.seeds()) == 1


def test_a_kernel_that_does_not_fit_culls_the_seed_and_leaves_the_host_bit_for_bit() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model)
    bits, stream, modules = snapshot(model), torch.get_rng_state(), list(model.modules())
    width, span = engine.interface("groups.0.0"), engine.interface(SPAN)
    good = kernel_for(span, 2)
    wrong = [
        ("groups.0.0", kernel_for(width, 3), "size is 3"),
        ("groups.0.0", kernel_for(engine.interface("groups.1.0"), 2), "interface"),
        ("groups.0.0", kernel_for(span, 2), "family is residual_bottleneck"),
        (SPAN, dataclasses.replace(good, tensors={}), "tensors"),
        (
            SPAN,
            kernel_for(span, 2, dataclasses.replace(BRANCH, parameters={**BRANCH.parameters, "reduction": 2})),
            "bl",
        ),
    ]
    for number, (slot, kernel, why) in enumerate(wrong):
        engine.expire(number * 10)
        seed = f"s{number}"
        engine.germinate(
            seed_id=seed,
            slot=slot,
            blueprint=BRANCH.id if slot == SPAN else WIDEN.id,
            family="residual_bottleneck" if slot == SPAN else "widen",
            size=2,
            command_id=seed,
            step=0,
            epoch=number * 10,
        )
        done = engine.load(seed, kernel, step=0)
        assert path(done) == ["LOADING", "CULLED"]
        assert why in done[-1].reason
        assert equal(bits, snapshot(model))
        assert list(model.modules()) == modules
    assert torch.equal(stream, torch.get_rng_state())
    with pytest.raises(IllegalTransitionError):
        engine.load("s0", good, step=0)
    with pytest.raises(UnknownSeedError):
        engine.load("nobody", good, step=0)


def test_germinated_and_isolated_seeds_can_be_cancelled_and_later_ones_not() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model)
    bits = snapshot(model)
    germinate(engine, "groups.0.0", 2, "a")
    assert path(engine.cancel("a", step=0, reason="the compile failed")) == ["CANCELLED"]
    assert engine.slot_status("groups.0.0", 0).occupancy is SlotOccupancy.FREE
    assert engine.penalties("groups.0.0") == {}
    graft(engine, SPAN, 2, "b")
    assert path(engine.cancel("b", step=0, reason="not wanted")) == ["CANCELLED"]
    assert equal(bits, snapshot(model))
    graft(engine, "groups.0.4", 2, "c")
    with pytest.raises(IllegalTransitionError):
        engine.cancel("c", step=0, reason="too late")
    with pytest.raises(UnknownSeedError):
        engine.cancel("nobody", step=0, reason="")
    with pytest.raises(UnknownSeedError):
        engine.cull("nobody", step=0, reason="")
    engine.record_contribution("c", worth(), step=0, epoch=0)
    with pytest.raises(IllegalTransitionError):
        engine.cull("c", step=0, reason="it is part of the network")
    with pytest.raises(IllegalTransitionError):
        engine.roll_back(["c"], step=0, reason="it is part of the network")
    with pytest.raises(UnknownSeedError), engine.without(["c"]):
        pytest.fail("it is fused")


def test_saved_topologies_of_another_host_version_or_content_are_refused() -> None:
    engine = engine_for(fresh(PlainNet))
    graft(engine, "groups.0.0", 2)
    state = engine.state()
    names = list(fresh(PlainNet).state_dict())
    for change, why in (
        ({"version": 99}, "version 99"),
        ({"host": "other"}, "another host"),
        ({"seeds": []}, "no place"),
        ({"fused": None}, "damaged"),
        ({"fused": {"nowhere": 1}}, "fused channels"),
        ({"fused": {"groups.0.0": -1}}, "fused channels"),
        ({"grafts": ["nobody"]}, "no place"),
        ({"seeds": [{**state["seeds"][0], "slot": "span:groups.0"}]}, "no place"),
        ({"seeds": [{**state["seeds"][0], "state": "ASLEEP"}]}, "damaged"),
    ):
        other = fresh(PlainNet)
        with pytest.raises(TopologyError, match=why):
            engine_for(other).restore(state | change)
        assert list(other.state_dict()) == names
    with pytest.raises(TopologyError):
        engine_for(fresh(ResidualNet)).restore(state)


def test_a_rollback_in_place_forgets_what_came_later_except_who_was_to_blame() -> None:
    model = fresh(Bridgeable)
    engine = engine_for(model)
    loop = Loop(model, engine)
    loop.sync(graft(engine, "groups.0.0", 2, "kept"))
    loop.train(2)
    state, bits = json.loads(json.dumps(engine.state())), snapshot(model)
    kept = {id(parameter) for parameter in model.parameters()}
    loop.sync(graft(engine, "groups.0.4", 2, "blamed", step=2))
    graft(engine, SPAN, 2, "innocent", step=2)
    germinate(engine, "groups.1.0", 2, "waiting")
    loop.sync(engine.record_contribution("kept", worth(), step=2, epoch=5))
    done = engine.restore(state, keep_gone=["blamed", "kept", "waiting"], reason="the loss was NaN")
    assert path(done) == ["ROLLED_BACK", "CANCELLED"]
    model.load_state_dict(bits)
    assert equal(bits, snapshot(model))
    assert engine.seed("kept").state is S.EVALUATING
    assert [record.seed for record in engine.seeds()] == ["kept", "blamed", "waiting"]
    assert engine.slot_status("groups.0.4", 6).occupancy is SlotOccupancy.LOCKED
    assert WIDEN.id in engine.quarantined()
    assert len(kept & {id(parameter) for parameter in model.parameters()}) > 0
    with pytest.raises(UnknownSeedError):
        engine.restore(state, keep_gone=["nobody"])


def test_ticks_without_a_seed_do_nothing() -> None:
    engine = engine_for(fresh(PlainNet))
    assert engine.tick(1) == []
    assert engine.due_for_evaluation(1) == []
    assert engine.parameter_groups()[0].name == "host"


def test_spans_are_measured_where_no_layer_can_be_widened() -> None:
    model = fresh(PlainNet)
    assert {found.slot for found in engine_for(model).measure_health([images(80)]).slots} == {
        slot.name for slot in engine_for(model).slots() if slot.kind is SlotKind.WIDTH
    }
    engine = engine_for(model, slots=["span:*"])
    assert engine.health_samples_needed() == 20 * max(slot.width for slot in engine.slots())
    report = engine.measure_health([images(200)])
    assert report.slots
    for found in report.slots:
        # Of what enters the span, as many channels as leave it.
        assert engine.interface(found.slot).input_shape[0] == found.width
        assert found.effective_rank is not None
        assert 1.0 <= found.effective_rank <= found.width + 1e-9
        assert found.gradient_norm is None

"""Widening: the output is unchanged at birth, seeds leave exactly, stacks fuse into plain layers with their state."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from services.blueprints.vocabulary import Operation
from services.kasmina.graph import analyze
from services.kasmina.layers import grown
from services.kasmina.lifecycle import SeedState
from services.kasmina.normalizing import NEWBORN_MOMENTUM_FACTOR
from services.kasmina.topology import GrowingNetwork
from services.kasmina.widening import Draw, GrownLayer, with_shape
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
    graft,
    images,
    snapshot,
    worth,
)

HOSTS = [PlainNet, ResidualNet, DepthwiseNet, Perceptron, VisionTransformer]

#: Sums that differ only by added zeros; float32.
TOLERANCE = 1e-6


def network(host: type[nn.Module]) -> GrowingNetwork:
    model = fresh(host)
    return GrowingNetwork(model, analyze(model, images(2)))


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(images())
    return result


def draw(seed: int = 3) -> Draw:
    return Draw(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("host", HOSTS)
def test_every_slot_widens_with_the_output_unchanged_and_the_hosts_tensors_untouched(host: type[nn.Module]) -> None:
    grown_net = network(host)
    model = grown_net.model
    own = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    before, stream = outputs(model), torch.get_rng_state()
    for number, slot in enumerate(grown_net.analysis.slots):
        grown_net.widen(f"s{number}", slot, 3, draw(number))
        assert grown_net.width(slot) == grown_net.analysis.slots[slot].width + 3
    assert torch.allclose(before, outputs(model), rtol=0, atol=TOLERANCE)
    assert torch.equal(stream, torch.get_rng_state())
    kept = {id(parameter): parameter for parameter in model.parameters() if id(parameter) in own}
    assert kept.keys() == own.keys()
    assert all(torch.equal(own[key], parameter) for key, parameter in kept.items())


@pytest.mark.parametrize("host", HOSTS)
def test_a_removed_seed_leaves_the_very_network_that_was_there(host: type[nn.Module]) -> None:
    grown_net = network(host)
    model = grown_net.model
    before, bits = outputs(model), snapshot(model)
    modules = list(model.modules())
    slots = list(grown_net.analysis.slots)
    for number, slot in enumerate(slots):
        grown_net.widen(f"s{number}", slot, 2, draw(number))
    for number in reversed(range(len(slots))):
        grown_net.remove(f"s{number}")
    assert equal(bits, snapshot(model))
    assert list(model.modules()) == modules
    assert torch.equal(before, outputs(model))


@pytest.mark.parametrize("host", [PlainNet, ResidualNet, DepthwiseNet, Perceptron])
def test_without_a_seed_is_bit_for_bit_the_network_after_its_removal(host: type[nn.Module]) -> None:
    model = fresh(host)
    engine = engine_for(model)
    loop = Loop(model, engine)
    names = [slot.name for slot in engine.slots() if slot.kind == "width"]
    for number, slot in enumerate(names):
        loop.sync(graft(engine, slot, 2, f"s{number}"))
    loop.train(3)
    with engine.without(["s0"]):
        skipped = outputs(model)
    with engine.without([f"s{number}" for number in range(len(names))]):
        bare = outputs(model)
    assert not torch.allclose(skipped, outputs(model), rtol=0, atol=TOLERANCE)
    engine.cull("s0", step=3, reason="a test")
    assert torch.equal(skipped, outputs(model))
    for number in range(1, len(names)):
        engine.cull(f"s{number}", step=3, reason="a test")
    assert torch.equal(bare, outputs(model))
    plain = fresh(host)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(bare, outputs(plain))


@pytest.mark.parametrize("host", [PlainNet, ResidualNet, DepthwiseNet, Perceptron])
def test_stacks_fuse_in_any_order_of_success_into_plain_layers(host: type[nn.Module]) -> None:
    for order in itertools.permutations(range(3)):
        model = fresh(host)
        engine = engine_for(model)
        loop = Loop(model, engine)
        slot = engine.slots()[0].name
        last = engine.slots()[1].name
        for number, where in enumerate((slot, last, slot)):
            loop.sync(graft(engine, where, 1 + number, f"s{number}"))
            loop.train(1)
        before = outputs(model)
        for number in order:
            loop.sync(engine.record_contribution(f"s{number}", worth(), step=3, epoch=0))
            assert torch.allclose(before, outputs(model), rtol=0, atol=TOLERANCE)
        assert not any(isinstance(module, GrownLayer) for module in model.modules())
        assert snapshot(model).keys() == snapshot(fresh(host)).keys()
        assert len(engine.parameter_groups()) == 1
        assert engine.parameters() == sum(parameter.numel() for parameter in model.parameters())
        loop.train(1)


def test_a_seed_that_leaves_frees_the_one_above_it_to_be_fused() -> None:
    model = fresh(PlainNet)
    engine = engine_for(model)
    slot = engine.slots()[0].name
    graft(engine, slot, 2, "below")
    graft(engine, slot, 3, "above")
    done = engine.record_contribution("above", worth(), step=0, epoch=0)
    assert done[0].replaced == ()
    assert [group.name for group in engine.parameter_groups()] == ["host", "below", "above"]
    with engine.without(["below"]):
        expected = outputs(model)
    [gone] = engine.cull("below", step=0, reason="a test")
    assert gone.replaced
    assert engine.slots()[0].width == 4 + 3
    assert not any(isinstance(module, GrownLayer) for module in model.modules())
    assert torch.allclose(expected, outputs(model), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("host", HOSTS)
def test_replacements_cover_every_new_tensor_once_with_the_values_of_their_parts(host: type[nn.Module]) -> None:
    grown_net = network(host)
    for number, slot in enumerate(grown_net.analysis.slots):
        grown_net.widen(f"s{number}", slot, 2, draw(number))
    for number in range(len(grown_net.analysis.slots)):
        parts_before = {id(p): p.detach().clone() for p in grown_net.model.parameters()}
        for replacement in grown_net.absorb(f"s{number}"):
            filled = torch.zeros_like(replacement.new)
            rebuilt = torch.zeros_like(replacement.new)
            for part, where in replacement.parts:
                assert filled[where].shape == part.shape
                filled[where] += 1
                rebuilt[where] = parts_before[id(part)]
            assert bool((filled == 1).all())
            assert torch.equal(rebuilt, replacement.new)


def test_newborn_rows_are_at_the_live_scale_and_what_reads_them_is_zero() -> None:
    grown_net = network(PlainNet)
    grown_net.widen("s", "groups.1.0", 64, draw())
    writer, reader = grown_net.layer("groups.1.0"), grown_net.layer("groups.1.4")
    assert isinstance(writer, GrownLayer)
    assert isinstance(reader, GrownLayer)
    rows = writer.cells["weight:s:host"]
    live = writer.host.get_parameter("weight").flatten(1).square().mean(1).sqrt().mean()
    assert torch.isclose(rows.square().mean().sqrt(), live, rtol=0.1)
    assert not reader.cells["weight:host:s"].any()
    assert grown_net.width("groups.1.0") == 70


def test_a_layer_that_is_all_zero_gives_its_newborns_the_scale_of_its_fan_in() -> None:
    layer = nn.Linear(100, 4)
    nn.init.zeros_(layer.weight)
    rows = draw().rows(layer.weight, (500, 100))
    assert torch.isclose(rows.square().mean().sqrt(), torch.tensor(0.1), rtol=0.05)


def test_newborn_statistics_move_faster_and_the_hosts_as_without_a_seed() -> None:
    with torch.random.fork_rng(devices=[]):
        plain, wide = nn.BatchNorm2d(2, momentum=0.1), nn.BatchNorm2d(2, momentum=0.1)
    layer = grown(wide, Operation.BATCH_NORM2D)
    layer.grow_outputs("s", 2, None)
    batch = images(8).reshape(4, 2, 8, 8) * 3 + 1
    plain.train()(batch)
    layer.train()(torch.cat([batch, batch], 1))
    for name in ("running_mean", "running_var"):
        assert torch.equal(plain.get_buffer(name), wide.get_buffer(name))
    assert wide.num_batches_tracked == 1
    moved = layer.get_buffer("running_mean:s")
    assert torch.allclose(moved, NEWBORN_MOMENTUM_FACTOR * wide.get_buffer("running_mean"))
    still = grown(nn.BatchNorm2d(2, momentum=0.0), Operation.BATCH_NORM2D)
    still.grow_outputs("s", 2, None)
    still.train()(torch.cat([batch, batch], 1))
    assert not still.get_buffer("running_mean:s").any()


def test_a_widening_that_fails_half_way_leaves_the_host_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    grown_net = network(ResidualNet)
    model = grown_net.model
    bits, modules = snapshot(model), list(model.modules())
    real, calls = Draw.rows, []

    def fails(self: Draw, live: Tensor, shape: tuple[int, ...]) -> Tensor:
        calls.append(shape)
        if len(calls) == 3:
            raise MemoryError
        return real(self, live, shape)

    monkeypatch.setattr(Draw, "rows", fails)
    with pytest.raises(MemoryError):
        grown_net.widen("s", "stem", 2, draw())
    assert len(calls) == 3
    assert equal(bits, snapshot(model))
    assert list(model.modules()) == modules
    assert grown_net.grafts == {}


def test_frozen_hosts_and_evaluation_mode_are_kept() -> None:
    model = fresh(PlainNet)
    model.eval()
    model.requires_grad_(False)
    engine = engine_for(model)
    graft(engine, "groups.0.0", 2)
    assert not any(module.training for module in model.modules())
    engine.record_contribution("s1", worth(), step=0, epoch=0)
    assert not any(module.training for module in model.modules())
    assert engine.seed("s1").state is SeedState.FOSSILIZED


def test_plain_layers_of_another_shape_keep_everything_else() -> None:
    layer = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
    bigger = with_shape(layer, 6, 3)
    assert isinstance(bigger, nn.Conv2d)
    assert tuple(bigger.weight.shape) == (6, 3, 3, 3)
    assert (bigger.in_channels, bigger.out_channels, bigger.stride) == (3, 6, (2, 2))
    assert with_shape(layer, 4, 2) is layer
    assert tuple(layer.weight.shape) == (4, 2, 3, 3)
    depthwise = with_shape(nn.Conv2d(4, 4, 3, groups=4), 6, None)
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels) == (6, 6)
    assert depthwise(torch.zeros(1, 6, 4, 4)).shape == (1, 6, 2, 2)
    linear = with_shape(nn.Linear(3, 4, bias=False), 4, 5)
    assert isinstance(linear, nn.Linear)
    assert (linear.in_features, linear.out_features) == (5, 4)
    assert "bias" not in dict(linear.named_parameters())
    norm = with_shape(nn.BatchNorm1d(3), 5, None)
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_features == 5
    assert norm.running_var is not None
    assert norm.running_var.shape == (5,)


def test_the_abstract_layer_grows_nothing() -> None:
    layer = GrownLayer(nn.Linear(2, 2))
    for call in (
        lambda: layer.grow_outputs("s", 1, None),
        lambda: layer.grow_inputs("s", 1),
        lambda: layer.absorb("s"),
        layer.shape,
    ):
        with pytest.raises(NotImplementedError):
            call()

"""Merging: what is added to a layer's weight computes the same, what does not qualify stays a branch."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from services.blueprints import families
from services.blueprints.builder.branches import Branch
from services.blueprints.spec import Blueprint, InitRecipe, SlotKind
from services.blueprints.vocabulary import InitRule
from services.chassis.config.schema import EvaluationConfig
from services.kasmina.branches import Bridge
from services.kasmina.lifecycle import SeedState
from services.kasmina.merging import merge
from tests.support.growth import (
    Loop,
    engine_for,
    equal,
    fresh,
    graft,
    images,
    kernel_for,
    resume,
    save,
    snapshot,
    worth,
)


def branch_of(*layers: nn.Module) -> Branch:
    return Branch(OrderedDict((str(index), layer) for index, layer in enumerate(layers)))


def conv(inputs: int, outputs: int, side: int, stride: int = 1, *, bias: bool = False, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=bias, groups=groups)


def bridge_of(host: nn.Module, branch: Branch, channels: int, reads: int, *, spatial: bool) -> Bridge:
    bridge = Bridge(host, branch, channels=channels, reads=reads, spatial=spatial)
    bridge.set_share(1.0)
    bridge.settle()
    return bridge


MERGED = [
    pytest.param(conv(4, 6, 3), branch_of(conv(4, 2, 3), conv(2, 6, 1)), id="same kernel"),
    pytest.param(conv(4, 6, 5), branch_of(conv(4, 2, 3), conv(2, 6, 1)), id="padded kernel"),
    pytest.param(conv(4, 6, 3, bias=True), branch_of(conv(4, 2, 1, bias=True), conv(2, 6, 1, bias=True)), id="bias"),
    pytest.param(conv(4, 6, 3, bias=True), branch_of(conv(4, 6, 1)), id="one layer"),
    pytest.param(conv(4, 6, 3, bias=True), branch_of(conv(4, 2, 3), conv(2, 6, 1, bias=True)), id="last bias"),
    pytest.param(conv(4, 6, 3, bias=True), branch_of(conv(4, 2, 3, bias=True), conv(2, 6, 1)), id="first bias"),
    pytest.param(conv(4, 6, 3, 2), branch_of(conv(4, 2, 3, 2), conv(2, 6, 1)), id="stride"),
    pytest.param(conv(5, 9, 3), branch_of(conv(4, 2, 3), conv(2, 6, 1)), id="host grew since"),
]
KEPT = [
    pytest.param(conv(4, 6, 1), branch_of(conv(4, 2, 3), conv(2, 6, 1)), id="kernel too small"),
    pytest.param(conv(4, 6, 3), branch_of(conv(4, 2, 3, bias=True), conv(2, 6, 1)), id="no bias to add to"),
    pytest.param(conv(4, 6, 3), branch_of(conv(4, 2, 3), nn.GELU(), conv(2, 6, 1)), id="nonlinear"),
    pytest.param(conv(4, 6, 3), branch_of(conv(4, 2, 1), conv(2, 6, 3)), id="neighbors after the first"),
    pytest.param(conv(4, 4, 3, groups=2), branch_of(conv(4, 2, 3), conv(2, 4, 1)), id="groups"),
    pytest.param(conv(4, 4, 3), branch_of(conv(4, 4, 3, groups=4)), id="depthwise branch"),
    pytest.param(conv(4, 6, 3), branch_of(conv(4, 2, 3), conv(2, 6, 1, groups=2)), id="grouped after the first"),
    pytest.param(nn.Sequential(conv(4, 6, 3)), branch_of(conv(4, 2, 3), conv(2, 6, 1)), id="more than a layer"),
]


@pytest.mark.parametrize(("host", "branch"), MERGED)
def test_a_linear_branch_becomes_part_of_its_convolution(host: nn.Conv2d, branch: Branch) -> None:
    bridge = bridge_of(host, branch, 6, 4, spatial=True)
    values = torch.randn(2, host.in_channels, 8, 8)
    expected, weight = bridge(values), host.weight
    assert merge(bridge)
    assert host.weight is weight, "its optimizer state is found by its identity"
    assert torch.allclose(host(values), expected, atol=1e-5)


@pytest.mark.parametrize("host", [nn.Linear(4, 6), nn.Linear(5, 7)])
def test_a_linear_branch_becomes_part_of_its_linear_layer(host: nn.Linear) -> None:
    bridge = bridge_of(host, branch_of(nn.Linear(4, 2), nn.Linear(2, 6)), 6, 4, spatial=False)
    values = torch.randn(2, 3, host.in_features)
    expected = bridge(values)
    assert merge(bridge)
    assert torch.allclose(host(values), expected, atol=1e-6)


@pytest.mark.parametrize(("host", "branch"), KEPT)
def test_what_would_not_be_the_same_stays_a_branch(host: nn.Module, branch: Branch) -> None:
    bridge = bridge_of(host, branch, 6, 4, spatial=True)
    before = snapshot(bridge)
    assert not merge(bridge)
    assert equal(before, snapshot(bridge))


@pytest.mark.parametrize(
    "host",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, 3, padding=0),
        nn.Conv2d(4, 6, 4, padding=2),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 6, 3, padding=1, dilation=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.Linear(4, 6),
    ],
    ids=["stride", "padding", "even", "oblong", "dilation", "circular", "linear"],
)
def test_hosts_of_another_kind_keep_their_branch(host: nn.Module) -> None:
    assert not merge(bridge_of(host, branch_of(conv(4, 2, 3), conv(2, 6, 1)), 6, 4, spatial=True))


def test_a_linear_product_does_not_go_into_a_convolution_or_beside_an_output() -> None:
    linear = branch_of(nn.Linear(4, 4))
    assert not merge(bridge_of(conv(4, 4, 1), linear, 4, 4, spatial=True))
    beside = Bridge(nn.Linear(4, 4), linear, channels=4, spatial=False, source="output")
    assert not merge(beside)


class Net(nn.Module):
    """A convolution that users name as a span, and one that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.body(inputs).mean((2, 3)))
        return logits


SLOT = "span:body.2"
ADAPTER = Blueprint(
    "low_rank_adapter", families.FAMILIES["low_rank_adapter"].defaults, InitRecipe(InitRule.KAIMING_NORMAL)
)


def adapted(size: int = 2) -> Loop:
    model = fresh(Net)
    engine = engine_for(model, slots=["*", SLOT], evaluation=EvaluationConfig(min_epochs=0))
    loop = Loop(model, engine)
    loop.train(2)
    engine.germinate(
        seed_id="a",
        slot=SLOT,
        blueprint=ADAPTER.id,
        family="low_rank_adapter",
        size=size,
        command_id="c-a",
        step=2,
        epoch=0,
    )
    loop.sync(engine.load("a", kernel_for(engine.interface(SLOT), size, ADAPTER), step=2))
    return loop


def fossilize(loop: Loop, seed: str = "a") -> None:
    assert loop.engine is not None
    for _ in range(30):
        if loop.engine.seed(seed).state is SeedState.FOSSILIZED:
            return
        if loop.engine.seed(seed).state in {SeedState.EVALUATING, SeedState.FINE_TUNING}:
            loop.sync(loop.engine.record_contribution(seed, worth(), step=loop.step, epoch=0))
        else:
            loop.train(1)
    raise AssertionError("it never settled")


def test_layers_are_spans_only_where_a_user_names_them() -> None:
    spans = {slot.name for slot in engine_for(fresh(Net)).slots() if slot.kind is SlotKind.SPAN}
    assert spans == {"span:body"}
    named = engine_for(fresh(Net), slots=["*", "span:body.*"])
    assert {slot.name for slot in named.slots() if slot.kind is SlotKind.SPAN} == {
        "span:body",
        "span:body.0",
        "span:body.2",
    }


def test_a_fossilized_adapter_leaves_the_plain_network_with_its_momentum() -> None:
    loop = adapted()
    engine = loop.engine
    assert engine is not None
    for _ in range(30):
        if engine.seed("a").state is SeedState.FINE_TUNING:
            break
        loop.train(1)
        if engine.seed("a").state is SeedState.EVALUATING:
            loop.sync(engine.record_contribution("a", worth(), step=loop.step, epoch=0))
    loop.train(2)
    plain = engine_for(fresh(Net))
    batch = images(4, seed=9)
    before = loop.model.eval()(batch)
    weight = loop.model.get_parameter("body.2.host.weight")
    momentum = loop.optimizer.state[weight]["momentum_buffer"].clone()
    fossilize(loop)
    assert torch.allclose(loop.model.eval()(batch), before, atol=1e-5)
    assert snapshot(loop.model).keys() == snapshot(fresh(Net)).keys()
    assert loop.model.get_parameter("body.2.weight") is weight
    assert torch.equal(loop.optimizer.state[weight]["momentum_buffer"], momentum)
    assert (engine.flops(), engine.parameters()) == (plain.flops(), plain.parameters())
    assert engine.growth_table() == []
    assert [group.name for group in engine.parameter_groups()] == ["host"]
    saved = save(loop)
    other = fresh(Net, seed=4)
    again = resume(saved, Loop(other, engine_for(other, slots=["*", SLOT])))
    loop.train(2)
    again.train(2)
    assert equal(snapshot(loop.model), snapshot(again.model))


def test_an_adapter_waits_for_seeds_in_its_layer_and_is_merged_when_they_settle() -> None:
    loop = adapted()
    engine = loop.engine
    assert engine is not None
    loop.sync(graft(engine, "body.0", 2, "w", step=2))
    fossilize(loop)
    assert "body.2.branch.down.weight" in snapshot(loop.model)
    batch = images(4, seed=9)
    before = loop.model.eval()(batch)
    loop.sync(engine.record_contribution("w", worth(), step=loop.step, epoch=0))
    assert engine.seed("w").state is SeedState.FOSSILIZED
    assert snapshot(loop.model).keys() == snapshot(fresh(Net)).keys()
    assert loop.model.get_parameter("body.2.weight").shape == (6, 6, 3, 3)
    assert torch.allclose(loop.model.eval()(batch), before, atol=1e-5)


def test_two_adapters_around_one_layer_are_merged_one_after_the_other() -> None:
    loop = adapted()
    engine = loop.engine
    assert engine is not None
    fossilize(loop)
    engine.germinate(
        seed_id="b",
        slot=SLOT,
        blueprint=ADAPTER.id,
        family="low_rank_adapter",
        size=1,
        command_id="c-b",
        step=loop.step,
        epoch=0,
    )
    loop.sync(engine.load("b", kernel_for(engine.interface(SLOT), 1, ADAPTER), step=loop.step))
    fossilize(loop, "b")
    assert snapshot(loop.model).keys() == snapshot(fresh(Net)).keys()

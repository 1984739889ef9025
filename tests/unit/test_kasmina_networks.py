"""Networks of every shape through a whole life: born unchanged, trained, culled exactly, fused into plain layers."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

from services.blueprints.spec import Interface
from services.blueprints.wire import interface_from_proto, interface_to_proto
from services.kasmina.graph import analyze
from services.kasmina.lifecycle import SeedState
from services.kasmina.topology import GrowingNetwork
from services.kasmina.widening import Draw, GrownLayer
from services.tezzeret.forge import forge
from services.tolaria import hosts, rebuild
from services.tolaria.export import changes, weights
from tests.support.growth import (
    WIDEN,
    DepthwiseNet,
    Loop,
    Perceptron,
    ResidualNet,
    engine_for,
    equal,
    fresh,
    graft,
    images,
    resume,
    save,
    snapshot,
    worth,
)
from tests.support.networks import (
    ClassToken,
    Dense,
    EncoderStack,
    FusedProjection,
    Grouped,
    RootMeanSquare,
    Signal,
    UNet,
    Volume,
)


class Transformer(hosts.VisionTransformerHost):
    """The built-in host."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), 5, [8, 12, 10])


class Residual(hosts.ResidualHost):
    """The built-in host."""

    def __init__(self) -> None:
        super().__init__((1, 8, 8), 5, [3, 4])


NETWORKS = [
    Perceptron, ResidualNet, DepthwiseNet, Transformer, Residual, ClassToken, Dense, UNet, Grouped, Signal, Volume,
    RootMeanSquare, EncoderStack, FusedProjection,
]  # fmt: skip


def outputs(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(images() if batch is None else batch)
    return result


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for rounding, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max()) <= tolerance


def all_grafted(model: nn.Module, **changes: object) -> tuple[Loop, list[str]]:
    """A loop whose engine has one widening, each of another size, in every slot."""
    engine = engine_for(model, **changes)
    loop = Loop(model, engine)
    slots = [slot.name for slot in engine.slots() if slot.kind == "width"]
    for number, slot in enumerate(slots):
        loop.sync(graft(engine, slot, 1 + number % 3, f"s{number}"))
    return loop, [f"s{number}" for number in range(len(slots))]


def test_what_is_found_where() -> None:
    found = analyze(fresh(Transformer), images(2))
    assert list(found.slots) == [
        "patches", "blocks.0.attention.query", "blocks.0.expand", "blocks.1.attention.query", "blocks.1.expand",
    ]  # fmt: skip
    stream, heads = found.slots["patches"], found.slots["blocks.0.attention.query"]
    assert stream.blended
    assert stream.writers[:2] == ("patches", "position")
    assert stream.followers[-1] == "norm"
    assert (heads.width, heads.unit, heads.blended) == (2, hosts.HEAD_FEATURES, False)
    assert heads.writers == tuple(f"blocks.0.attention.{name}" for name in ("query", "key", "value"))
    assert heads.readers == ("blocks.0.attention.out",)
    assert found.refused == {"head": "its channels are the model's output"}

    found = analyze(fresh(ClassToken), images(2))
    assert found.slots["patch"].writers == ("patch", "token", "position", "attention.out", "fc2")
    assert found.slots["patch"].followers == ("scale", "norm1", "norm2", "norm3")
    assert found.slots["attention.q"].unit == 3

    found = analyze(fresh(Dense), images(2))
    assert list(found.slots) == ["stem", "conv1", "conv2"]
    parts = [(part.slot, part.factor) for part in found.sites["head"].inputs]
    assert parts == [(None, 4), ("stem", 4), ("conv1", 4), ("conv2", 4)]
    assert found.spans == {}

    found = analyze(fresh(Grouped), images(2))
    assert (found.slots["conv"].width, found.slots["conv"].unit) == (2, 2)
    assert found.slots["project"].blended


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_output_is_unchanged_at_birth(network: type[nn.Module], dtype: torch.dtype, tolerance: float) -> None:
    model = fresh(network).to(dtype)
    batch = images().to(dtype)
    grown = GrowingNetwork(model, analyze(model, batch))
    before, stream = outputs(model, batch), torch.get_rng_state()
    assert grown.analysis.slots
    for number, slot in enumerate(grown.analysis.slots):
        for turn in range(2):
            draw = Draw(torch.Generator().manual_seed(number))
            grown.widen(f"s{number}-{turn}", slot, 1 + turn, draw)
        assert close(outputs(model, batch), before, tolerance), slot
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("network", NETWORKS)
def test_trained_seeds_leave_exactly(network: type[nn.Module]) -> None:
    loop, seeds = all_grafted(fresh(network))
    model, engine = loop.model, loop.engine
    assert engine is not None
    loop.train(2)  # in the midst of the blend, where there is one
    with engine.without(seeds):
        bare = outputs(model)
    with engine.without(seeds[:1]):
        without_first = outputs(model)
    assert not close(bare, outputs(model))
    engine.cull(seeds[0], step=2, reason="a test")
    assert torch.equal(without_first, outputs(model))
    for seed in seeds[1:]:
        engine.cull(seed, step=2, reason="a test")
    assert torch.equal(bare, outputs(model))
    plain = fresh(network)
    plain.load_state_dict(model.state_dict())
    assert type(model) is type(plain)
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    assert torch.equal(bare, outputs(plain))


@pytest.mark.parametrize("network", NETWORKS)
def test_seeds_fuse_into_plain_layers_that_cost_what_the_formula_says(network: type[nn.Module]) -> None:
    loop, seeds = all_grafted(fresh(network))
    model, engine = loop.model, loop.engine
    assert engine is not None
    before = engine.flops(), engine.parameters()
    assert before[1] == sum(parameter.numel() for parameter in model.parameters())
    loop.train(5)
    assert {engine.seed(seed).state for seed in seeds} == {SeedState.EVALUATING}
    assert {engine.seed(seed).alpha for seed in seeds} == {1.0}
    expected = outputs(model)
    for seed in reversed(seeds):
        loop.sync(engine.record_contribution(seed, worth(), step=5, epoch=0))
        assert close(outputs(model), expected)
    assert not any(isinstance(module, GrownLayer) for module in model.modules())
    assert snapshot(model).keys() == snapshot(fresh(network)).keys()
    assert type(model) is network
    assert before == (engine.flops(), engine.parameters())
    again = analyze(model, images(2))
    widths = {name: slot.width for name, slot in again.slots.items()}
    total = sum(cost.flops * math.prod(widths[slot] for slot in cost.slots) for cost in again.costs)
    assert total == pytest.approx(engine.flops(), abs=1)
    assert engine.parameters() == sum(parameter.numel() for parameter in model.parameters())
    loop.train(1)

    # What a user gets: the host's class, the table of changes, the weights.
    rebuilt = rebuild.grow(fresh(network, seed=3), json.loads(json.dumps(changes(engine))))
    rebuilt.load_state_dict(weights(model))
    assert close(outputs(rebuilt), outputs(model))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_goes_on_bit_for_bit_from_any_stage(network: type[nn.Module]) -> None:
    loop, seeds = all_grafted(fresh(network))
    engine = loop.engine
    assert engine is not None
    loop.train(2)
    early = save(loop)
    loop.train(3)
    loop.sync(engine.record_contribution(seeds[0], worth(), step=5, epoch=0))
    slot = engine.seed(seeds[0]).slot
    loop.sync(graft(engine, slot, 2, "later", step=5))
    loop.train(2)
    late = save(loop)
    loop.train(2)
    expected = copy.deepcopy(snapshot(loop.model))
    model = fresh(network, seed=9)
    again = resume(late, Loop(model, engine_for(model)))
    again.train(2)
    assert equal(expected, snapshot(model))
    again = resume(early, again)
    assert again.engine is not None
    again.train(3)
    again.sync(again.engine.record_contribution(seeds[0], worth(), step=5, epoch=0))
    again.sync(graft(again.engine, slot, 2, "later", step=5))
    again.train(4)
    assert equal(expected, snapshot(model))


@pytest.mark.parametrize("network", NETWORKS)
def test_tezzeret_compiles_a_widening_of_every_slot(network: type[nn.Module]) -> None:
    engine = engine_for(fresh(network))
    for slot in engine.slots():
        if slot.kind != "width":
            continue
        interface = engine.interface(slot.name)
        assert Interface.from_json(interface.to_json()) == interface
        assert interface_from_proto(interface_to_proto(interface)) == interface
        before, flops = engine.parameters(), engine.flops()
        request = {"blueprint": WIDEN.to_json(), "interface": interface.to_json()}
        assert forge({**request, "size": 2, "init_seed": 1, "target": "cpu"}, lambda _: None)
        graft(engine, slot.name, 2, f"s{before}")
        assert engine.seed(f"s{before}").parameters == engine.parameters() - before
        assert engine.seed(f"s{before}").flops == engine.flops() - flops > 0


def test_channels_under_a_normalization_over_all_come_in_by_degrees() -> None:
    model = fresh(Transformer)
    engine = engine_for(model, blend_steps=4)
    before = outputs(model)
    graft(engine, "patches", 3)
    record = engine.seed("s1")
    assert (record.state, record.alpha) == (SeedState.GRAFTING, 0.0)
    assert close(outputs(model), before)
    assert engine.slot_status("patches", 0).occupancy == "occupied"
    seen = []
    for step in range(1, 5):
        engine.tick(step)
        seen.append(engine.seed("s1").alpha)
        assert float(model.state_dict()["norm.alpha:s1"]) == seen[-1]
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert engine.seed("s1").state is SeedState.EVALUATING


def test_under_autocast_blended_normalizations_compute_as_torchs_own() -> None:
    model = fresh(RootMeanSquare)
    engine = engine_for(model)
    graft(engine, "embed", 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(outputs(model)).all()
    model.bfloat16()
    assert outputs(model, images().bfloat16()).dtype is torch.bfloat16


def test_health_measures_streams_heads_and_concatenations() -> None:
    for network in (Transformer, Dense, EncoderStack, Grouped):
        model = fresh(network)
        engine = engine_for(model)
        for number, slot in enumerate([slot for slot in engine.slots() if slot.kind == "width"]):
            graft(engine, slot.name, 1, f"s{number}")
        report = engine.measure_health([images(engine.health_samples_needed())])
        for health in report.slots:
            assert health.effective_rank is not None, health.unmeasured_reason
            assert 0 < health.effective_rank <= health.width
    assert engine.health_samples_needed() == 20 * 6  # three groups of two channels

"""All families of branches over all kinds of spans: what they cost, compile to, leave alone, and give back."""

from __future__ import annotations

import copy
import json
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from services.blueprints import families
from services.blueprints.artifact import unpack
from services.blueprints.builder.branches import Attention, Gate, Reentrant, build_branch
from services.blueprints.digest import JsonValue
from services.blueprints.spec import Blueprint, Interface, Scalar, SlotKind, SpecError
from services.kasmina.lifecycle import SeedState
from services.tezzeret.forge import forge
from services.tolaria import rebuild
from tests.support.growth import Loop, engine_for, equal, fresh, images, kernel_for, resume, save, snapshot, worth

BRANCHES = sorted(name for name, family in families.FAMILIES.items() if family.path == "branch")
PLACES = {
    "maps": Interface(SlotKind.SPAN, (6, 8, 8), (6, 8, 8)),
    "down": Interface(SlotKind.SPAN, (6, 8, 8), (10, 4, 4)),
    "tokens": Interface(SlotKind.SPAN, (5, 6), (5, 6)),
    "wider": Interface(SlotKind.SPAN, (5, 6), (5, 10)),
    "vector": Interface(SlotKind.SPAN, (6,), (6,)),
}


def blueprint_of(name: str) -> Blueprint:
    family = families.FAMILIES[name]
    return Blueprint(name, family.defaults, family.initialization)


FITTING = [
    (name, place) for name in BRANCHES for place in PLACES if families.FAMILIES[name].applies_to(PLACES[place]) is None
]


def test_families_go_where_they_are_said_to_go() -> None:
    everywhere = {*PLACES}
    same = {"maps", "tokens", "vector"}
    expected = {
        "attention": {"maps", "tokens"},
        "column": everywhere,
        "depthwise_separable": {"maps"},
        "low_rank_adapter": everywhere,
        "mlp_adapter": same,
        "normalization": everywhere,
        "residual_bottleneck": same,
        "squeeze_excite": everywhere,
    }
    assert {name: {p for n, p in FITTING if n == name} for name in BRANCHES} == expected


@pytest.mark.parametrize(
    ("family", "before", "behind", "why"),
    [
        ("attention", (4, 17, 17), (4, 17, 17), "289 positions are more than 256"),
        ("attention", (8,), (8,), "here is only one"),
        ("depthwise_separable", (5, 8), (5, 8), "features have no positions"),
        ("column", (4, 7, 7), (4, 4, 4), "no whole factor turns"),
        ("column", (4, 4, 4), (4, 8, 8), "no whole factor turns"),
        ("column", (5, 8), (6, 8), "5 tokens become 6"),
        ("low_rank_adapter", (4, 4, 4), (4, 8, 8), "no stride turns"),
        ("low_rank_adapter", (5, 8), (6, 8), "5 tokens become 6"),
        ("mlp_adapter", (8,), (9,), "mlp_adapter needs equal shapes"),
        ("squeeze_excite", (8,), (8, 4, 4), "1 to 3 dimensions"),
    ],
)
def test_families_say_why_they_do_not_go_somewhere(
    family: str, before: tuple[int, ...], behind: tuple[int, ...], why: str
) -> None:
    with pytest.raises(SpecError, match=why):
        families.check_fit(blueprint_of(family), Interface(SlotKind.SPAN, before, behind), 2)


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("attention", {"heads": 0}, r"parameters\.heads"),
        ("column", {"normalization": "none"}, "must be one of batch, sample"),
        ("low_rank_adapter", {"kernel_size": 4}, "must be odd"),
        ("normalization", {"axis": 1}, "normalization takes no parameters"),
    ],
)
def test_families_refuse_wrong_parameters(family: str, change: dict[str, Scalar], why: str) -> None:
    blueprint = blueprint_of(family)
    with pytest.raises(SpecError, match=why):
        families.check(replace(blueprint, parameters={**blueprint.parameters, **change}))


def count(branch: nn.Module, interface: Interface, *, reads_output: bool) -> int:
    """Forward FLOPs of one sample, counted while the branch runs."""
    total = 0

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        positions = output.numel() // output.shape[1 if output.dim() == 4 else -1]
        if isinstance(module, nn.Conv2d | nn.Linear):
            total += 2 * module.weight.numel() * positions
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | Gate):
            total += 2 * output.numel()
        elif isinstance(module, Attention):
            # Every position with every other one: queries with keys, and scores with values.
            total += 2 * 2 * positions * positions * (output.numel() // positions)

    for module in branch.modules():
        module.register_forward_hook(look)
    shape = interface.output_shape if reads_output else interface.input_shape
    branch.eval()(torch.randn(1, *shape))
    return total


@pytest.mark.parametrize(("name", "place"), FITTING)
def test_costs_equal_a_count_on_the_built_branch(name: str, place: str) -> None:
    family, interface, blueprint = families.FAMILIES[name], PLACES[place], blueprint_of(name)
    found = []
    for size in (1, 2, 3, 6):
        branch = build_branch(blueprint, interface, size, 1)
        assert family.parameters(blueprint.parameters, interface, size) == sum(p.numel() for p in branch.parameters())
        flops = family.flops(blueprint.parameters, interface, size)
        assert flops == count(branch, interface, reads_output=family.source == "output")
        found.append((flops, family.parameters(blueprint.parameters, interface, size)))
    for one, two, three, six in zip(*found, strict=True):
        # Policies price a branch by two sizes.
        assert three == 2 * two - one
        assert six == 5 * two - 4 * one
    assert family.default_size(blueprint.parameters, interface) >= 1


@pytest.mark.parametrize(("name", "place"), FITTING)
def test_tezzeret_compiles_and_validates_every_family(name: str, place: str) -> None:
    family, interface, blueprint = families.FAMILIES[name], PLACES[place], blueprint_of(name)
    request: dict[str, JsonValue] = {
        "blueprint": blueprint.to_json(),
        "interface": interface.to_json(),
        "size": family.default_size(blueprint.parameters, interface),
        "init_seed": 3,
        "target": "cpu",
    }
    stages: list[str] = []
    kernel = unpack(forge(request, stages.append))
    assert families.check_kernel(kernel) is family
    assert "VALIDATING" in stages
    assert kernel.manifest.characterization.flops == family.flops(blueprint.parameters, interface, kernel.manifest.size)


def test_a_family_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "doubled.py").write_text(
        textwrap.dedent(
            '''
            """``doubled``: a pointwise linear path."""

            from services.blueprints.families.branch import BranchFamily, mixing
            from services.blueprints.spec import channels_of
            from services.blueprints.vocabulary import LayerSpec


            class Doubled(BranchFamily):
                name = "doubled"
                description = "A path through one layer and another."

                def layers(self, parameters, interface, size):
                    channels, operation = channels_of(interface.output_shape), mixing(interface)
                    return LayerSpec("a", operation, channels, size), LayerSpec("b", operation, size, channels)


            FAMILY = Doubled()
            '''
        )
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    found = families.discovered(families.__path__)
    assert set(found) == {*families.FAMILIES, "doubled"}
    monkeypatch.setattr(families, "FAMILIES", found)
    assert "doubled" in {blueprint.family for blueprint in families.builtin_blueprints()}
    blueprint = Blueprint("doubled", {}, found["doubled"].initialization)
    request: dict[str, JsonValue] = {
        "blueprint": blueprint.to_json(),
        "interface": PLACES["maps"].to_json(),
        "size": 2,
        "init_seed": 3,
        "target": "cpu",
    }
    assert families.check_kernel(unpack(forge(request, lambda _: None))).name == "doubled"


# ---------------------------------------------------------------------------------------------------- in a network


class Maps(nn.Module):
    """A span of equal shapes and one that halves the positions, beside BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.same = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.GELU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 5))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.down(self.same(self.stem(inputs))))
        return logits


class Tokens(nn.Module):
    """Rows of an image as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6)
        self.mix = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.mix(self.embed(inputs.squeeze(1))).mean(1))
        return logits


class Vectors(nn.Module):
    """A perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 6)
        self.mix = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.mix(self.enter(inputs.flatten(1))))
        return logits


HOSTS: dict[str, tuple[type[nn.Module], str]] = {
    "maps": (Maps, "span:same"),
    "down": (Maps, "span:down"),
    "tokens": (Tokens, "span:mix"),
    "vector": (Vectors, "span:mix"),
}
IN_A_NETWORK = [(name, place) for name, place in FITTING if place in HOSTS]


def grafted(name: str, place: str, **changes: object) -> Loop:
    """A loop whose host trained for two steps, then got a seed of the family."""
    host, slot = HOSTS[place]
    model = fresh(host)
    loop = Loop(model, engine_for(model, **changes))
    loop.train(2)
    graft_family(loop, name, slot)
    return loop


def graft_family(loop: Loop, name: str, slot: str, seed: str = "s1") -> None:
    engine, blueprint = loop.engine, blueprint_of(name)
    assert engine is not None
    interface = engine.interface(slot)
    size = max(2, families.FAMILIES[name].default_size(blueprint.parameters, interface))
    engine.germinate(
        seed_id=seed,
        slot=slot,
        blueprint=blueprint.id,
        family=name,
        size=size,
        command_id=f"c-{seed}",
        step=loop.step,
        epoch=0,
    )
    moved = engine.load(seed, kernel_for(interface, size, blueprint), step=loop.step)
    assert engine.seed(seed).state is not SeedState.CULLED, engine.seed(seed).reason
    loop.sync(moved)


def state_of(loop: Loop, seed: str = "s1") -> SeedState:
    assert loop.engine is not None
    return loop.engine.seed(seed).state


def until(loop: Loop, state: SeedState) -> None:
    """Train until the seed is in a state; evaluations go well."""
    assert loop.engine is not None
    for _ in range(30):
        if state_of(loop) is state:
            return
        loop.train(1)
        if state_of(loop) in {SeedState.EVALUATING, SeedState.FINE_TUNING} and state_of(loop) is not state:
            loop.sync(loop.engine.record_contribution("s1", worth(), step=loop.step, epoch=0))
    raise AssertionError(f"it stayed {state_of(loop)}")


@pytest.mark.parametrize(("name", "place"), IN_A_NETWORK)
def test_isolation_leaves_the_host_alone_to_the_last_bit(name: str, place: str) -> None:
    """Weights, running statistics, gradients and outputs of the host equal those of a twin without the seed."""
    loop = grafted(name, place, isolation_steps=6)
    assert state_of(loop) is SeedState.TRAINING
    plain_model = fresh(HOSTS[place][0])
    plain = Loop(plain_model)
    plain.train(2)
    stream = torch.get_rng_state()
    for _ in range(4):
        loop.train(1)
        plain.train(1)
        gradients = [parameter.grad for parameter in plain_model.parameters()]
        assert loop.engine is not None
        own = [parameter.grad for parameter in loop.engine.parameter_groups()[0].parameters]
        assert all(torch.equal(a, b) for a, b in zip(own, gradients, strict=True) if a is not None and b is not None)
    assert torch.equal(stream, torch.get_rng_state())
    assert state_of(loop) is SeedState.TRAINING
    batch = images(4, seed=9)
    assert torch.equal(loop.model.eval()(batch), plain_model.eval()(batch))
    assert loop.engine is not None
    loop.sync(loop.engine.cull("s1", step=loop.step, reason="enough"))
    assert equal(snapshot(loop.model), snapshot(plain_model))
    loop.train(2)
    plain.train(2)
    assert equal(snapshot(loop.model), snapshot(plain_model))


@pytest.mark.parametrize(("name", "place"), IN_A_NETWORK)
@pytest.mark.parametrize("state", [SeedState.GRAFTING, SeedState.STABILIZATION, SeedState.FINE_TUNING])
def test_a_cull_gives_back_exactly_the_network_without_the_seed(name: str, place: str, state: SeedState) -> None:
    loop = grafted(name, place)
    until(loop, state)
    batch = images(4, seed=9)
    loop.model.eval()
    engine = loop.engine
    assert engine is not None
    with engine.without(["s1"]):
        alone = loop.model(batch)
    if state is not SeedState.GRAFTING:
        assert not torch.equal(loop.model(batch), alone) or name == "squeeze_excite"
    engine.cull("s1", step=loop.step, reason="enough")
    assert torch.equal(loop.model(batch), alone)
    assert snapshot(loop.model).keys() == snapshot(fresh(HOSTS[place][0])).keys()


@pytest.mark.parametrize(("name", "place"), IN_A_NETWORK)
@pytest.mark.parametrize("state", [SeedState.TRAINING, SeedState.GRAFTING, SeedState.FOSSILIZED])
def test_a_saved_state_goes_on_bit_for_bit(name: str, place: str, state: SeedState) -> None:
    loop = grafted(name, place)
    until(loop, state)
    saved = save(loop)
    model = fresh(HOSTS[place][0], seed=5)
    again = resume(saved, Loop(model, engine_for(model)))
    loop.train(3)
    again.train(3)
    assert equal(snapshot(loop.model), snapshot(again.model))
    assert loop.engine is not None
    assert again.engine is not None
    assert loop.engine.state() == again.engine.state()


@pytest.mark.parametrize(("name", "place"), IN_A_NETWORK)
def test_what_a_fossilized_branch_computes_is_rebuilt_with_torch_alone(name: str, place: str, tmp_path: Path) -> None:
    loop = grafted(name, place)
    until(loop, SeedState.FOSSILIZED)
    assert loop.engine is not None
    assert loop.engine.parameters() == sum(parameter.numel() for parameter in loop.model.parameters())
    changes = [asdict(change) for change in loop.engine.growth_table()]
    (tmp_path / "growth.json").write_text(json.dumps({"changes": changes}))
    save_file({n: t.contiguous() for n, t in loop.model.state_dict().items()}, tmp_path / "weights.safetensors")
    rebuilt = rebuild.load(fresh(HOSTS[place][0], seed=5), tmp_path)
    batch = images(4, seed=9)
    assert torch.equal(rebuilt(batch), loop.model.eval()(batch))


def test_a_gate_multiplies_and_is_exact_at_both_ends() -> None:
    loop = grafted("squeeze_excite", "maps")
    until(loop, SeedState.FINE_TUNING)
    bridge = loop.model.get_submodule("same")
    host, branch = bridge.get_submodule("host"), bridge.get_submodule("branch")
    values = torch.randn(2, 6, 8, 8)
    own = host.eval()(values)
    pooled = own.mean((2, 3), keepdim=True)
    logits = branch.get_submodule("expand")(branch.get_submodule("activation")(branch.get_submodule("reduce")(pooled)))
    assert torch.allclose(bridge.eval()(values), own * (1 + logits.tanh()), atol=1e-6)
    bridge.set_share(0.0)  # type: ignore[operator]  # a Bridge, which get_submodule cannot know
    assert torch.equal(bridge(values), own)


def test_attention_is_that_of_torch() -> None:
    values = torch.randn(2, 5, 3 * 8)
    queries, keys, content = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in values.chunk(3, 2))  # type: ignore[no-untyped-call]  # torch's
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, content).transpose(1, 2).flatten(2)
    assert torch.allclose(Attention(2, spatial=False)(values), expected, atol=1e-6)
    maps = values.transpose(1, 2).reshape(2, 24, 5, 1)
    assert torch.allclose(Attention(2, spatial=True)(maps).flatten(2).transpose(1, 2), expected, atol=1e-6)


def test_heads_divide_the_size() -> None:
    family = families.FAMILIES["attention"]
    found = {size: family.layers({"heads": 4, "reduction": 1}, PLACES["tokens"], size)[2].heads for size in range(1, 9)}
    assert found == {1: 1, 2: 2, 3: 3, 4: 4, 5: 1, 6: 3, 7: 1, 8: 4}


def test_reentrant_layers_have_to_say_what_they_do() -> None:
    with pytest.raises(NotImplementedError):
        Reentrant()(torch.zeros(1), torch.zeros(1))


def test_a_normalization_settles_into_normalized_values() -> None:
    loop = grafted("normalization", "tokens")
    until(loop, SeedState.FOSSILIZED)
    bridge = copy.deepcopy(loop.model.get_submodule("mix")).eval()
    values = torch.randn(3, 8, 6)
    own = bridge.get_submodule("host")(values)
    assert torch.allclose(bridge(values), bridge.get_submodule("branch.normalize")(own), atol=1e-6)

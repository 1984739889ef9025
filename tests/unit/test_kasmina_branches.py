"""Branches: built from the closed vocabulary, isolated bit for bit, blended with exact end points."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from services.blueprints import families
from services.blueprints.builder.branches import build_branch, load_tensors
from services.blueprints.families.residual_bottleneck import ResidualBottleneck
from services.blueprints.spec import InitRecipe, Interface, Scalar, SlotKind, SpecError
from services.blueprints.vocabulary import InitRule, LayerSpec, Operation
from services.kasmina.branches import Bridge
from tests.support.growth import BRANCH, WIDEN

SPAN = Interface(SlotKind.SPAN, (4, 8, 8), (4, 8, 8))
FEATURES = Interface(SlotKind.SPAN, (6,), (6,))
TOKENS = Interface(SlotKind.SPAN, (5, 6), (5, 6))


def test_a_branch_is_what_its_family_says_and_draws_from_a_generator_of_its_own() -> None:
    stream = torch.get_rng_state()
    branch = build_branch(BRANCH, SPAN, 2, 11)
    assert torch.equal(stream, torch.get_rng_state())
    assert [name for name, _ in branch.named_children()] == ["reduce", "activation", "expand"]
    assert branch(torch.randn(3, 4, 8, 8)).shape == (3, 4, 8, 8)
    family = families.FAMILIES["residual_bottleneck"]
    assert sum(p.numel() for p in branch.parameters()) == family.parameters(BRANCH.parameters, SPAN, 2)
    again, other = build_branch(BRANCH, SPAN, 2, 11), build_branch(BRANCH, SPAN, 2, 12)
    assert torch.equal(branch.get_parameter("reduce.weight"), again.get_parameter("reduce.weight"))
    assert not torch.equal(branch.get_parameter("reduce.weight"), other.get_parameter("reduce.weight"))
    assert not branch.get_parameter("reduce.bias").any()


def test_recipes_set_scale_and_a_silent_read_out() -> None:
    big = dataclasses.replace(BRANCH, initialization=InitRecipe(InitRule.KAIMING_NORMAL, 2.0))
    ratio = build_branch(big, SPAN, 2, 1).get_parameter("expand.weight") / build_branch(
        BRANCH, SPAN, 2, 1
    ).get_parameter("expand.weight")
    assert torch.allclose(ratio, torch.full_like(ratio, 2.0))
    silent = build_branch(dataclasses.replace(BRANCH, initialization=InitRecipe(InitRule.ZERO_OUTPUT)), SPAN, 2, 1)
    assert not silent(torch.randn(2, 4, 8, 8)).any()
    assert silent.get_parameter("reduce.weight").any()


@pytest.mark.parametrize(("interface", "shape"), [(FEATURES, (3, 6)), (TOKENS, (3, 5, 6))])
def test_branches_over_features_and_tokens_are_linear(interface: Interface, shape: tuple[int, ...]) -> None:
    branch = build_branch(BRANCH, interface, 2, 1)
    assert branch(torch.randn(shape)).shape == shape
    assert isinstance(branch.get_submodule("reduce"), nn.Linear)


def test_what_makes_no_branch_or_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError):
        build_branch(WIDEN, SPAN, 2, 1)
    with pytest.raises(SpecError):
        build_branch(BRANCH, dataclasses.replace(SPAN, output_shape=(8, 4, 4)), 2, 1)


def test_a_widening_that_claims_to_fit_makes_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "check_fit", lambda blueprint, *_: families.family_of(blueprint))
    with pytest.raises(SpecError, match="widen makes no branch"):
        build_branch(WIDEN, SPAN, 2, 1)


class OddLayers(ResidualBottleneck):
    """A family that uses what the built-in ones leave out of the vocabulary."""

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        specs = [
            ("a", Operation.CONV2D, 4, size),
            ("e", Operation.RELU, size, size),
            ("f", Operation.SILU, size, size),
            ("g", Operation.TANH, size, size),
            ("h", Operation.FLATTEN, size, size),
            ("i", Operation.LINEAR, size * 64, 6),
        ]
        return tuple(LayerSpec(name, operation, one, other) for name, operation, one, other in specs)


def test_every_operation_of_the_vocabulary_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    family = OddLayers()
    places = (SPAN, FEATURES, TOKENS, dataclasses.replace(SPAN, output_shape=(8, 4, 4)))
    used = {
        spec.operation
        for other in families.FAMILIES.values()
        for place in places
        if other.applies_to(place) is None
        for spec in other.layers(other.defaults, place, 2)
    }
    used |= {spec.operation for spec in family.layers({}, SPAN, 3)}
    only_in_hosts = {
        Operation.CONV1D,
        Operation.CONV3D,
        Operation.DEPTHWISE_CONV1D,
        Operation.DEPTHWISE_CONV3D,
        Operation.BATCH_NORM3D,
        Operation.RMS_NORM,
        Operation.PARAMETER,
    }
    assert used == set(Operation) - only_in_hosts
    monkeypatch.setattr(families, "check_fit", lambda *_: family)
    branch = build_branch(BRANCH, SPAN, 3, 1)
    assert branch(torch.randn(2, 4, 8, 8)).shape == (2, 6)
    shape: tuple[int, ...] = SPAN.input_shape
    for spec in family.layers({}, SPAN, 3):
        shape = spec.output_shape(shape, SPAN.input_shape)
    assert shape == (6,)


def test_tensors_are_loaded_whole_or_not_at_all() -> None:
    branch = build_branch(BRANCH, SPAN, 2, 1)
    other = {
        name: parameter.detach().clone() for name, parameter in build_branch(BRANCH, SPAN, 2, 2).named_parameters()
    }
    load_tensors(branch, other)
    assert all(torch.equal(other[name], parameter) for name, parameter in branch.named_parameters())
    with pytest.raises(SpecError, match="are not the branch's"):
        load_tensors(branch, {})
    with pytest.raises(SpecError, match=r"tensors\.reduce\.weight"):
        load_tensors(branch, other | {"reduce.weight": torch.zeros(1)})


def bridge(interface: Interface = SPAN, host: nn.Module | None = None) -> Bridge:
    shape = interface.output_shape
    if host is None:
        host = nn.Conv2d(4, 4, 3, padding=1) if len(shape) == 3 else nn.Linear(6, 6)
    channels = shape[0] if len(shape) == 3 else shape[-1]
    return Bridge(host, build_branch(BRANCH, interface, 2, 1), channels=channels, spatial=len(shape) == 3)


def test_alpha_has_exact_end_points() -> None:
    made = bridge()
    inputs = torch.randn(3, 4, 8, 8)
    own, added = made.host(inputs), made.branch(inputs)
    assert torch.equal(made(inputs), own)
    made.set_share(1.0)
    assert torch.equal(made(inputs), own + added)
    made.set_share(0.25)
    assert torch.allclose(made(inputs), own + 0.25 * added)
    assert made.alpha.shape == ()
    assert made.share == 0.25
    made.off = True
    assert torch.equal(made(inputs), own)


@pytest.mark.parametrize(
    ("interface", "shape"), [(SPAN, (3, 4, 8, 8)), (FEATURES, (3, 6)), (TOKENS, (3, 5, 6))], ids=["maps", "vec", "tok"]
)
def test_isolation_gives_the_branch_a_loss_and_the_host_nothing(interface: Interface, shape: tuple[int, ...]) -> None:
    made = bridge(interface)
    made.train()
    made.isolate(5, torch.Generator().manual_seed(1))
    inputs = torch.randn(shape, requires_grad=True)
    outputs = made(inputs)
    assert torch.equal(outputs, made.host(inputs))
    assert made.logits is not None
    assert made.logits.shape == (3, 5)
    torch.autograd.backward(F.cross_entropy(made.logits, torch.tensor([0, 1, 2])))
    assert inputs.grad is None
    assert all(parameter.grad is None for parameter in made.host.parameters())
    assert all(parameter.grad is not None for parameter in made.branch.parameters())
    assert made.head is not None
    assert made.head.weight.grad is not None


def test_isolated_branches_do_nothing_in_evaluation_or_without_gradients() -> None:
    made = bridge()
    made.isolate(5, torch.Generator().manual_seed(1))
    made.eval()(torch.randn(2, 4, 8, 8))
    assert made.logits is None
    with torch.no_grad():
        made.train()(torch.randn(2, 4, 8, 8))
    assert made.logits is None
    made(torch.randn(2, 4, 8, 8))
    made.blend()
    assert made.head is None
    assert made.logits is None


def test_a_branch_keeps_its_channels_where_the_span_has_grown() -> None:
    made = bridge(SPAN, nn.Conv2d(6, 7, 3, padding=1))
    made.set_share(1.0)
    inputs = torch.randn(2, 6, 8, 8)
    outputs, own = made(inputs), made.host(inputs)
    assert torch.equal(outputs[:, 4:], own[:, 4:])
    assert torch.equal(outputs[:, :4], own[:, :4] + made.branch(inputs[:, :4]))
    features = bridge(FEATURES, nn.Linear(6, 9))
    features.set_share(1.0)
    assert features(torch.randn(2, 6)).shape == (2, 9)

"""What a worker does with a job: real modules are built, run and measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from services.blueprints import families
from services.blueprints.artifact import unpack
from services.blueprints.builder.widening import widened_standins
from services.blueprints.digest import JsonValue
from services.blueprints.signature import interface_signature
from services.blueprints.spec import Interface, SpecError
from services.blueprints.vocabulary import Operation
from services.tezzeret import forge as forging
from services.tezzeret.forge import ValidationError, forge
from tests.support.interfaces import FEATURES, SPAN, WIDTH, builtin, layer


def request(family: str, interface: Interface, size: int = 2, seed: int = 5) -> dict[str, JsonValue]:
    return {
        "blueprint": builtin(family).to_json(),
        "interface": interface.to_json(),
        "size": size,
        "init_seed": seed,
        "target": "cpu",
    }


@pytest.mark.parametrize(
    ("family", "interface"),
    [
        ("widen", WIDTH),
        ("widen", FEATURES),
        ("residual_bottleneck", SPAN),
        ("residual_bottleneck", replace(SPAN, input_shape=(16,), output_shape=(16,))),
    ],
)
def test_a_kernel_says_what_it_is_and_what_it_costs(family: str, interface: Interface) -> None:
    stages: list[str] = []
    kernel = unpack(forge(request(family, interface), stages.append))
    manifest, cost = kernel.manifest, kernel.manifest.characterization
    assert stages == ["BUILDING", "COMPILING", "VALIDATING", "CHARACTERIZING"]
    assert (manifest.size, manifest.seed, manifest.family) == (2, 5, family)
    assert manifest.interface_signature == interface_signature(interface)
    assert families.check_kernel(kernel).parameters(manifest.parameters, interface, 2) == cost.parameters
    assert cost.latency_seconds is not None
    assert cost.latency_seconds > 0
    assert cost.latency_batch == forging.BATCH
    assert cost.memory_bytes is not None
    # At least the output of the batch itself, in float32.
    assert cost.memory_bytes > forging.BATCH * 4 * 4
    assert bool(kernel.tensors) is (family != "widen")


def test_equal_requests_make_equal_weights_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (
        unpack(forge(request("residual_bottleneck", SPAN, seed=seed), lambda stage: None)).tensors for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.items():
        assert np.array_equal(tensor, second[name])
    assert not np.array_equal(first["reduce.weight"], other["reduce.weight"])


def test_a_blueprint_that_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="SPAN"):
        forge(request("widen", SPAN), lambda stage: None)


def test_a_layer_that_cannot_be_widened_is_refused_by_name() -> None:
    grouped = replace(WIDTH, followers=(layer("g", Operation.RELU, 3, output=(3, 8, 8), bias=True),))
    with pytest.raises(SpecError, match="g: relu cannot be widened"):
        widened_standins(grouped, 2, 1.0, 0)


def test_a_widening_that_changes_the_output_is_caught() -> None:
    reader = widened_standins(WIDTH, 2, 1.0, 0)[-2]
    assert isinstance(reader.wide, nn.Conv2d)
    batch = torch.randn(4, *reader.input_shape)
    forging._check_widening(reader, batch)
    with torch.no_grad():
        reader.wide.weight[:, -1] += 1
    with pytest.raises(ValidationError, match="function-preserving: the output of c"):
        forging._check_widening(reader, batch)


def test_values_that_are_not_finite_are_caught() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    with pytest.raises(ValidationError, match="finite outputs"):
        forging._check_gradients(module, torch.ones(1, 3), "layer")
    overflowing = nn.Linear(3, 2)
    with pytest.raises(ValidationError, match=r"finite gradients: that of layer\.weight"):
        forging._check_gradients(overflowing, torch.full((4, 3), 3e38), "layer")


def test_a_branch_of_another_shape_is_caught() -> None:
    with pytest.raises(ValidationError, match="output shape"):
        forging._check_branch(nn.Conv2d(8, 4, 1), torch.randn(2, 8, 4, 4), SPAN)


def test_kept_bytes_counts_what_lives_at_once() -> None:
    module = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
    small = forging._kept_bytes([module], [torch.randn(8, 64)])
    large = forging._kept_bytes([module], [torch.randn(64, 64)])
    # Two activations of the batch are saved for the backward pass.
    assert large - small >= 2 * 56 * 64 * 4
    assert all(parameter.grad is None for parameter in module.parameters())

"""Families: what they take, where they go, what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from services.blueprints import artifact, families
from services.blueprints.artifact import Kernel
from services.blueprints.spec import Blueprint, InitRecipe, Interface, LayerInterface, Scalar, SlotKind, SpecError
from services.blueprints.vocabulary import InitRule, Operation
from tests.infrastructure.kernels import BOTTLENECK, SPAN, WIDEN, WIDTH


def test_every_built_in_blueprint_is_sound_and_survives_json() -> None:
    blueprints = families.builtin_blueprints()
    assert {blueprint.family for blueprint in blueprints} == set(families.FAMILIES)
    for blueprint in blueprints:
        family = families.check(Blueprint.from_json(blueprint.to_json()))
        assert family.name == blueprint.family
        assert family.description
        assert family.path in {"widening", "branch"}


def test_unknown_families_and_rules_are_refused() -> None:
    with pytest.raises(SpecError, match=r"'grow_anything' is none of attention, column, .*, widen"):
        families.check(Blueprint("grow_anything"))
    with pytest.raises(SpecError, match=r"initialization\.rule"):
        families.check(Blueprint("widen", {}, InitRecipe(InitRule.KAIMING_NORMAL)))
    with pytest.raises(SpecError, match=r"parameters\.factor"):
        families.check(Blueprint("widen", {"factor": 2}))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"reduction": 0}, "reduction"),
        ({"reduction": 2.0}, "reduction"),
        ({"kernel_size": 2}, "kernel_size"),
        ({"kernel_size": 9}, "kernel_size"),
        ({"activation": "sign"}, "activation"),
        ({"depth": 1}, "depth"),
    ],
)
def test_a_bottleneck_refuses_wrong_parameters(change: dict[str, Scalar], field: str) -> None:
    blueprint = replace(BOTTLENECK, parameters={**BOTTLENECK.parameters, **change})
    with pytest.raises(SpecError) as caught:
        families.check(blueprint)
    assert caught.value.field == f"blueprint.parameters.{field}"


def test_a_bottleneck_wants_all_its_parameters() -> None:
    with pytest.raises(SpecError, match="is missing; its default is"):
        families.check(replace(BOTTLENECK, parameters={}))


def test_widening_counts_what_the_layers_gain() -> None:
    family = families.check_fit(WIDEN, WIDTH, 4)
    # A convolution 3 to 8 gains 4 filters; its norm 4 scales and shifts; two readers gain inputs.
    assert family.parameters({}, WIDTH, 4) == 4 * 27 + 2 * 4 + 16 * 4 * 9 + 10 * 4 * 64
    assert family.flops({}, WIDTH, 4) == 2 * (4 * 27 * 64 + 4 * 64 + 16 * 4 * 9 * 16 + 10 * 4 * 64)
    assert family.default_size({}, WIDTH) == 4
    assert family.layers({}, WIDTH, 4) == ()


def test_widening_counts_biases_of_writers_only() -> None:
    writer = replace(WIDTH.writers[0], bias=True)
    depthwise = LayerInterface("dw", Operation.DEPTHWISE_CONV2D, (8, 1, 3, 3), (8, 8, 8), bias=True)
    family = families.FAMILIES["widen"]
    before = family.parameters({}, WIDTH, 4)
    assert family.parameters({}, replace(WIDTH, writers=(writer,)), 4) == before + 4
    both = replace(WIDTH, followers=(*WIDTH.followers, depthwise))
    assert family.parameters({}, both, 4) == before + 4 * 9 + 4


def test_a_layer_that_writes_and_reads_grows_in_both_directions() -> None:
    layer = LayerInterface("block", Operation.LINEAR, (8, 8), (5, 8))
    stream = Interface(SlotKind.WIDTH, (5, 8), (5, 8), writers=(layer,), readers=(layer,))
    family = families.check_fit(WIDEN, stream, 4)
    assert family.parameters({}, stream, 4) == 12 * 12 - 8 * 8
    assert family.flops({}, stream, 4) == 2 * 5 * (12 * 12 - 8 * 8)


def test_flops_of_unknown_shapes_are_unknown() -> None:
    blind = replace(WIDTH, writers=(replace(WIDTH.writers[0], output_shape=()),))
    assert families.FAMILIES["widen"].flops({}, blind, 4) is None


@pytest.mark.parametrize(
    ("interface", "why"),
    [
        (SPAN, "goes into WIDTH slots"),
        (replace(WIDTH, writers=()), "nothing writes"),
        (replace(WIDTH, readers=()), "nothing reads"),
        (
            replace(WIDTH, writers=(*WIDTH.writers, LayerInterface("odd", Operation.CONV2D, (9, 3, 1, 1)))),
            "odd .* does not write 8",
        ),
        (replace(WIDTH, writers=(LayerInterface("x", Operation.RELU, (8,)),)), "x .* does not write"),
        (replace(WIDTH, readers=(LayerInterface("odd", Operation.LINEAR, (9, 9)),)), "odd .* does not read 8"),
        (replace(WIDTH, followers=(LayerInterface("odd", Operation.BATCH_NORM2D, (9,)),)), "odd .* does not follow"),
        (replace(WIDTH, followers=(LayerInterface("odd", Operation.CONV2D, (8,)),)), "odd .* does not follow"),
    ],
)
def test_widening_says_why_it_cannot_go_somewhere(interface: Interface, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        families.check_fit(WIDEN, interface, 4)


def test_a_bottleneck_over_images_and_over_features() -> None:
    family = families.check_fit(BOTTLENECK, SPAN, 2)
    parameters = BOTTLENECK.parameters
    assert family.default_size(parameters, SPAN) == 2
    assert family.parameters(parameters, SPAN, 2) == (8 * 2 * 9 + 2) + (2 * 8 + 8)
    assert family.flops(parameters, SPAN, 2) == 2 * 16 * (8 * 2 * 9 + 2 * 8)
    features = Interface(SlotKind.SPAN, (5, 8), (5, 8))
    assert [layer.operation for layer in family.layers(parameters, features, 2)] == ["linear", "gelu", "linear"]
    assert family.parameters(parameters, features, 2) == (8 * 2 + 2) + (2 * 8 + 8)
    assert family.flops(parameters, features, 2) == 2 * 5 * (8 * 2 + 2 * 8)


@pytest.mark.parametrize(
    ("interface", "why"),
    [
        (WIDTH, "goes into SPAN slots"),
        (replace(SPAN, output_shape=(8, 2, 2)), "needs equal shapes"),
        (replace(SPAN, input_shape=(2, 2, 2, 2), output_shape=(2, 2, 2, 2)), "4 dimensions"),
    ],
)
def test_a_bottleneck_says_why_it_cannot_go_somewhere(interface: Interface, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        families.check_fit(BOTTLENECK, interface, 2)


def test_a_kernel_must_hold_the_tensors_of_its_family(tmp_path: object) -> None:
    family = families.FAMILIES["residual_bottleneck"]
    layers = family.layers(BOTTLENECK.parameters, SPAN, 2)
    tensors = {n: np.zeros(s, np.float32) for layer in layers for n, s in layer.tensor_shapes().items()}
    manifest = artifact.Manifest(BOTTLENECK, SPAN, "", 2, 0, artifact.Characterization("cpu", 1))
    assert families.check_kernel(Kernel(manifest, tensors)) is family
    with pytest.raises(SpecError, match=r"tensors\.reduce\.bias"):
        families.check_kernel(Kernel(manifest, {n: t for n, t in tensors.items() if n != "reduce.bias"}))
    with pytest.raises(SpecError, match=r"tensors\.more"):
        families.check_kernel(Kernel(manifest, {**tensors, "more": np.zeros(1, np.float32)}))
    with pytest.raises(SpecError, match=r"tensors\.reduce\.weight"):
        families.check_kernel(Kernel(manifest, {**tensors, "reduce.weight": np.zeros((2, 8, 1, 1), np.float32)}))

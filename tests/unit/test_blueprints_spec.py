"""Specs: JSON there and back, errors that name the field, digests that are identity."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.blueprints import wire
from services.blueprints.digest import JsonValue, canonical_json
from services.blueprints.signature import interface_signature
from services.blueprints.spec import (
    Blueprint,
    InitRecipe,
    Interface,
    LayerInterface,
    SlotKind,
    SpecError,
    check_size,
)
from services.blueprints.vocabulary import InitRule, LayerSpec, Operation
from tests.infrastructure.kernels import BOTTLENECK, SPAN, WIDTH

_shapes = st.lists(st.integers(1, 2**24), min_size=1, max_size=5).map(tuple)
_layers = st.builds(
    LayerInterface,
    path=st.text("abc.0123", min_size=1),
    operation=st.sampled_from(Operation),
    weight_shape=_shapes,
    output_shape=_shapes | st.just(()),
    bias=st.booleans(),
)
_interfaces = st.builds(
    Interface,
    kind=st.sampled_from(SlotKind),
    input_shape=_shapes,
    output_shape=_shapes,
    dtype=st.sampled_from(["float32", "bfloat16"]),
    writers=st.lists(_layers, max_size=3).map(tuple),
    readers=st.lists(_layers, max_size=3).map(tuple),
    followers=st.lists(_layers, max_size=3).map(tuple),
)
_scalars = st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)


@given(_interfaces)
def test_an_interface_survives_json_and_wire(interface: Interface) -> None:
    assert Interface.from_json(interface.to_json()) == interface
    assert wire.interface_from_proto(wire.interface_to_proto(interface)) == interface


@given(st.dictionaries(st.text("abc", min_size=1), _scalars), st.sampled_from(InitRule), st.floats(0.01, 100))
def test_a_blueprint_survives_json_and_its_digest_is_its_content(
    parameters: dict[str, bool | int | float | str], rule: InitRule, scale: float
) -> None:
    blueprint = Blueprint("some", parameters, InitRecipe(rule, scale))
    again = Blueprint.from_json(blueprint.to_json())
    assert again == blueprint
    assert again.digest == blueprint.digest
    assert hash(again) == hash(blueprint)
    assert blueprint.id == blueprint.digest.hex()[:32]
    assert Blueprint("other", parameters, InitRecipe(rule, scale)).id != blueprint.id


def test_a_blueprint_cannot_be_changed_through_its_parameters() -> None:
    given_parameters = {"reduction": 4}
    blueprint = Blueprint("residual_bottleneck", given_parameters)
    given_parameters["reduction"] = 8
    assert blueprint.parameters["reduction"] == 4
    with pytest.raises(TypeError):
        blueprint.parameters["reduction"] = 8  # type: ignore[index]  # that it cannot be assigned is the point


def _with(value: JsonValue, **changes: JsonValue) -> JsonValue:
    assert isinstance(value, dict)
    return {**value, **changes}


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (3, "interface"),
        (None, "interface"),
        ({}, "interface.kind"),
        (_with(SPAN.to_json(), extra=1), "interface.extra"),
        (_with(SPAN.to_json(), kind="tree"), "interface.kind"),
        (_with(SPAN.to_json(), kind=True), "interface.kind"),
        (_with(SPAN.to_json(), dtype="int8"), "interface.dtype"),
        (_with(SPAN.to_json(), dtype=""), "interface.dtype"),
        (_with(SPAN.to_json(), dtype="\ud800"), "interface.dtype"),
        (_with(SPAN.to_json(), input_shape=[]), "interface.input_shape"),
        (_with(SPAN.to_json(), input_shape="8"), "interface.input_shape"),
        (_with(SPAN.to_json(), input_shape=[1, 0]), "interface.input_shape[1]"),
        (_with(SPAN.to_json(), input_shape=[1.5]), "interface.input_shape[0]"),
        (_with(SPAN.to_json(), input_shape=[True]), "interface.input_shape[0]"),
        (_with(SPAN.to_json(), input_shape=[1] * 6), "interface.input_shape"),
        (_with(SPAN.to_json(), writers={}), "interface.writers"),
        (_with(SPAN.to_json(), readers=[None] * 1025), "interface.readers"),
        (_with(SPAN.to_json(), readers=[[]]), "interface.readers[0]"),
        (_with(SPAN.to_json(), readers=[_with(WIDTH.readers[0].to_json(), bias=1)]), "interface.readers[0].bias"),
        (
            _with(SPAN.to_json(), readers=[_with(WIDTH.readers[0].to_json(), operation="exec")]),
            "interface.readers[0].operation",
        ),
    ],
)
def test_a_wrong_interface_is_refused_by_the_name_of_its_field(value: JsonValue, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Interface.from_json(value)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ({"parameters": []}, "blueprint.parameters"),
        ({"parameters": {"a": None}}, "blueprint.parameters.a"),
        ({"parameters": {"a": [1]}}, "blueprint.parameters.a"),
        ({"parameters": {"a": float("inf")}}, "blueprint.parameters.a"),
        ({"parameters": {"a": ""}}, "blueprint.parameters.a"),
        ({"parameters": {"a": 2**63}}, "blueprint.parameters.a"),
        ({"initialization": {"rule": "live_rms", "scale": 0}}, "blueprint.initialization.scale"),
        ({"initialization": {"rule": "live_rms", "scale": "1"}}, "blueprint.initialization.scale"),
        ({"initialization": {"rule": "live_rms", "scale": 10**400}}, "blueprint.initialization.scale"),
        ({"initialization": {"rule": "magic", "scale": 1}}, "blueprint.initialization.rule"),
        ({"family": 3.5}, "blueprint.family"),
    ],
)
def test_a_wrong_blueprint_is_refused_by_the_name_of_its_field(value: dict[str, JsonValue], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        Blueprint.from_json(_with(BOTTLENECK.to_json(), **value))
    assert caught.value.field == field


def test_a_spec_error_crosses_processes() -> None:
    error = copy.copy(SpecError("size", "is odd"))  # by __reduce__, as multiprocessing carries it
    assert (error.field, error.why) == ("size", "is odd")


def test_sizes_are_bounded() -> None:
    check_size(1)
    for size in (0, -1, 2**16 + 1):
        with pytest.raises(SpecError, match="size"):
            check_size(size)


def test_canonical_json_has_one_spelling_and_no_nan() -> None:
    assert canonical_json({"b": 1, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_the_signature_of_an_interface_leaves_out_paths_and_nothing_else() -> None:
    signature = interface_signature(WIDTH)
    moved = replace(WIDTH, writers=(replace(WIDTH.writers[0], path="elsewhere"),))
    assert interface_signature(moved) == signature
    different = [
        replace(WIDTH, dtype="bfloat16"),
        replace(WIDTH, kind=SlotKind.SPAN),
        replace(WIDTH, output_shape=(8, 4, 4)),
        replace(WIDTH, input_shape=(3, 4, 4)),
        replace(WIDTH, readers=WIDTH.readers[:1]),
        replace(WIDTH, followers=()),
        replace(WIDTH, writers=(replace(WIDTH.writers[0], bias=True),)),
        replace(WIDTH, writers=(replace(WIDTH.writers[0], weight_shape=(8, 3, 5, 5)),)),
    ]
    signatures = {interface_signature(interface) for interface in different}
    assert len(signatures) == len(different)
    assert signature not in signatures


def test_the_signature_tells_a_layer_that_writes_and_reads_from_two_layers() -> None:
    layer = LayerInterface("a", Operation.LINEAR, (8, 8), (8,))
    one = Interface(SlotKind.WIDTH, (8,), (8,), writers=(layer,), readers=(layer,))
    two = replace(one, readers=(replace(layer, path="b"),))
    assert interface_signature(one) != interface_signature(two)


def test_wire_refuses_what_is_no_kind_and_no_digest() -> None:
    message = wire.interface_to_proto(SPAN)
    message.kind = 0  # type: ignore[assignment]  # the unset value, which mypy does not count as a kind
    with pytest.raises(SpecError, match=r"interface\.kind"):
        wire.interface_from_proto(message)
    digest = wire.digest_to_proto(b"x" * 32)
    assert wire.digest_from_proto(digest) == b"x" * 32
    digest.value = b"short"
    with pytest.raises(SpecError, match=r"digest\.value"):
        wire.digest_from_proto(digest)
    digest.algorithm = 0  # type: ignore[assignment]  # as above
    with pytest.raises(SpecError, match=r"header\.digest\.algorithm"):
        wire.digest_from_proto(digest, "header.digest")


@pytest.mark.parametrize(
    ("layer", "parameters", "flops"),
    [
        (LayerSpec("a", Operation.CONV2D, 3, 8, kernel_size=3), 3 * 8 * 9 + 8, 2 * 3 * 8 * 9 * 16),
        (LayerSpec("a", Operation.CONV2D, 3, 8, kernel_size=3, bias=False), 3 * 8 * 9, 2 * 3 * 8 * 9 * 16),
        (LayerSpec("a", Operation.DEPTHWISE_CONV2D, 8, 8, kernel_size=3, bias=False), 72, 2 * 72 * 16),
        (LayerSpec("a", Operation.LINEAR, 3, 8), 32, 2 * 24 * 16),
        (LayerSpec("a", Operation.BATCH_NORM2D, 8, 8, bias=False), 16, 2 * 8 * 16),
        (LayerSpec("a", Operation.GELU, 8, 8), 0, 0),
    ],
)
def test_layers_have_the_cost_of_their_tensors(layer: LayerSpec, parameters: int, flops: int) -> None:
    assert layer.parameters == parameters
    assert layer.flops(16) == flops

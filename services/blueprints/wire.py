"""Interfaces, digests and blueprints to and from the contracts' messages."""

from __future__ import annotations

from collections.abc import Iterable

from esper.common.v1 import common_pb2
from esper.urza.v1 import blueprint_pb2
from services.blueprints.digest import JsonValue
from services.blueprints.spec import Blueprint, Interface, LayerInterface, SlotKind, SpecError

_KINDS = {SlotKind.WIDTH: common_pb2.SLOT_KIND_WIDTH, SlotKind.SPAN: common_pb2.SLOT_KIND_SPAN}
_FROM_WIRE = {number: kind for kind, number in _KINDS.items()}


def digest_to_proto(digest: bytes) -> common_pb2.Digest:
    """A SHA-256 as the contract has it."""
    return common_pb2.Digest(algorithm=common_pb2.DIGEST_ALGORITHM_SHA256, value=digest)


def digest_from_proto(message: common_pb2.Digest, where: str = "digest") -> bytes:
    """The 32 bytes of a SHA-256.

    Raises:
        SpecError: Another algorithm, or another length.
    """
    if message.algorithm != common_pb2.DIGEST_ALGORITHM_SHA256:
        raise SpecError(f"{where}.algorithm", "must be DIGEST_ALGORITHM_SHA256")
    if len(message.value) != 32:
        raise SpecError(f"{where}.value", f"a SHA-256 has 32 bytes, this has {len(message.value)}")
    return message.value


def interface_to_proto(interface: Interface) -> common_pb2.Interface:
    """The interface as the contract has it."""
    return common_pb2.Interface(
        kind=_KINDS[interface.kind],
        input_shape=interface.input_shape,
        output_shape=interface.output_shape,
        dtype=interface.dtype,
        writers=map(_layer_to_proto, interface.writers),
        readers=map(_layer_to_proto, interface.readers),
        followers=map(_layer_to_proto, interface.followers),
    )


def interface_from_proto(message: common_pb2.Interface, where: str = "interface") -> Interface:
    """The interface of a message, checked.

    Raises:
        SpecError: A field is missing or out of range; names it as the contract does.
    """
    if message.kind not in _FROM_WIRE:
        raise SpecError(f"{where}.kind", "is required: SLOT_KIND_WIDTH or SLOT_KIND_SPAN")
    return Interface.from_json(
        {
            "kind": _FROM_WIRE[message.kind].value,
            "input_shape": list(message.input_shape),
            "output_shape": list(message.output_shape),
            "dtype": message.dtype,
            "writers": _layers_to_json(message.writers),
            "readers": _layers_to_json(message.readers),
            "followers": _layers_to_json(message.followers),
        },
        where,
    )


def _layer_to_proto(layer: LayerInterface) -> common_pb2.LayerInterface:
    return common_pb2.LayerInterface(
        path=layer.path,
        operation=layer.operation.value,
        weight_shape=layer.weight_shape,
        output_shape=layer.output_shape,
        bias=layer.bias,
        unit=layer.unit,
    )


def _layers_to_json(layers: Iterable[common_pb2.LayerInterface]) -> list[JsonValue]:
    return [
        {
            "path": layer.path,
            "operation": layer.operation,
            "weight_shape": list(layer.weight_shape),
            "output_shape": list(layer.output_shape),
            "bias": layer.bias,
            "unit": layer.unit,
        }
        for layer in layers
    ]


def blueprint_from_spec(spec: blueprint_pb2.BlueprintSpec, where: str = "spec") -> Blueprint:
    """The blueprint of a complete spec, as Urza answers with.

    Raises:
        SpecError: A field is missing or out of range; names it as the contract does.
    """
    parameters: dict[str, JsonValue] = {}
    for name, value in spec.parameters.items():
        kind = value.WhichOneof("kind")
        if kind is None:
            raise SpecError(f"{where}.parameters.{name}", "is required")
        parameters[name] = getattr(value, kind)
    scale = spec.initialization.scale if spec.initialization.HasField("scale") else 1.0
    initialization: JsonValue = {"rule": spec.initialization.rule, "scale": scale}
    content: JsonValue = {"family": spec.family, "parameters": parameters, "initialization": initialization}
    return Blueprint.from_json(content, where)

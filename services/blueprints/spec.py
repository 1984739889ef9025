"""What may be grafted (blueprints) and where it must fit (interfaces): frozen, typed, torch-free.

Everything that comes in as JSON is checked here, once, with errors that name the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Self, TypeAlias, TypeVar, cast

from services.blueprints.digest import JsonValue, canonical_json, resource_id, sha256
from services.blueprints.vocabulary import DTYPES, InitRule, Operation

Scalar: TypeAlias = "bool | int | float | str"

MAX_DIMENSION = 2**24
"""Largest extent of a tensor's dimension that an interface may name."""
MAX_DIMENSIONS = 5
MAX_LAYERS = 1024
"""Most layers of one kind at a slot."""
MAX_SIZE = 2**16
"""Most channels one kernel may add."""
MAX_NAME_CHARACTERS = 512
MAX_SEED = 2**63 - 1
"""Largest seed of an initialization: what a generator of torch takes."""


class SpecError(ValueError):
    """Something in a spec is missing, of the wrong type or out of range.

    Attributes:
        field: Path of the field, for example ``interface.writers[0].operation``.
        why: What is wrong with it and what would be right.
    """

    def __init__(self, field: str, why: str) -> None:
        """Names the field and says why."""
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Lets it cross to another process by its two parts."""
        return type(self), (self.field, self.why)


class SlotKind(StrEnum):
    """Kinds of slots."""

    WIDTH = "width"
    """A set of channels that change together; it grows by widening."""
    SPAN = "span"
    """A span of the network that a branch can bridge."""


@dataclass(frozen=True, slots=True)
class LayerInterface:
    """One layer that touches a slot.

    Attributes:
        path: Module path inside the network, e.g. ``features.0.conv1``.
        operation: What it does, of the closed vocabulary.
        weight_shape: Shape of its weight as of now.
        output_shape: Shape of one sample of its output, without the batch; empty where unknown (so are its FLOPs then).
        bias: Whether it has a bias vector (normalizations always do).
        unit: Entries per channel of the slot: of the weight's first dimension for writers and followers, of the second
            for readers. 0: what the shape says by itself, that is 1 for writers and followers, and for readers all
            inputs in equal shares.
    """

    path: str
    operation: Operation
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    bias: bool = False
    unit: int = 0

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse. ``unit`` is there only where it says something."""
        value: dict[str, JsonValue] = {
            "path": self.path,
            "operation": self.operation.value,
            "weight_shape": list(self.weight_shape),
            "output_shape": list(self.output_shape),
            "bias": self.bias,
        }
        return value | {"unit": self.unit} if self.unit else value

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "layer") -> Self:
        """From JSON.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or out of range.
        """
        names = ("path", "operation", "weight_shape", "output_shape", "bias")
        fields = _object(value, where, names, ("unit",))
        return cls(
            path=_text(fields["path"], f"{where}.path"),
            operation=_member(Operation, fields["operation"], f"{where}.operation"),
            weight_shape=_shape(fields["weight_shape"], f"{where}.weight_shape"),
            output_shape=_shape(fields["output_shape"], f"{where}.output_shape", may_be_empty=True),
            bias=_boolean(fields["bias"], f"{where}.bias"),
            unit=integer(fields.get("unit", 0), f"{where}.unit", 0, MAX_DIMENSION),
        )


@dataclass(frozen=True, slots=True)
class Interface:
    """What enters and leaves the place of a graft.

    Attributes:
        kind: Kind of the place.
        input_shape: One sample of what enters, without the batch: [C, H, W], [T, D] or [D]. Of a WIDTH slot: what
            enters its first writer.
        output_shape: One sample of what leaves. Of a WIDTH slot: what leaves its first writer.
        dtype: Element type.
        writers: Layers that write the channels of a WIDTH slot, in forward order. All have the slot's width as their
            outputs.
        readers: Layers that read them, flattened or not. A layer may write and read (a residual stream).
        followers: Layers that follow the channels one by one: normalizations, depthwise convolutions.
    """

    kind: SlotKind
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: str = "float32"
    writers: tuple[LayerInterface, ...] = ()
    readers: tuple[LayerInterface, ...] = ()
    followers: tuple[LayerInterface, ...] = ()

    @property
    def width(self) -> int:
        """Channels (first dimension of [C, H, W]) or features (last of [T, D] and [D]) that leave the place."""
        return channels_of(self.output_shape)

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {
            "kind": self.kind.value,
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
            "dtype": self.dtype,
            "writers": [layer.to_json() for layer in self.writers],
            "readers": [layer.to_json() for layer in self.readers],
            "followers": [layer.to_json() for layer in self.followers],
        }

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "interface") -> Self:
        """From JSON.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or out of range.
        """
        fields = _object(
            value, where, ("kind", "input_shape", "output_shape", "dtype", "writers", "readers", "followers")
        )
        dtype = _text(fields["dtype"], f"{where}.dtype")
        if dtype not in DTYPES:
            raise SpecError(f"{where}.dtype", f"{dtype!r} is none of {', '.join(sorted(DTYPES))}")
        return cls(
            kind=_member(SlotKind, fields["kind"], f"{where}.kind"),
            input_shape=_shape(fields["input_shape"], f"{where}.input_shape"),
            output_shape=_shape(fields["output_shape"], f"{where}.output_shape"),
            dtype=dtype,
            writers=_layers(fields["writers"], f"{where}.writers"),
            readers=_layers(fields["readers"], f"{where}.readers"),
            followers=_layers(fields["followers"], f"{where}.followers"),
        )


@dataclass(frozen=True, slots=True)
class InitRecipe:
    """How newborn weights are drawn, apart from the seed, which a kernel adds.

    Attributes:
        rule: The rule.
        scale: Factor on the rule's standard deviation, above 0.
    """

    rule: InitRule
    scale: float = 1.0

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {"rule": self.rule.value, "scale": float(self.scale)}

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "initialization") -> Self:
        """From JSON.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or out of range.
        """
        fields = _object(value, where, ("rule", "scale"))
        scale = number(fields["scale"], f"{where}.scale")
        if not 0.0 < scale <= 1000.0:
            raise SpecError(f"{where}.scale", f"{scale:g} is not above 0 and at most 1000")
        return cls(rule=_member(InitRule, fields["rule"], f"{where}.rule"), scale=scale)


@dataclass(frozen=True)
class Blueprint:
    """An immutable design: a family, its parameters, and how its weights are born. Its digest is its identity.

    Attributes:
        family: Name in :mod:`services.blueprints.families`.
        parameters: What the family leaves open, by name; the family checks them.
        initialization: How newborn weights are drawn.
    """

    family: str
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    initialization: InitRecipe = InitRecipe(InitRule.LIVE_RMS)

    def __post_init__(self) -> None:
        """Makes the parameters as immutable as the rest."""
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))

    def __hash__(self) -> int:
        """By content, like equality."""
        return hash(self.digest)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the canonical JSON, 32 bytes."""
        return sha256(canonical_json(self.to_json()))

    @property
    def id(self) -> str:
        """Resource id: the first 32 hex characters of the digest."""
        return resource_id(self.digest)

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {
            "family": self.family,
            "parameters": dict(self.parameters),
            "initialization": self.initialization.to_json(),
        }

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "blueprint") -> Self:
        """From JSON. Whether the family exists and takes these parameters is for ``families.check``.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or out of range.
        """
        fields = _object(value, where, ("family", "parameters", "initialization"))
        return cls(
            family=_text(fields["family"], f"{where}.family"),
            parameters=scalars(fields["parameters"], f"{where}.parameters"),
            initialization=InitRecipe.from_json(fields["initialization"], f"{where}.initialization"),
        )


def channels_of(shape: tuple[int, ...]) -> int:
    """Channels of one sample of this shape: first of [C, H, W], last of [T, D] and [D]."""
    return shape[0] if len(shape) == 3 else shape[-1]


def positions_of(shape: tuple[int, ...]) -> int:
    """Places a pointwise layer is applied at in one sample of this shape: H x W, T or 1."""
    return math.prod(shape) // channels_of(shape)


def check_size(size: int, where: str = "size") -> None:
    """Refuse a size outside 1..65536.

    Raises:
        SpecError: It is outside.
    """
    if not 1 <= size <= MAX_SIZE:
        raise SpecError(where, f"{size} is not within 1..{MAX_SIZE}")


def integer(value: JsonValue, where: str, low: int, high: int) -> int:
    """``value`` as a whole number within ``low``..``high``.

    Raises:
        SpecError: It is something else.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(where, f"must be a whole number, is {_kind(value)}")
    if not low <= value <= high:
        raise SpecError(where, f"{value} is not within {low}..{high}")
    return value


def number(value: JsonValue, where: str) -> float:
    """``value`` as a finite number.

    Raises:
        SpecError: It is something else.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SpecError(where, f"must be a number, is {_kind(value)}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise SpecError(where, "must be finite")
    return result


def scalars(value: JsonValue, where: str) -> dict[str, Scalar]:
    """``value`` as a flat table of scalars by name.

    Raises:
        SpecError: It is something else.
    """
    if not isinstance(value, dict):
        raise SpecError(where, f"must be an object, is {_kind(value)}")
    for name, item in value.items():
        _text(name, where)
        if isinstance(item, float):
            number(item, f"{where}.{name}")
        elif isinstance(item, str):
            _text(item, f"{where}.{name}")
        elif not isinstance(item, int):
            raise SpecError(f"{where}.{name}", f"must be a number, text or truth value, is {_kind(item)}")
        elif abs(item) > MAX_SEED:
            raise SpecError(f"{where}.{name}", "is beyond 64 bits")
    return cast("dict[str, Scalar]", dict(value))


def _object(
    value: JsonValue, where: str, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, JsonValue]:
    if not isinstance(value, dict):
        raise SpecError(where, f"must be an object, is {_kind(value)}")
    for name in names:
        if name not in value:
            raise SpecError(f"{where}.{name}", "is missing")
    for name in value:
        if name not in names + optional:
            raise SpecError(f"{where}.{name[:64]}", f"is unknown; known are {', '.join(names + optional)}")
    return value


def _text(value: JsonValue, where: str) -> str:
    if not isinstance(value, str):
        raise SpecError(where, f"must be text, is {_kind(value)}")
    if not 0 < len(value) <= MAX_NAME_CHARACTERS:
        raise SpecError(where, f"has {len(value)} characters, not 1..{MAX_NAME_CHARACTERS}")
    if not value.isprintable():  # holds lone surrogates too, which no UTF-8 can spell
        raise SpecError(where, "holds characters that cannot be printed")
    return value


def _boolean(value: JsonValue, where: str) -> bool:
    if not isinstance(value, bool):
        raise SpecError(where, f"must be true or false, is {_kind(value)}")
    return value


_MemberT = TypeVar("_MemberT", bound=StrEnum)


def _member(members: type[_MemberT], value: JsonValue, where: str) -> _MemberT:
    text = _text(value, where)
    try:
        return members(text)
    except ValueError:
        raise SpecError(where, f"{text!r} is none of {', '.join(members)}") from None


def _shape(value: JsonValue, where: str, *, may_be_empty: bool = False) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise SpecError(where, f"must be a list, is {_kind(value)}")
    if not (0 if may_be_empty else 1) <= len(value) <= MAX_DIMENSIONS:
        raise SpecError(where, f"has {len(value)} dimensions, not 1..{MAX_DIMENSIONS}")
    return tuple(integer(item, f"{where}[{index}]", 1, MAX_DIMENSION) for index, item in enumerate(value))


def _layers(value: JsonValue, where: str) -> tuple[LayerInterface, ...]:
    if not isinstance(value, list):
        raise SpecError(where, f"must be a list, is {_kind(value)}")
    if len(value) > MAX_LAYERS:
        raise SpecError(where, f"has {len(value)} layers, more than {MAX_LAYERS}")
    return tuple(LayerInterface.from_json(item, f"{where}[{index}]") for index, item in enumerate(value))


def _kind(value: JsonValue) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"

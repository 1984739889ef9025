"""What all families of branches share: typed options, shapes that fit, costs summed over the layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

from services.blueprints.families.family import BranchSource, LifecyclePath
from services.blueprints.spec import (
    InitRecipe,
    Interface,
    Scalar,
    SlotKind,
    SpecError,
    channels_of,
    integer,
    positions_of,
)
from services.blueprints.vocabulary import ACTIVATIONS, InitRule, LayerSpec, Operation


@dataclass(frozen=True, slots=True)
class Whole:
    """An option that is a whole number within ``low``..``high``."""

    default: int
    low: int
    high: int
    odd: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """An option that is one of a few words."""

    default: str
    words: tuple[str, ...]


Option: TypeAlias = "Whole | Choice"
Options: TypeAlias = Mapping[str, Option]

ACTIVATION: Final = Choice("gelu", tuple(sorted(ACTIVATIONS)))
KERNEL_SIZE: Final = Whole(3, 1, 7, odd=True)
"""Odd, so that the positions stay."""


class BranchFamily(ABC):
    """A branch over a SPAN. A family gives its name, description, options, layers and, if need be, where it goes."""

    name: ClassVar[str]
    description: ClassVar[str]
    options: ClassVar[Options] = {}
    slot_kind: ClassVar[SlotKind] = SlotKind.SPAN
    path: ClassVar[LifecyclePath] = "branch"
    source: ClassVar[BranchSource] = "input"
    initialization: ClassVar[InitRecipe] = InitRecipe(InitRule.KAIMING_NORMAL)
    rules: ClassVar[frozenset[InitRule]] = frozenset({InitRule.KAIMING_NORMAL, InitRule.ZERO_OUTPUT})
    keeps_shape: ClassVar[bool] = True
    """Whether the span must put out the shape that enters it."""

    @property
    def defaults(self) -> Mapping[str, Scalar]:
        """All its parameters with their default values."""
        return {name: option.default for name, option in self.options.items()}

    def validate(self, parameters: Mapping[str, Scalar]) -> None:
        """Return if all its options are there and in range; raises SpecError naming the field otherwise."""
        for name in {*self.options, *parameters}:
            where = f"blueprint.parameters.{name}"
            if name not in self.options:
                known = ", ".join(sorted(self.options)) or "no parameters"
                raise SpecError(where, f"is unknown; {self.name} takes {known}")
            if name not in parameters:
                raise SpecError(where, f"is missing; its default is {self.options[name].default}")
            _check_option(self.options[name], parameters[name], where)

    def applies_to(self, interface: Interface) -> str | None:
        """Why it cannot bridge this span, in words; ``None`` if it can."""
        if interface.kind is not SlotKind.SPAN:
            return f"{self.name} goes into SPAN slots, this is a WIDTH"
        before, behind = interface.input_shape, interface.output_shape
        if len(behind) > 3 or len(before) != len(behind):
            return f"a sample has {len(before)} to {len(behind)} dimensions, known are [C, H, W], [T, D] and [D]"
        if self.keeps_shape and before != behind:
            return f"the span turns {list(before)} into {list(behind)}: {self.name} needs equal shapes"
        return self.refusal(interface)

    def refusal(self, interface: Interface) -> str | None:
        """What else speaks against a span of a shape that is known."""
        del interface
        return None

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """The span's channels divided by the option ``reduction`` (without one: all of them), at least one."""
        reduction = int(parameters.get("reduction", 1))
        return max(1, channels_of(interface.output_shape) // reduction)

    @abstractmethod
    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """Its layers in forward order; each costs a fixed part and a part in proportion to ``size``."""

    def parameters(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int:
        """Parameters it adds; the head of its own loss, which goes with the isolation, is not counted."""
        return sum(layer.parameters for layer in self.layers(parameters, interface, size))

    def flops(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int | None:
        """Forward FLOPs per sample it adds."""
        entered = interface.output_shape if self.source == "output" else interface.input_shape
        shape, total = entered, 0
        for layer in self.layers(parameters, interface, size):
            shape = layer.output_shape(shape, entered)
            total += layer.flops(positions_of(shape))
        return total


def is_map(interface: Interface) -> bool:
    """Whether a span carries maps [C, H, W]."""
    return len(interface.output_shape) == 3


def mixing(interface: Interface) -> Operation:
    """The operation that mixes a span's channels: a convolution over maps, a linear layer over features."""
    return Operation.CONV2D if is_map(interface) else Operation.LINEAR


def normalizing(interface: Interface) -> Operation:
    """A normalization of each sample alone: it needs no running statistics and cannot leak between samples."""
    return Operation.GROUP_NORM if is_map(interface) else Operation.LAYER_NORM


def activation(parameters: Mapping[str, Scalar], size: int) -> LayerSpec:
    """The layer of the option ``activation``."""
    return LayerSpec("activation", Operation(str(parameters["activation"])), size, size)


def side_of(parameters: Mapping[str, Scalar], interface: Interface) -> int:
    """The option ``kernel_size`` over maps, 1 over features."""
    return int(parameters["kernel_size"]) if is_map(interface) else 1


def _check_option(option: Option, value: Scalar, where: str) -> None:
    if isinstance(option, Choice):
        if value not in option.words:
            raise SpecError(where, f"must be one of {', '.join(option.words)}")
    elif integer(value, where, option.low, option.high) % 2 == 0 and option.odd:
        raise SpecError(where, "must be odd, so that the positions stay")

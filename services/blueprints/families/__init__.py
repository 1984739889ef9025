"""The families of blueprints. To add one is to add a file here that holds its ``FAMILY``: all of them are found.

A family says, without torch: which parameters it takes, where it may go, what it costs, which path through the
seed lifecycle it walks, how its weights are born, and of which layers it is made.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from services.blueprints.artifact import Kernel
from services.blueprints.families.family import Family
from services.blueprints.spec import Blueprint, Interface, SpecError, check_size

__all__ = [
    "FAMILIES",
    "Family",
    "builtin_blueprints",
    "check",
    "check_fit",
    "check_kernel",
    "discovered",
    "entering_shape",
    "family_of",
]


def discovered(path: Iterable[str]) -> Mapping[str, Family]:
    """The ``FAMILY`` of every module of this package that is found on ``path``, by name."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(path))
    families: list[Family] = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return MappingProxyType({family.name: family for family in sorted(families, key=lambda family: family.name)})


FAMILIES: Mapping[str, Family] = discovered(__path__)
"""All families by name."""


def family_of(blueprint: Blueprint) -> Family:
    """The family of a blueprint.

    Raises:
        SpecError: There is none of that name.
    """
    family = FAMILIES.get(blueprint.family)
    if family is None:
        raise SpecError("blueprint.family", f"{blueprint.family!r} is none of {', '.join(sorted(FAMILIES))}")
    return family


def check(blueprint: Blueprint) -> Family:
    """The family of a blueprint that is sound.

    Raises:
        SpecError: The family does not exist or does not take its parameters or initialization.
    """
    family = family_of(blueprint)
    family.validate(blueprint.parameters)
    if blueprint.initialization.rule not in family.rules:
        allowed = ", ".join(sorted(family.rules))
        raise SpecError(
            "blueprint.initialization.rule", f"{blueprint.initialization.rule} is not for {family.name}: {allowed}"
        )
    return family


def check_fit(blueprint: Blueprint, interface: Interface, size: int) -> Family:
    """The family of a sound blueprint that fits a place at a size.

    Raises:
        SpecError: It is unsound, does not go there, or not at that size.
    """
    family = check(blueprint)
    check_size(size)
    refusal = family.applies_to(interface)
    if refusal is not None:
        raise SpecError("interface", refusal)
    return family


def check_kernel(kernel: Kernel) -> Family:
    """The family of a kernel whose blueprint fits its place and whose tensors are those of the family's layers.

    Raises:
        SpecError: It is not so.
    """
    manifest = kernel.manifest
    family = check_fit(manifest.blueprint, manifest.interface, manifest.size)
    layers = family.layers(manifest.parameters, manifest.interface, manifest.size)
    expected = {name: shape for layer in layers for name, shape in layer.tensor_shapes().items()}
    found = {name: tensor.shape for name, tensor in kernel.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            wanted, has = expected.get(name, "no such tensor"), found.get(name, "none")
            raise SpecError(f"tensors.{name[:64]}", f"{family.name} wants {wanted}, the kernel has {has}")
    return family


def entering_shape(family: Family, interface: Interface) -> tuple[int, ...]:
    """Shape of one sample of what a family's branch reads at a SPAN."""
    return interface.output_shape if family.source == "output" else interface.input_shape


def builtin_blueprints() -> tuple[Blueprint, ...]:
    """One blueprint per family with its default parameters: what a new library starts with."""
    return tuple(Blueprint(family.name, family.defaults, family.initialization) for family in FAMILIES.values())

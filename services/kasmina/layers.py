"""The growing form of each layer, and where layers and Parameters sit in a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor, nn

from services.blueprints.vocabulary import CONVOLUTIONS, DEPTHWISE, Operation
from services.kasmina.graph import Site
from services.kasmina.normalizing import (
    GrownBatchNorm,
    GrownGroupNorm,
    GrownLayerNorm,
    GrownRMSNorm,
    GrownSingleGroupNorm,
)
from services.kasmina.widening import (
    GrownConvolution,
    GrownDepthwise,
    GrownLayer,
    GrownLinear,
    GrownParameter,
    HeldParameter,
    Side,
)

_NORMALIZATIONS: dict[Operation, Callable[[nn.Module, Side | None], GrownLayer]] = {
    Operation.BATCH_NORM1D: GrownBatchNorm,
    Operation.BATCH_NORM2D: GrownBatchNorm,
    Operation.BATCH_NORM3D: GrownBatchNorm,
    Operation.LAYER_NORM: GrownLayerNorm,
    Operation.RMS_NORM: GrownRMSNorm,
}


def grown(host: nn.Module, operation: Operation, outputs: Side | None = None, inputs: Side | None = None) -> GrownLayer:
    """The growing form of a host's layer; without sides, its entries belong to no slot."""
    if operation in CONVOLUTIONS:
        return GrownConvolution(host, outputs, inputs)
    if operation is Operation.LINEAR:
        return GrownLinear(host, outputs, inputs)
    if operation in DEPTHWISE:
        return GrownDepthwise(host, outputs)
    if operation is Operation.GROUP_NORM:
        several = cast("nn.GroupNorm", host).num_groups > 1
        return GrownGroupNorm(host, outputs) if several else GrownSingleGroupNorm(host, outputs)
    return _NORMALIZATIONS[operation](host, outputs)


def grown_at(site: Site, host: nn.Module, width: Callable[[str], int]) -> GrownLayer:
    """The growing form of the layer or Parameter at a site, with the settled widths of slots."""
    outputs, inputs = (Side(parts, [part.entries(width) for part in parts]) for parts in (site.outputs, site.inputs))
    if site.operation is Operation.PARAMETER:
        return GrownParameter(host, outputs, axis=site.axis, gain=site.gain)
    return grown(host, site.operation, outputs if site.outputs else None, inputs if site.inputs else None)


class Place(Protocol):
    """Where a module (or what stands for a Parameter) sits."""

    def get(self) -> nn.Module:
        """The module that sits there now."""

    def put(self, module: nn.Module) -> None:
        """Put another module there."""


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """An attribute of a module that holds a module."""

    parent: nn.Module
    name: str

    def get(self) -> nn.Module:
        """The module that sits there now."""
        return cast("nn.Module", self.parent._modules[self.name])

    def put(self, module: nn.Module) -> None:
        """Put another module there."""
        setattr(self.parent, self.name, module)


class ParameterPlace:
    """An attribute of a module that holds a Parameter.

    While it is widened, a :class:`GrownParameter` sits among the module's children under the same name, and the
    attribute is a property that joins its blocks, so that the host's code goes on reading a tensor.
    """

    def __init__(self, parent: nn.Module, name: str) -> None:
        self._parent = parent
        self._name = name

    def get(self) -> nn.Module:
        """The grown Parameter, or what stands for the plain one."""
        plain = self._parent._parameters[self._name]
        return cast("nn.Module", self._parent._modules[self._name]) if plain is None else HeldParameter(plain)

    def put(self, module: nn.Module) -> None:
        """Put a grown Parameter there, or a plain one again."""
        parent, name = self._parent, self._name
        parent._modules.pop(name, None)
        if isinstance(module, HeldParameter):
            parent._parameters[name] = module.weight
        else:
            parent._parameters[name] = None  # keeps its place in the order of parameters
            parent._modules[name] = module
        grown_names = [key for key in parent._parameters if isinstance(parent._modules.get(key), GrownParameter)]
        for key in grown_names:  # their order must not depend on which was widened first
            parent._modules[key] = parent._modules.pop(key)
        plain = getattr(type(parent), "_ungrown", type(parent))
        parent.__class__ = _with_properties(plain, grown_names) if grown_names else plain


def _with_properties(plain: type[nn.Module], names: list[str]) -> type[nn.Module]:
    """A subclass of a module's class in which grown Parameters read as tensors."""

    def joined(name: str) -> property:
        return property(lambda owner: cast("Tensor", owner._modules[name]()))

    attributes: dict[str, Any] = {"_ungrown": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), attributes | {name: joined(name) for name in names})


def place_of(model: nn.Module, path: str) -> Place:
    """Where the module or Parameter at a path of the host sits."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    return ParameterPlace(owner, name) if name in owner._parameters else ModulePlace(owner, name)

"""Branch modules from specs: every layer is one of the closed vocabulary, so no spec can name code."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from services.blueprints import families
from services.blueprints.spec import Blueprint, Interface, SlotKind, SpecError
from services.blueprints.vocabulary import NORMALIZATIONS, InitRule, LayerSpec, Operation


class Branch(nn.Sequential):
    """A branch: its layers by their names, first to last."""


def build_branch(blueprint: Blueprint, interface: Interface, size: int, init_seed: int) -> Branch:
    """The branch that a blueprint describes, its weights drawn by the blueprint's recipe.

    Draws come from a private generator seeded by ``init_seed``; the global random streams stay untouched. Equal
    arguments give equal weights.

    Args:
        blueprint: A design of a family that makes branches.
        interface: The SPAN it bridges.
        size: Its inner width.
        init_seed: Seed of its initial weights, 0..2**63-1.

    Raises:
        SpecError: The blueprint is unsound, makes no branch, or does not fit the interface.
    """
    family = families.check_fit(blueprint, interface, size)
    if family.slot_kind is not SlotKind.SPAN:
        raise SpecError("blueprint.family", f"{family.name} makes no branch")
    specs = family.layers(blueprint.parameters, interface, size)
    branch = Branch(OrderedDict((spec.name, _layer(spec)) for spec in specs))
    generator = torch.Generator().manual_seed(init_seed)
    recipe = blueprint.initialization
    weighted = [spec.name for spec in specs if spec.tensor_shapes() and spec.operation not in NORMALIZATIONS]
    with torch.no_grad():
        for spec in specs:
            silent = recipe.rule is InitRule.ZERO_OUTPUT and spec.name == weighted[-1]
            _initialize(branch.get_submodule(spec.name), spec, 0.0 if silent else recipe.scale, generator)
    return branch


_WITHOUT_TENSORS: dict[Operation, Callable[[], nn.Module]] = {
    Operation.RELU: nn.ReLU,
    Operation.GELU: nn.GELU,
    Operation.SILU: nn.SiLU,
    Operation.TANH: nn.Tanh,
    Operation.FLATTEN: nn.Flatten,
}


def _layer(spec: LayerSpec) -> nn.Module:
    """One layer, its tensors not initialized (so that nothing is drawn from the global generator)."""
    match spec.operation:
        case Operation.CONV2D | Operation.DEPTHWISE_CONV2D:
            groups = spec.inputs if spec.operation is Operation.DEPTHWISE_CONV2D else 1
            side = spec.kernel_size
            sizes = (spec.inputs, spec.outputs, side)
            layer: nn.Module = nn.Conv2d(*sizes, padding=side // 2, groups=groups, bias=spec.bias, device="meta")
            return layer.to_empty(device="cpu")
        case Operation.LINEAR:
            return nn.Linear(spec.inputs, spec.outputs, bias=spec.bias, device="meta").to_empty(device="cpu")
        case Operation.BATCH_NORM1D:
            return nn.BatchNorm1d(spec.outputs)
        case Operation.BATCH_NORM2D:
            return nn.BatchNorm2d(spec.outputs)
        case Operation.GROUP_NORM:
            return nn.GroupNorm(1, spec.outputs)
        case Operation.LAYER_NORM:
            return nn.LayerNorm(spec.outputs)
        case operation:
            return _WITHOUT_TENSORS[operation]()


def _initialize(layer: nn.Module, spec: LayerSpec, scale: float, generator: torch.Generator) -> None:
    if spec.operation in NORMALIZATIONS:
        return  # gain 1, shift 0
    for name, parameter in layer.named_parameters():
        if name == "bias":
            parameter.zero_()
        else:
            fan_in = parameter[0].numel()
            drawn = torch.randn(parameter.shape, generator=generator) * (scale * math.sqrt(2.0 / fan_in))
            parameter.copy_(drawn)


def load_tensors(branch: Branch, tensors: dict[str, Tensor]) -> None:
    """Set a branch's weights.

    Raises:
        SpecError: Names or shapes are not those of the branch.
    """
    own = dict(branch.named_parameters())
    if set(own) != set(tensors):
        raise SpecError("tensors", f"{sorted(tensors)} are not the branch's {sorted(own)}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise SpecError(f"tensors.{name}", f"has shape {list(tensor.shape)}, the branch {list(own[name].shape)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

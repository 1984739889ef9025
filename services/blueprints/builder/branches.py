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


class MeanPool(nn.Module):
    """The mean over some dimensions, which stay with one entry."""

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, values: Tensor) -> Tensor:
        """Shape as before, 1 in the dimensions."""
        return values.mean(self.dimensions, keepdim=True)


class Attention(nn.Module):
    """Scaled dot-product self-attention without weights (Vaswani et al. 2017), its products written out.

    A fused kernel may sum in another order from call to call; a run has to repeat to the last bit.
    """

    def __init__(self, heads: int, *, spatial: bool) -> None:
        super().__init__()
        self.heads = heads
        self.spatial = spatial

    def forward(self, values: Tensor) -> Tensor:
        """[N, 3 S, H, W] to [N, S, H, W], or [N, T, 3 S] to [N, T, S]."""
        tokens = values.flatten(2).transpose(1, 2) if self.spatial else values
        split: Tensor = torch.unflatten(tokens, 2, (3, self.heads, -1))
        parts = split.permute(2, 0, 3, 1, 4)
        queries, keys, content = parts[0], parts[1], parts[2]
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        mixed: Tensor = (scores.softmax(-1) @ content).transpose(1, 2).flatten(2)
        if self.spatial:
            mixed = mixed.transpose(1, 2).reshape(values.shape[0], -1, values.shape[2], values.shape[3])
        return mixed


class Reentrant(nn.Module):
    """A layer that looks at what entered the branch, too."""

    def forward(self, values: Tensor, entered: Tensor) -> Tensor:
        """Shape of ``entered``."""
        raise NotImplementedError


class Gate(Reentrant):
    """What entered times tanh of what arrives."""

    def forward(self, values: Tensor, entered: Tensor) -> Tensor:
        """Shape of ``entered``; ``values`` may have one position only."""
        return entered * values.tanh()


class Difference(Reentrant):
    """What arrives minus what entered."""

    def forward(self, values: Tensor, entered: Tensor) -> Tensor:
        """Shape of both."""
        return values - entered


class Branch(nn.Sequential):
    """A branch: its layers by their names, first to last."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Through all layers."""
        values = inputs
        for layer in self:
            values = layer(values, inputs) if isinstance(layer, Reentrant) else layer(values)
        return values


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


_WITHOUT_TENSORS: dict[Operation, Callable[[LayerSpec], nn.Module]] = {
    Operation.RELU: lambda _: nn.ReLU(),
    Operation.GELU: lambda _: nn.GELU(),
    Operation.SILU: lambda _: nn.SiLU(),
    Operation.TANH: lambda _: nn.Tanh(),
    Operation.FLATTEN: lambda _: nn.Flatten(),
    Operation.MEAN_POOL1D: lambda _: MeanPool(1),
    Operation.MEAN_POOL2D: lambda _: MeanPool(2, 3),
    Operation.MAX_POOL2D: lambda spec: nn.MaxPool2d(spec.kernel_size),
    Operation.ATTENTION1D: lambda spec: Attention(spec.heads, spatial=False),
    Operation.ATTENTION2D: lambda spec: Attention(spec.heads, spatial=True),
    Operation.GATE: lambda _: Gate(),
    Operation.DIFFERENCE: lambda _: Difference(),
}


def _layer(spec: LayerSpec) -> nn.Module:
    """One layer, its tensors not initialized (so that nothing is drawn from the global generator)."""
    match spec.operation:
        case Operation.CONV2D | Operation.DEPTHWISE_CONV2D:
            layer: nn.Module = nn.Conv2d(
                spec.inputs,
                spec.outputs,
                spec.kernel_size,
                stride=spec.stride,
                padding=spec.kernel_size // 2,
                groups=spec.inputs if spec.operation is Operation.DEPTHWISE_CONV2D else 1,
                bias=spec.bias,
                device="meta",
            )
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
            return _WITHOUT_TENSORS[operation](spec)


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

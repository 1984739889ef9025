"""Fossilized means free: a branch without a nonlinearity is added to the weight of the layer it bridges.

The sum of two linear maps of one input is one linear map, so the network afterwards is the plain one: same step time,
same memory. What makes it exact is checked, not assumed; a branch that does not qualify stays as it is.

The optimizer's state of the host's weight stays with it, and that is the state the sum would have: the gradient of the
sum with respect to the host's weight is the gradient of the loss with respect to the merged one, before and after, so
its momentum is the one that a single tensor would have gathered. The branch's own state is dropped: it holds the same
gradients, seen through the branch's factors, and would count them twice.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from services.blueprints.builder.branches import Branch
from services.kasmina.branches import Bridge


def merge(bridge: Bridge) -> bool:
    """Add a settled branch to its host's weight (and bias) in place; False if that would not be the same network."""
    host = bridge.host
    if not isinstance(host, nn.Conv2d | nn.Linear) or bridge.source != "input" or not _plain(host):
        return False
    product = _product(bridge.branch)
    if product is None or (product.bias is not None and host.bias is None):
        return False
    weight = product.weight
    if isinstance(host, nn.Conv2d):
        margin = (host.kernel_size[0] - weight.shape[-1]) // 2 if weight.dim() == 4 else -1
        if margin < 0 or product.stride != host.stride:
            return False
        weight = nn.functional.pad(weight, (margin,) * 4)
    elif weight.dim() != 2:
        return False
    outputs, inputs = weight.shape[:2]
    with torch.no_grad():
        host.weight[:outputs, :inputs] += weight
        if product.bias is not None and host.bias is not None:
            host.bias[:outputs] += product.bias
    return True


def _plain(host: nn.Conv2d | nn.Linear) -> bool:
    """Whether a layer computes what its weight says at the positions a branch has: no groups, holes or odd borders."""
    if isinstance(host, nn.Linear):
        return True
    side = host.kernel_size[0]
    return (
        host.kernel_size == (side, side)
        and side % 2 == 1
        and host.padding == (side // 2, side // 2)
        and host.groups == 1
        and host.dilation == (1, 1)
        and host.padding_mode == "zeros"
    )


class _Product:
    """One layer that does what several in a row do."""

    def __init__(self, first: nn.Conv2d | nn.Linear) -> None:
        self.weight: Tensor = first.weight.detach()
        self.bias: Tensor | None = None if first.bias is None else first.bias.detach()
        self.stride = first.stride if isinstance(first, nn.Conv2d) else (1, 1)

    def then(self, layer: nn.Conv2d | nn.Linear) -> None:
        matrix = layer.weight.detach().flatten(1)
        self.weight = torch.tensordot(matrix, self.weight, dims=1)
        if self.bias is not None:
            self.bias = matrix @ self.bias
        if layer.bias is not None:
            own = layer.bias.detach()
            self.bias = own if self.bias is None else self.bias + own


def _product(branch: Branch) -> _Product | None:
    """The layers of a branch as one; ``None`` if they are not linear, or look at neighbors after the first."""
    layers = list(branch)
    linear = [layer for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)]
    alike = all(type(one) is type(other) for one, other in pairwise(linear))
    if len(linear) != len(layers) or not alike or getattr(linear[0], "groups", 1) != 1:
        return None
    product = _Product(linear[0])
    for layer in linear[1:]:
        pointwise = isinstance(layer, nn.Linear) or (
            layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
        )
        if not pointwise:
            return None
        product.then(layer)
    return product

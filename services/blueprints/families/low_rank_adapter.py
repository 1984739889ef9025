"""``low_rank_adapter``: a linear detour through ``size`` channels, added to the layer it bridges; free once settled.

After Hu et al. 2021 (arXiv:2106.09685): down to a few channels and up again, without an activation between, the way up
starting at zero. Where the span is one linear layer or convolution the product of both is added to its weight when the
seed is fossilized, so that the network then is the plain one; around more than one layer it stays a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import KERNEL_SIZE, BranchFamily, Options, Whole, is_map, mixing, side_of
from services.blueprints.spec import InitRecipe, Interface, Scalar, channels_of
from services.blueprints.vocabulary import InitRule, LayerSpec


class LowRankAdapter(BranchFamily):
    """See the module. Parameters: ``reduction`` (default size = narrower end / reduction), ``kernel_size``."""

    name = "low_rank_adapter"
    description = "A linear detour of low rank beside a layer; merged into its weight once fossilized."
    options: ClassVar[Options] = {"reduction": Whole(4, 1, 256), "kernel_size": KERNEL_SIZE}
    keeps_shape = False
    initialization = InitRecipe(InitRule.ZERO_OUTPUT)

    def refusal(self, interface: Interface) -> str | None:
        """Positions may get fewer by a stride, no other way."""
        before, behind = interface.input_shape, interface.output_shape
        if is_map(interface):
            stride = _stride(interface)
            if any(-(-side // stride) != after for side, after in zip(before[1:], behind[1:], strict=True)):
                return f"no stride turns {list(before[1:])} positions into {list(behind[1:])}"
        elif before[:-1] != behind[:-1]:
            return f"{before[0]} tokens become {behind[0]}: a linear layer keeps them"
        return None

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """The channels of the narrower end divided by ``reduction``, at least one."""
        narrow = min(channels_of(interface.input_shape), channels_of(interface.output_shape))
        return max(1, narrow // int(parameters["reduction"]))

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``down`` and ``up``, without biases: the layer they are merged into may have none."""
        before, behind = channels_of(interface.input_shape), channels_of(interface.output_shape)
        operation = mixing(interface)
        stride = _stride(interface) if is_map(interface) else 1
        side = side_of(parameters, interface)
        return (
            LayerSpec("down", operation, before, size, kernel_size=side, bias=False, stride=stride),
            LayerSpec("up", operation, size, behind, bias=False),
        )


def _stride(interface: Interface) -> int:
    """The step that leaves as many rows as the span does, if any does."""
    return max(1, -(-interface.input_shape[1] // interface.output_shape[1]))


FAMILY: Final = LowRankAdapter()

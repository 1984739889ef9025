"""``column``: a path of its own width beside a longer span, from its early wide tensor to its late features.

A block that reads C channels and writes C channels cannot lift a bottleneck of width; a column that passes by it can
(the project's growth measurements: +7.9 points where blocks in place brought 1.3). After the side columns of Rusu et
al. 2016 (arXiv:1606.04671): a convolution to ``size`` channels at the early resolution, normalization, activation,
pooling to the late resolution, a convolution to the late channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from services.blueprints.families.branch import (
    ACTIVATION,
    KERNEL_SIZE,
    BranchFamily,
    Choice,
    Options,
    Whole,
    activation,
    is_map,
    mixing,
    side_of,
)
from services.blueprints.spec import Interface, Scalar, channels_of
from services.blueprints.vocabulary import LayerSpec, Operation


class Column(BranchFamily):
    """See the module. Parameters: ``reduction``, ``kernel_size``, ``normalization``, ``activation``.

    The default size is that of the late channels / ``reduction``; the normalization is by ``batch`` or ``sample``.
    """

    name = "column"
    description = "A path of its own width past a longer span, from its early tensor to its late features."
    options: ClassVar[Options] = {
        "reduction": Whole(1, 1, 256),
        "kernel_size": KERNEL_SIZE,
        "normalization": Choice("batch", ("batch", "sample")),
        "activation": ACTIVATION,
    }
    keeps_shape = False

    def refusal(self, interface: Interface) -> str | None:
        """Positions may get fewer by a whole factor, the same in both directions."""
        before, behind = interface.input_shape, interface.output_shape
        if is_map(interface):
            factor = max(1, before[1] // behind[1])
            if any(side != after * factor for side, after in zip(before[1:], behind[1:], strict=True)):
                return f"no whole factor turns {list(before[1:])} positions into {list(behind[1:])}"
        elif before[:-1] != behind[:-1]:
            return f"{before[0]} tokens become {behind[0]}: a column over tokens keeps them"
        return None

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """``enter``, ``normalize``, ``activation``, ``pool`` (where positions get fewer), ``leave``."""
        before, behind = interface.input_shape, interface.output_shape
        operation, side = mixing(interface), side_of(parameters, interface)
        factor = before[1] // behind[1] if is_map(interface) else 1
        pool = (LayerSpec("pool", Operation.MAX_POOL2D, size, size, kernel_size=factor),) if factor > 1 else ()
        return (
            LayerSpec("enter", operation, channels_of(before), size, kernel_size=side),
            LayerSpec("normalize", _normalization(str(parameters["normalization"]), interface), size, size),
            activation(parameters, size),
            *pool,
            LayerSpec("leave", operation, size, channels_of(behind), kernel_size=side),
        )


def _normalization(kind: str, interface: Interface) -> Operation:
    """By the batch over maps and vectors if asked for; tokens are always normalized one by one."""
    batch = {3: Operation.BATCH_NORM2D, 1: Operation.BATCH_NORM1D}.get(len(interface.output_shape))
    if kind == "batch" and batch is not None:
        return batch
    return Operation.GROUP_NORM if is_map(interface) else Operation.LAYER_NORM


FAMILY: Final = Column()

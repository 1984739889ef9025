"""The closed vocabulary: every operation a blueprint can be made of, with its tensors and its cost.

A kernel from a stranger can name nothing else, so nothing it says can run code. FLOPs count two per
multiply-add of convolutions and linear layers and two per element of a normalization; biases and
activations count nothing. Self-attention counts the two products of its positions with each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Operation(StrEnum):
    """Operations of layers, spelled as in the contract's ``LayerInterface.operation``."""

    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"
    DEPTHWISE_CONV1D = "depthwise_conv1d"
    DEPTHWISE_CONV2D = "depthwise_conv2d"
    DEPTHWISE_CONV3D = "depthwise_conv3d"
    LINEAR = "linear"
    PARAMETER = "parameter"
    """A tensor of the network's own that is added to channels or multiplied with them, e.g. a position embedding."""
    BATCH_NORM1D = "batch_norm1d"
    BATCH_NORM2D = "batch_norm2d"
    BATCH_NORM3D = "batch_norm3d"
    GROUP_NORM = "group_norm"
    LAYER_NORM = "layer_norm"
    RMS_NORM = "rms_norm"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"
    FLATTEN = "flatten"
    MEAN_POOL1D = "mean_pool1d"
    """The mean over tokens, [T, D] to [1, D]."""
    MEAN_POOL2D = "mean_pool2d"
    """The mean over positions, [C, H, W] to [C, 1, 1]."""
    MAX_POOL2D = "max_pool2d"
    """The largest of each square of side ``kernel_size``; the squares do not overlap."""
    ATTENTION1D = "attention1d"
    """Self-attention over tokens: [T, 3 S] (queries, keys, values) to [T, S], without weights of its own."""
    ATTENTION2D = "attention2d"
    """The same over positions: [3 S, H, W] to [S, H, W]."""
    GATE = "gate"
    """What entered the branch times tanh of what arrives here; one position serves all."""
    DIFFERENCE = "difference"
    """What arrives here minus what entered the branch."""


CONVOLUTIONS = frozenset({Operation.CONV1D, Operation.CONV2D, Operation.CONV3D})
"""Convolutions in which every output reads every input."""

DEPTHWISE = frozenset({Operation.DEPTHWISE_CONV1D, Operation.DEPTHWISE_CONV2D, Operation.DEPTHWISE_CONV3D})
"""Convolutions that filter each channel by itself."""

NORMALIZATIONS = frozenset(
    {
        Operation.BATCH_NORM1D,
        Operation.BATCH_NORM2D,
        Operation.BATCH_NORM3D,
        Operation.GROUP_NORM,
        Operation.LAYER_NORM,
    }
)
"""Operations with one scale and one shift per channel."""

ACTIVATIONS = frozenset({Operation.RELU, Operation.GELU, Operation.SILU, Operation.TANH})
"""Operations without tensors that act on each element."""


ATTENTIONS = frozenset({Operation.ATTENTION1D, Operation.ATTENTION2D})
"""Self-attention, over either kind of positions."""

REENTRANT = frozenset({Operation.GATE, Operation.DIFFERENCE})
"""Operations that look at what entered the branch as well; their output has its shape."""


class InitRule(StrEnum):
    """How newborn weights are drawn; every draw is from a private generator seeded by the kernel's recipe."""

    LIVE_RMS = "live_rms"
    """Normal, each new filter at the root mean square of the live layer's filters; what reads it starts at zero."""
    KAIMING_NORMAL = "kaiming_normal"
    """Normal with variance 2 / fan-in (He et al. 2015, arXiv:1502.01852), biases zero."""
    ZERO_OUTPUT = "zero_output"
    """As KAIMING_NORMAL, but the last layer starts at zero, so that the branch adds nothing at birth."""


DTYPES = frozenset({"float32", "bfloat16"})
"""Element types of an interface."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a branch, in words the builder knows.

    Attributes:
        name: Name of the layer inside its branch; its tensors are ``<name>.weight`` and ``<name>.bias``.
        operation: What it does.
        inputs: Channels or features in.
        outputs: Channels or features out; equals ``inputs`` where the operation keeps them.
        kernel_size: Side of a convolution's square kernel, odd, padding keeps the positions; of a pooling's square.
        bias: Whether a convolution or linear layer has a bias.
        stride: Step of a convolution: of each side of n positions ceil(n / stride) are left.
        heads: Of an attention; divides ``outputs``.
    """

    name: str
    operation: Operation
    inputs: int
    outputs: int
    kernel_size: int = 1
    bias: bool = True
    stride: int = 1
    heads: int = 1

    def tensor_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of its tensors by their full names; empty for an operation without weights."""
        weight: tuple[int, ...]
        match self.operation:
            case Operation.CONV2D:
                weight = (self.outputs, self.inputs, self.kernel_size, self.kernel_size)
            case Operation.DEPTHWISE_CONV2D:
                weight = (self.outputs, 1, self.kernel_size, self.kernel_size)
            case Operation.LINEAR:
                weight = (self.outputs, self.inputs)
            case operation if operation in NORMALIZATIONS:
                weight = (self.outputs,)
            case _:
                return {}
        shapes = {f"{self.name}.weight": weight}
        if self.bias or self.operation in NORMALIZATIONS:
            shapes[f"{self.name}.bias"] = (self.outputs,)
        return shapes

    @property
    def parameters(self) -> int:
        """Number of its parameters."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def output_shape(self, arriving: tuple[int, ...], entered: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one sample of its output, from that of its input and of what entered the branch."""
        sides = arriving[1:]
        match self.operation:
            case Operation.CONV2D | Operation.DEPTHWISE_CONV2D:
                shape = (self.outputs, *(-(-side // self.stride) for side in sides))
            case Operation.MAX_POOL2D:
                shape = (self.outputs, *(side // self.kernel_size for side in sides))
            case Operation.MEAN_POOL2D | Operation.ATTENTION2D:
                shape = (self.outputs, *((1, 1) if self.operation is Operation.MEAN_POOL2D else sides))
            case Operation.MEAN_POOL1D:
                shape = (1, self.outputs)
            case Operation.LINEAR | Operation.ATTENTION1D:
                shape = (*arriving[:-1], self.outputs)
            case Operation.FLATTEN:
                shape = (math.prod(arriving),)
            case operation:
                shape = entered if operation in REENTRANT else arriving
        return shape

    def flops(self, positions: int) -> int:
        """FLOPs of one forward pass of one sample.

        Args:
            positions: Places the layer puts out: H x W of an image, T of a sequence, 1 of a vector.
        """
        if self.operation in ATTENTIONS:
            return 4 * positions**2 * self.outputs
        if self.operation is Operation.GATE:
            return 2 * self.outputs * positions
        weight = self.tensor_shapes().get(f"{self.name}.weight")
        return 0 if weight is None else 2 * math.prod(weight) * positions

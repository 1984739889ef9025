"""The built-in host networks, in plain PyTorch: this file needs nothing but torch and is part of every export.

``ConvolutionalHost`` is a small VGG-like network: groups of two 3x3 convolutions, each with batch normalization and
GELU, max pooling between, global max pooling at the end and a linear head scaled by 0.5 (after K. Jordan, "94% on
CIFAR-10 in 3.29 seconds", 2024). Images of 16 pixels or more enter through a fixed 2x2 whitening.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_SCALE = 0.5
WHITENING_SIZE = 2


class WhiteningStem(nn.Module):
    """Fixed convolution whose filters are the whitened principal directions of image patches, and their negatives.

    Input [N, C, H, W], output [N, 2 * C * 4, H / 2, W / 2] after GELU. The filters are a buffer: nothing here learns.
    """

    filters: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        patch = channels * WHITENING_SIZE * WHITENING_SIZE
        self.register_buffer("filters", torch.zeros(2 * patch, channels, WHITENING_SIZE, WHITENING_SIZE))

    @torch.no_grad()
    def fit(self, images: Tensor, eps: float = 5e-4) -> None:
        """Set the filters from normalized training images, float [N, C, H, W]."""
        size = WHITENING_SIZE
        patches = (
            F.unfold(images.double(), size, stride=size).transpose(1, 2).reshape(-1, images.shape[1] * size * size)
        )
        covariance = patches.T @ patches / len(patches)
        values, vectors = torch.linalg.eigh(covariance)
        directions = (vectors / (values + eps).sqrt()).T.reshape(-1, *self.filters.shape[1:])
        self.filters.copy_(torch.cat([directions, -directions]).to(self.filters.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 8 * C, H / 2, W / 2]."""
        return F.gelu(F.conv2d(images, self.filters, stride=WHITENING_SIZE))


class ConvolutionalGroup(nn.Module):
    """conv 3x3, max pooling (if ``pool``), normalization, GELU, conv 3x3, normalization, GELU."""

    def __init__(self, inputs: int, width: int, *, pool: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm1 = nn.BatchNorm2d(width)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act2 = nn.GELU()

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, width, H', W'] with H' = H / 2 where it pools."""
        images = self.act1(self.norm1(self.pool(self.conv1(images))))
        out: Tensor = self.act2(self.norm2(self.conv2(images)))
        return out


class ConvolutionalHost(nn.Module):
    """Groups of ``widths`` channels over images of ``input_shape`` (C, H, W); all but the last group halve the size."""

    def __init__(self, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.stem: nn.Module = nn.Identity()
        if min(height, width) >= 16:
            self.stem = WhiteningStem(channels)
            channels, height, width = 2 * channels * WHITENING_SIZE**2, height // 2, width // 2
        groups: list[nn.Module] = []
        for index, group_width in enumerate(widths):
            pool = index < len(widths) - 1
            groups.append(ConvolutionalGroup(channels, group_width, pool=pool))
            channels = group_width
            height, width = (height // 2, width // 2) if pool else (height, width)
        if min(height, width) < 1:
            raise ValueError(f"{len(widths)} groups halve images of {tuple(input_shape)} to nothing")
        self.groups = nn.Sequential(*groups)
        self.pool = nn.MaxPool2d((height, width))
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] to logits [N, classes]."""
        logits: Tensor = self.head(self.flatten(self.pool(self.groups(self.stem(images)))))
        return logits * HEAD_SCALE


class MultilayerPerceptron(nn.Module):
    """Hidden layers of ``widths`` features with GELU over flattened inputs of ``input_shape``."""

    def __init__(self, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        features = math.prod(input_shape)
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(features, width), nn.GELU()]
            features = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(features, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """[N, *input_shape] to logits [N, classes]."""
        logits: Tensor = self.head(self.hidden(self.flatten(inputs)))
        return logits


def build(name: str, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> nn.Module:
    """The host called ``name`` ("cnn" or "mlp"). Raises ValueError for a shape that it cannot take."""
    if name == "mlp":
        return MultilayerPerceptron(input_shape, classes, widths)
    if len(input_shape) != 3:
        raise ValueError(f"a cnn takes images of shape (C, H, W), not {tuple(input_shape)}")
    return ConvolutionalHost(input_shape, classes, widths)

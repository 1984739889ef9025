"""The built-in host networks, in plain PyTorch: this file needs nothing but torch and is part of every export.

``ConvolutionalHost`` is a small VGG-like network: groups of two 3x3 convolutions, each with batch normalization and
GELU, max pooling between, global max pooling at the end and a linear head scaled by 0.5 (after K. Jordan, "94% on
CIFAR-10 in 3.29 seconds", 2024). Images of 16 pixels or more enter through a fixed 2x2 whitening.

``ResidualHost`` is a small residual network with batch normalization (He et al. 2015, arXiv:1512.03385), one stage for
each width. ``VisionTransformerHost`` is a small vision transformer that normalizes first (Dosovitskiy et al. 2020,
arXiv:2010.11929): its residual stream, the heads of its attentions and their hidden layers can all grow, because query,
key and value are layers of their own, and the number of heads is written nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_SCALE = 0.5
WHITENING_SIZE = 2
HEAD_FEATURES = 8
"""Features of one head of an attention; heads are added, never widened."""


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


class ResidualBlock(nn.Module):
    """conv 3x3, normalization, GELU, conv 3x3, normalization, beside a shortcut; GELU of the sum."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, width, H / stride, W / stride]."""
        inner = F.gelu(self.norm1(self.conv1(images)))
        return F.gelu(self.norm2(self.conv2(inner)) + self.shortcut(images))


class ResidualHost(nn.Module):
    """Two residual blocks for each of ``widths`` over images of ``input_shape`` (C, H, W).

    Every stage but the first halves the size.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        if min(input_shape[1:]) < 2 ** (len(widths) - 1):
            raise ValueError(f"{len(widths)} stages halve images of {tuple(input_shape)} to nothing")
        self.stem = nn.Conv2d(input_shape[0], widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for index, width in enumerate(widths):
            blocks += [ResidualBlock(channels, width, 2 if index else 1), ResidualBlock(width, width, 1)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] to logits [N, classes]."""
        features = self.blocks(F.gelu(self.norm(self.stem(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention of ``heads`` heads (Vaswani et al. 2017, arXiv:1706.03762) whose number can grow."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(features, heads * HEAD_FEATURES)
        self.key = nn.Linear(features, heads * HEAD_FEATURES)
        self.value = nn.Linear(features, heads * HEAD_FEATURES)
        self.out = nn.Linear(heads * HEAD_FEATURES, features)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, features] to the same shape."""
        query, key, value = (self._heads(layer(tokens)) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, tokens: Tensor) -> Tensor:
        # -1: as many heads as there are.
        return tokens.view(tokens.shape[0], tokens.shape[1], -1, HEAD_FEATURES).transpose(1, 2)


class EncoderBlock(nn.Module):
    """Attention, then a perceptron of one ``hidden`` layer, each normalized before and added to the stream."""

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = Attention(features, heads)
        self.norm2 = nn.LayerNorm(features)
        self.expand = nn.Linear(features, hidden)
        self.project = nn.Linear(hidden, features)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T, features] to the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        out: Tensor = tokens + self.project(F.gelu(self.expand(self.norm2(tokens))))
        return out


class VisionTransformerHost(nn.Module):
    """Patches of images of ``input_shape`` (C, H, W) as tokens, through a block for each width but the first.

    ``widths`` are the features of the stream, then those of the hidden layer of each block. Patches have 4 pixels a
    side, 2 where images have fewer than 16.
    """

    def __init__(self, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = input_shape
        patch = 4 if min(height, width) >= 16 else 2
        if height % patch or width % patch:
            raise ValueError(f"images of {tuple(input_shape)} are no whole number of {patch}x{patch} patches")
        if len(widths) < 2:
            raise ValueError(f"a vit needs the width of its stream and of one hidden layer or more, not {list(widths)}")
        features, heads = widths[0], max(2, widths[0] // HEAD_FEATURES)
        self.patches = nn.Conv2d(channels, features, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, height * width // patch**2, features))
        self.blocks = nn.Sequential(*(EncoderBlock(features, heads, hidden) for hidden in widths[1:]))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] to logits [N, classes]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


_IMAGE_HOSTS: dict[str, Callable[[Sequence[int], int, Sequence[int]], nn.Module]] = {
    "cnn": ConvolutionalHost,
    "resnet": ResidualHost,
    "vit": VisionTransformerHost,
}


def build(name: str, input_shape: Sequence[int], classes: int, widths: Sequence[int]) -> nn.Module:
    """The host called ``name`` (cnn, mlp, resnet, vit). Raises ValueError for a shape or widths that it cannot take."""
    if name == "mlp":
        return MultilayerPerceptron(input_shape, classes, widths)
    if len(input_shape) != 3:
        raise ValueError(f"a {name} takes images of shape (C, H, W), not {tuple(input_shape)}")
    return _IMAGE_HOSTS[name](input_shape, classes, widths)

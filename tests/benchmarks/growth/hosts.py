"""The hosts of the proof in plain PyTorch: like Tolaria's built-in ones, with a width for every layer.

Six convolutions 3x3 with normalization and GELU, max pooling in the first and the third, global max pooling and a
linear head scaled by 0.5 (GROWTH). What the images come in through is fixed, a ``Stem``; see :data:`protocol.Stem`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.chassis.config.schema import GrowthConfig
from services.kasmina.engine import GrowthEngine
from services.tolaria.data.splits import DataSet
from services.tolaria.hosts import HEAD_SCALE, MultilayerPerceptron, VisionTransformerHost, WhiteningStem
from services.tolaria.seeds import derive
from tests.benchmarks.growth.protocol import Entry, Stem

#: Training images that a whitening is fitted on.
_FITTED_IMAGES = 2000
_POOLED = (0, 2)
_ASIDES = {"aside": 1, "asides": 2}
_POOLED_SIDE = 16


class Brightness(nn.Module):
    """Fixed: how bright an image is on average, everywhere and ``channels`` times.

    To [N, channels, H / 2 + 2, W / 2 + 2]: a 3x3 convolution without padding then gives as many positions as the
    stem, and all alike; with padding it would tell the edges from the middle, which is something to learn from.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to what the class says."""
        _, _, height, width = images.shape
        return images.mean(dim=(1, 2, 3), keepdim=True).expand(-1, self.channels, height // 2 + 2, width // 2 + 2)


class ConvolutionalLayer(nn.Module):
    """conv 3x3, max pooling (if ``pool``), normalization, GELU."""

    def __init__(self, inputs: int, width: int, *, pool: bool, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=padding, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.GELU()

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, width, H', W'] with H' = H / 2 where it pools (less 2 without padding)."""
        out: Tensor = self.act(self.norm(self.pool(self.conv(images))))
        return out


class LayeredHost(nn.Module):
    """A chain of :class:`ConvolutionalLayer` behind a whitening stem, or directly behind the images.

    With the stem ``aside`` or ``asides`` a layer or two are beside the first one of the chain and cost as much for
    each channel, with next to nothing to see (:class:`Brightness`); the second of the chain reads them, too. Theirs
    are the first of ``widths``.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, widths: tuple[int, ...], stem: Stem) -> None:
        super().__init__()
        channels, side, _ = input_shape
        self.stem: nn.Module = nn.Identity()
        if stem != "none":
            self.stem, channels, side = WhiteningStem(channels), 8 * channels, side // 2
        asides = _ASIDES.get(stem, 0)
        beside, widths = widths[:asides], widths[asides:]
        self.brightness = Brightness(channels)
        self.asides = nn.ModuleList(ConvolutionalLayer(channels, width, pool=True, padding=0) for width in beside)
        layers = []
        for index, width in enumerate(widths):
            read = channels + sum(beside) if index == 1 else channels
            layers.append(ConvolutionalLayer(read, width, pool=index in _POOLED))
            channels, side = width, side // 2 if index in _POOLED else side
        self.layers = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(side)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] to logits [N, classes]."""
        # Convolutions of so few channels take a quarter less time in this layout.
        images = images.contiguous(memory_format=torch.channels_last)
        features = self.stem(images)
        for index, layer in enumerate(self.layers):
            features = layer(features)
            if index == 0 and len(self.asides) > 0:
                brightness = self.brightness(images)
                features = torch.cat([features, *(aside(brightness) for aside in self.asides)], dim=1)
        logits: Tensor = self.head(self.flatten(self.pool(features)))
        return logits * HEAD_SCALE


class PooledPerceptron(nn.Module):
    """A multilayer perceptron over images averaged to 16x16 (GROWTH, section 2b)."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        channels, side, _ = input_shape
        self.pool = nn.AvgPool2d(max(1, side // _POOLED_SIDE))
        side = min(side, _POOLED_SIDE)
        self.perceptron = MultilayerPerceptron((channels, side, side), classes, widths)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images [N, C, H, W] to logits [N, classes]."""
        out: Tensor = self.perceptron(self.pool(images))
        return out


def build(entry: Entry, widths: tuple[int, ...], data: DataSet, seed: int) -> nn.Module:
    """The entry's network with these widths, from a draw of its own: the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialization"))
        if entry.network.kind == "mlp":
            return PooledPerceptron(data.input_shape, data.classes, widths)
        if entry.network.kind == "vit":
            return VisionTransformerHost(data.input_shape, data.classes, widths)
        model = LayeredHost(data.input_shape, data.classes, widths, entry.network.stem)
    images = data.normalization(data.training.images[:_FITTED_IMAGES])
    if isinstance(model.stem, WhiteningStem):
        model.stem.fit(images)
    return model


def layers(model: nn.Module) -> list[tuple[str, int]]:
    """Path and width of every layer that counts as one of the entry's, in order; of grown networks too."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found.append((name, module.out_channels))
        elif isinstance(module, nn.Linear) and not name.endswith("head"):
            found.append((name, module.out_features))
    return found


def widths_of(model: nn.Module) -> tuple[int, ...]:
    """Widths by layer, of a network without seeds under way."""
    return tuple(width for _, width in layers(model))


def forward_flops(entry: Entry, widths: tuple[int, ...], data: DataSet) -> int:
    """Of one sample, by the engine's formula."""
    example = data.normalization(data.training.images[:2])
    model = build(entry, widths, data, 0)
    return GrowthEngine(model, example, run="count", settings=GrowthConfig(), outputs=data.classes, seed=0).flops()


def parameters(entry: Entry, widths: tuple[int, ...], data: DataSet) -> int:
    """All of them."""
    return sum(parameter.numel() for parameter in build(entry, widths, data, 0).parameters())

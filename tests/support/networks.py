"""Networks of every shape that can be widened; all take images [N, 1, 8, 8] and give five logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Heads(nn.Module):
    """Attention written out: product, softmax, product."""

    def __init__(self, features: int, heads: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.q, self.k = nn.Linear(features, heads * size), nn.Linear(features, heads * size)
        self.v, self.out = nn.Linear(features, heads * size, bias=False), nn.Linear(heads * size, features)
        self.norm = nn.LayerNorm(size)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count = tokens.shape[0], tokens.shape[1]
        q, k, v = (f(tokens).view(batch, count, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = self.norm(q) @ k.transpose(-2, -1) * self.size**-0.5
        mixed = scores.softmax(dim=-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, count, -1))
        return out


class ClassToken(nn.Module):
    """A transformer with a class token, a position embedding, layer scale and attention written out."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, features, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, features))
        self.position = nn.Parameter(torch.randn(1, 5, features))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(features), nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = Heads(features, 2, 3)
        self.scale = nn.Parameter(0.5 * torch.ones(features))
        self.fc1, self.fc2 = nn.Linear(features, 12), nn.Linear(12, features)
        self.head = nn.Linear(features, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.position
        tokens = tokens + self.scale * self.attention(self.norm1(tokens))
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        logits: Tensor = self.head(self.norm3(tokens)[:, 0])
        return logits


class Dense(nn.Module):
    """Dense connections: normalization and convolution of everything that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1)
        self.filter = nn.Conv2d(14, 14, 3, padding=1, groups=14)
        self.head = nn.Linear(14 * 4, 5)

    def forward(self, images: Tensor) -> Tensor:
        # The image itself comes first: channels that cannot grow beside some that can.
        first = torch.cat([images, self.stem(images)], 1)
        second = torch.cat([first, self.conv1(F.relu(self.norm1(first)))], 1)
        third = torch.cat([second, self.conv2(F.relu(self.norm2(second)))], 1)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(self.filter(third), 2).flatten(1))
        return logits


class UNet(nn.Module):
    """A skip connection by concatenation, the same channels twice, under a LayerNorm of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(1, 14)
        self.merge = nn.Conv2d(14, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        shallow = F.silu(self.down(images))
        deep = F.interpolate(F.silu(self.deep(shallow)), scale_factor=2.0)
        joined = torch.cat((shallow, deep, -shallow), dim=1)
        logits: Tensor = self.head(F.relu(self.merge(self.norm(joined))).mean((2, 3)))
        return logits


class Grouped(nn.Module):
    """GroupNorm of two channels a group; a depthwise layer with two filters for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.filter = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.batch = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 3, 1)
        self.single = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        wide = F.relu(self.batch(self.filter(F.relu(self.norm(self.conv(images))))))
        logits: Tensor = self.head(self.single(self.project(wide)).amax((2, 3)))
        return logits


class Signal(nn.Module):
    """One-dimensional convolutions with batch normalization, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 5, padding=2), nn.BatchNorm1d(4)
        self.filter = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.project, self.head = nn.Conv1d(4, 3, 1), nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        wave = F.relu(self.norm(self.conv(images.flatten(2))))
        logits: Tensor = self.head(self.project(self.filter(wave)).mean(2))
        return logits


class Volume(nn.Module):
    """Three-dimensional convolutions with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3)
        self.filter = nn.Conv3d(3, 3, 3, padding=1, groups=3)
        self.project, self.head = nn.Conv3d(3, 2, 1), nn.Linear(2, 5)

    def forward(self, images: Tensor) -> Tensor:
        block = F.relu(self.norm(self.conv(images[:, :, None])))
        logits: Tensor = self.head(self.project(self.filter(block)).mean((2, 3, 4)))
        return logits


class RootMeanSquare(nn.Module):
    """A residual stream of vectors under RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 6)
        self.norm1, self.norm2 = nn.RMSNorm(6), nn.RMSNorm(6, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.embed(images.flatten(1))
        stream = stream + self.fc2(F.silu(self.fc1(self.norm1(stream))))
        logits: Tensor = self.head(self.norm2(stream))
        return logits


class EncoderStack(nn.Module):
    """torch's own transformer blocks, called in a row; one of them in another module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 4, stride=4)
        layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.last = nn.TransformerEncoderLayer(8, 2, 5, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.last(self.encoder(tokens)).mean(1))
        return logits


class FusedProjection(nn.Module):
    """A block as many vision transformers have it: one layer for query, key and value, taken apart by the code."""

    def __init__(self, features: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(1, features, 4, stride=4)
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.fc1, self.fc2 = nn.Linear(features, 12), nn.Linear(12, features)
        self.head = nn.Linear(features, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        batch, count, features = tokens.shape
        parts = self.qkv(self.norm1(tokens)).reshape(batch, count, 3, self.heads, features // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, count, features)
        tokens = tokens + self.proj(mixed)
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        logits: Tensor = self.head(tokens.mean(1))
        return logits

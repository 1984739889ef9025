"""Batches as a pure function of (seed, epoch, step): what is trained on does not depend on what happened before.

The mirror alternates: an image mirrored in one epoch is not in the next (K. Jordan, "94% on CIFAR-10 in 3.29 seconds",
2024, section 3.6), from a first coin of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from services.chassis.config.schema import DataConfig
from services.tolaria.data.splits import Normalization, Split
from services.tolaria.seeds import derive

_Draw = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Normalized images, float32 [B, ...], and labels, int64 [B]."""

    images: Tensor
    labels: Tensor


class Batches:
    """The training batches of a run. Images stay as stored until their batch is due."""

    def __init__(self, split: Split, normalization: Normalization, config: DataConfig, seed: int) -> None:
        self._split = split
        self._normalization = normalization
        self._config = config
        self._seed = seed
        self._device = split.images.device
        self._first_mirror = self._generate(lambda g: torch.rand(len(split), generator=g) < 0.5, "mirror")
        self._order: tuple[int, Tensor] | None = None
        #: The last, short batch of an epoch is left out: its normalization statistics would be the odd ones.
        self.per_epoch = max(1, len(split) // config.batch_size)
        self.batch_size = min(config.batch_size, len(split))

    def at(self, epoch: int, step_in_epoch: int) -> Batch:
        """Batch ``step_in_epoch`` (0 .. per_epoch - 1) of ``epoch`` (from 0)."""
        if self._order is None or self._order[0] != epoch:
            order = self._generate(lambda g: torch.randperm(len(self._split), generator=g), "order", epoch)
            self._order = epoch, order
        first = step_in_epoch * self.batch_size
        indices = self._order[1][first : first + self.batch_size]
        images = self._normalization(self._split.images[indices])
        if self._config.flip:
            mirrored = self._first_mirror[indices] ^ bool(epoch % 2)
            images = torch.where(mirrored.reshape(-1, *([1] * (images.dim() - 1))), images.flip(-1), images)
        if self._config.translate:
            images = self._translate(images, epoch, step_in_epoch)
        return Batch(images, self._split.labels[indices])

    def _generate(self, draw: _Draw, *path: str | int) -> Tensor:
        # Drawn on the CPU everywhere, so that a GPU sees the same batches.
        return draw(torch.Generator().manual_seed(derive(self._seed, *path))).to(self._device)

    def _translate(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Shift each image by up to ``translate`` pixels in both directions; what comes in is the mean (zero)."""
        reach = self._config.translate
        count, _, height, width = images.shape
        shifts = self._generate(
            lambda g: torch.randint(0, 2 * reach + 1, (2, count), generator=g), "translate", epoch, step
        )
        padded = F.pad(images, (reach, reach, reach, reach))
        # Every window of every image as a view, of which one for each image is copied, row by row.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        everyone = torch.arange(count, device=self._device)
        return windows[everyone, :, shifts[0], shifts[1]].contiguous()

"""Accuracy on held-out images, and what a seed is worth there. Nothing here draws a random number or trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.kasmina.model import Contribution
from services.tolaria.data.splits import Normalization, Split


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per image: ``correct``, bool [N], and cross entropy ``losses``, float32 [N]. ``flops`` is what it cost."""

    correct: Tensor
    losses: Tensor
    flops: float

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100.0 * float(self.correct.double().mean())

    @property
    def loss(self) -> float:
        """Mean cross entropy."""
        return float(self.losses.double().mean())


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside; afterwards each module has the mode it had (a user's frozen layers stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module, split: Split, normalization: Normalization, *, batch_size: int, flops_per_sample: int
) -> Evaluation:
    """Judge ``model`` on ``split`` in evaluation mode, float32, without gradients."""
    correct, losses = [], []
    with evaluation_mode(model), torch.no_grad():
        for first in range(0, len(split), batch_size):
            labels = split.labels[first : first + batch_size]
            logits = model(normalization(split.images[first : first + batch_size])).float()
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
            correct.append(logits.argmax(dim=1) == labels)
    return Evaluation(torch.cat(correct), torch.cat(losses), float(flops_per_sample) * len(split))


def contribution(with_seed: Evaluation, without_seed: Evaluation, confidence: float) -> Contribution:
    """Points of accuracy that the seed adds, from the same weights on the same images.

    Paired: the interval is the normal approximation over the per-image differences of correctness, each -1, 0 or 1.
    A single image has no spread and raises ValueError.
    """
    difference = with_seed.correct.double() - without_seed.correct.double()
    samples = len(difference)
    if samples < 2:
        raise ValueError("a contribution needs two images or more")
    points = 100.0 * float(difference.mean())
    reach = 100.0 * NormalDist().inv_cdf(0.5 + confidence / 2) * float(difference.std(correction=1)) / samples**0.5
    return Contribution(points, points - reach, points + reach, confidence, samples)

"""The score on held-out images, and what a seed is worth there. Nothing here draws a random number or trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from services.kasmina.model import Contribution
from services.tolaria.data.splits import Normalization, Split
from services.tolaria.task import Objective


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Per image: ``scores`` from 0 to 1, bool (right or wrong) or floating [N], and ``losses``, float32 [N].

    ``flops`` is what it cost.
    """

    scores: Tensor
    losses: Tensor
    flops: float

    @property
    def accuracy(self) -> float:
        """Mean score, percent: with classes the share that is right."""
        return 100.0 * float(self.scores.double().mean())

    @property
    def loss(self) -> float:
        """Mean loss."""
        return float(self.losses.double().mean())

    def packed(self) -> str | list[float]:
        """The scores for a JSON file: a digit for each image that is right or wrong, else numbers."""
        if self.scores.dtype is torch.bool:
            return "".join("01"[right] for right in self.scores.tolist())
        return [float(score) for score in self.scores.tolist()]


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
    model: nn.Module,
    split: Split,
    normalization: Normalization,
    objective: Objective,
    *,
    batch_size: int,
    flops_per_sample: int,
) -> Evaluation:
    """Judge ``model`` on ``split`` in evaluation mode, float32, without gradients."""
    scores, losses = [], []
    with evaluation_mode(model), torch.no_grad():
        for first in range(0, len(split), batch_size):
            labels = split.labels[first : first + batch_size]
            outputs = model(normalization(split.images[first : first + batch_size])).float()
            losses.append(objective.losses(outputs, labels))
            scores.append(objective.scores(outputs, labels))
    return Evaluation(torch.cat(scores), torch.cat(losses), float(flops_per_sample) * len(split))


def contribution(with_seed: Evaluation, without_seed: Evaluation, confidence: float) -> Contribution:
    """Points of accuracy that the seed adds, from the same weights on the same images.

    Paired: the interval is the normal approximation over the per-image differences of the score.
    A single image has no spread and raises ValueError.
    """
    difference = with_seed.scores.double() - without_seed.scores.double()
    samples = len(difference)
    if samples < 2:
        raise ValueError("a contribution needs two images or more")
    points = 100.0 * float(difference.mean())
    reach = 100.0 * NormalDist().inv_cdf(0.5 + confidence / 2) * float(difference.std(correction=1)) / samples**0.5
    return Contribution(points, points - reach, points + reach, confidence, samples)

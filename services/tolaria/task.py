"""What a network is trained for: its loss, and the score that growth is judged by.

Without ``task.factory`` that is the classes of the data set (:class:`Classification`). A factory returns an object of
the :class:`Task` protocol; it is checked once before training, on the host and the first images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.chassis.config.schema import TaskConfig
from services.tolaria.errors import FactoryError
from services.tolaria.factories import load_factory

_T = TypeVar("_T")


class Task(Protocol):
    """A user's own objective. ``outputs`` are what the network puts out, ``targets`` the data set's labels as they are.

    Beside these a task may have ``step(model, inputs, targets) -> Tensor``, the training loss of one batch, for what a
    loss of outputs alone cannot say (mixing images, a second forward pass, a penalty on weights). It must call
    ``model`` on a batch as long as ``targets``, last of all if more than once: branches that learn in isolation take
    ``loss`` of that call. FLOPs are billed as one forward and one backward pass per sample.

    Attributes:
        outputs: Numbers the network puts out per sample: its output is [N, outputs].
        chance: Score of guessing, 0 to 1: a run that falls back to it has collapsed. 0 where guessing scores nothing.
    """

    outputs: int
    chance: float

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss to minimize, 0-d with a gradient, the mean over samples. Also what isolated branches learn by."""
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How good each sample is, [N] from 0 (useless) to 1 (perfect); reports show its mean in percent."""
        ...


class Objective(Protocol):
    """What trainer and evaluation ask of a task."""

    @property
    def outputs(self) -> int:
        """Numbers the network puts out per sample."""
        ...

    @property
    def chance(self) -> float:
        """Score of guessing, 0 to 1."""
        ...

    def guessing(self, targets: Tensor) -> float:
        """Score, 0 to 1, of the best that can be said of samples with these targets without looking at them."""
        ...

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Training loss of one batch, 0-d."""
        ...

    def own_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of a branch that learns in isolation, 0-d."""
        ...

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each sample for reports, float32 [N]."""
        ...

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Score of each sample, 0 to 1, bool or floating [N]."""
        ...


class Classification:
    """Cross entropy; the score is whether the largest output is the label's.

    Args:
        classes: Labels count from 0 to this.
        label_smoothing: Share of a target's weight spread over all classes, in training only.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.outputs = classes
        self.chance = 1.0 / classes
        self._label_smoothing = label_smoothing

    def guessing(self, targets: Tensor) -> float:
        """Always the most frequent class: what a network says that died."""
        return max(self.chance, float(torch.bincount(targets).max()) / len(targets))

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of a batch, smoothed."""
        return F.cross_entropy(model(inputs), targets, label_smoothing=self._label_smoothing)

    def own_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of a batch."""
        return F.cross_entropy(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each sample."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether each sample is right, bool [N]."""
        return outputs.argmax(dim=1) == targets


class UserTask:
    """A task from ``task.factory``. What it raises, and what it returns that cannot be used, becomes a FactoryError."""

    def __init__(self, path: str, task: Any) -> None:
        self._path = path
        for name in ("loss", "score"):
            if not callable(getattr(task, name, None)):
                raise self._error(f"a {type(task).__name__} without {name}(outputs, targets)")
        self._task: Task = task
        outputs, chance = getattr(task, "outputs", None), getattr(task, "chance", None)
        if not isinstance(outputs, int) or isinstance(outputs, bool) or outputs < 1:
            raise self._error(f"outputs must be a whole number from 1, what the network puts out, not {outputs!r}")
        if not isinstance(chance, int | float) or not 0 <= chance < 1:
            raise self._error(f"chance must be the score of guessing, 0 <= chance < 1, not {chance!r}")
        self.outputs, self.chance = outputs, float(chance)
        self._step: Callable[[nn.Module, Tensor, Tensor], Tensor] = getattr(task, "step", self._plain_step)

    def guessing(self, targets: Tensor) -> float:
        """What the user says that it scores."""
        return self.chance

    def _plain_step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(model(inputs), targets)

    def step(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The user's step, or the loss of the network's outputs."""
        return self._asked("step", lambda: self._step(model, inputs, targets))

    def own_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's loss of what an isolated branch puts out."""
        return self._asked("loss", lambda: self._task.loss(outputs, targets))

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's loss is a mean: each sample of the batch is shown with it."""
        return self.own_loss(outputs, targets).float().expand(len(targets))

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The user's scores, checked: growth is judged by them, and a NaN would judge nothing."""
        scores: Any = self._asked("score", lambda: self._task.score(outputs, targets))
        if not isinstance(scores, Tensor) or scores.shape != (len(targets),):
            raise self._error(f"score returned {_shape(scores)}, not one number per sample, ({len(targets)},)")
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise self._error(f"a score of {_worst(scores):g}: scores lie between 0 (useless) and 1 (perfect)")
        return scores

    def check(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Take one step's loss and one score of ``model``; raises FactoryError. ``model`` is used up by it.

        The global random generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            loss: Any = self.step(model.train(), inputs, targets)
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                raise self._error(f"the loss of a batch is {_shape(loss)}, not one number (a tensor of shape ())")
            if not math.isfinite(value := float(loss.detach())):
                raise self._error(f"the loss of the first batch is {value}")
            if not loss.requires_grad:
                raise self._error("the loss has no gradient: compute it from the outputs with torch, not detached")
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not any(bool((gradient != 0).any()) for gradient in gradients):
            raise self._error("the loss does not depend on the network: all its gradients are zero")
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            raise self._error("the gradient of the first batch is not finite")
        with torch.no_grad():
            self.scores(model.eval()(inputs), targets)

    def _asked(self, name: str, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except Exception as error:
            raise self._error(f"{name} failed: {type(error).__name__}: {error}") from error

    def _error(self, what: str) -> FactoryError:
        return FactoryError(f"task.factory {self._path}: {what}")


def load(config: TaskConfig) -> UserTask | None:
    """The user's task; None when the data set's classes are the task. Raises FactoryError."""
    if config.factory is None:
        return None
    return UserTask(config.factory, load_factory(config.factory, "task.factory")())


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _worst(scores: Tensor) -> float:
    values = scores.double()
    return float(values[(~((values >= 0) & (values <= 1))).nonzero()[0, 0]])

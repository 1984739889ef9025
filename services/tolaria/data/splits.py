"""A data set as whole tensors, with its validation split; the test set behind a lock.

For data that fits in memory this is the fastest pipeline and needs no worker processes (which fork badly beside gRPC).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from services.chassis.config.schema import DataConfig
from services.tolaria.data import cifar, digits
from services.tolaria.errors import DataError, FactoryError, TestSetTouchedError
from services.tolaria.factories import load_factory
from services.tolaria.seeds import derive
from services.tolaria.task import UserTask

#: Where the official files are looked for when data.data_dir is not set.
DEFAULT_DATA_DIR: Final = Path("data")


@dataclass(frozen=True, slots=True)
class Split:
    """Images, uint8 or float32 [N, ...], and labels, int64 [N] (with a task of the user's: its targets, [N, ...])."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> Split:
        """The images and labels at ``indices``, int64 [M]."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Split:
        """The same on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and deviation of the training images, each broadcastable to [N, C, ...]."""

    mean: Tensor
    deviation: Tensor

    @staticmethod
    def of(images: Tensor) -> Normalization:
        """Measured on ``images``; a channel that never varies keeps its scale."""
        channels = images.shape[1]
        flat = images.transpose(0, 1).reshape(channels, -1).double()
        shape = (1, channels, *([1] * (images.dim() - 2)))
        deviation = flat.std(dim=1, correction=0)
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        return Normalization(flat.mean(dim=1).float().reshape(shape), deviation.float().reshape(shape))

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` as float32 with mean 0 and deviation 1 over the training set."""
        return (images.float() - self.mean) / self.deviation

    def to(self, device: torch.device) -> Normalization:
        """The same on ``device``."""
        return Normalization(self.mean.to(device), self.deviation.to(device))


class LockedTestSet:
    """The test set of one arm: opened once, after training. Opening it again raises TestSetTouchedError."""

    def __init__(self, read: Callable[[], Split]) -> None:
        self._read = read
        self._open = False
        self._used = False

    def unlock(self) -> None:
        """Training is over: the next :meth:`take` is allowed."""
        self._open = True

    def take(self) -> Split:
        """The test set, once. Raises TestSetTouchedError before :meth:`unlock` or the second time."""
        if not self._open or self._used:
            when = "a second time" if self._used else "before the end of training"
            raise TestSetTouchedError(f"the test set was asked for {when}: decisions use the validation split")
        self._used = True
        return self._read()


@dataclass(frozen=True, slots=True)
class DataSet:
    """What a run trains on, and what for.

    ``classes`` is how many numbers the network puts out per sample: one per class of the labels, or what ``task`` says.
    ``task`` is the user's own; None: to tell the classes apart.
    """

    training: Split
    validation: Split
    normalization: Normalization
    classes: int
    read_test: Callable[[], Split]
    task: UserTask | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, [C, H, W] for images."""
        return tuple(self.training.images.shape[1:])

    def to(self, device: torch.device) -> DataSet:
        """The same on ``device``; the test set follows when it is read."""
        return DataSet(
            self.training.to(device),
            self.validation.to(device),
            self.normalization.to(device),
            self.classes,
            lambda: self.read_test().to(device),
            self.task,
        )

    def check_task(self, model: nn.Module, samples: int) -> None:
        """Try the user's task, if there is one, on ``model`` and the first ``samples`` images. Raises FactoryError."""
        if self.task is not None:
            few = self.training.select(torch.arange(min(samples, len(self.training))))
            self.task.check(model, self.normalization(few.images), few.labels)

    def locked_test_set(self) -> LockedTestSet:
        """A fresh lock: each arm of a comparison touches the test set once."""
        return LockedTestSet(self.read_test)


def load(config: DataConfig, seed: int, task: UserTask | None = None) -> DataSet:
    """Read the data set that ``config`` names and split it.

    ``seed`` is the run's root seed: the validation split has a generator of its own. ``task`` is the user's, if any:
    the labels are then its targets, of any shape, int64 or float32.
    Raises DataMissingError, DataCorruptError, DataError or FactoryError.
    """
    training, read_test = _READERS[config.name](config, task is not None)
    if config.limit is not None:
        training = training.select(torch.arange(min(config.limit, len(training))))
    if (config.flip or config.translate) and training.images.dim() != 4:
        raise DataError(
            f"data.flip and data.translate are for images [N, C, H, W], not for {tuple(training.images.shape)}"
        )
    held_out = round(config.validation_ratio * len(training))
    if not 0 < held_out < len(training):
        raise DataError(
            f"data.validation_ratio {config.validation_ratio} of {len(training)} images leaves nothing to "
            "validate on or to train on"
        )
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(derive(seed, "validation")))
    validation, rest = training.select(order[:held_out]), training.select(order[held_out:])
    # A class may be missing from either part; the training set as published names them all.
    outputs = int(training.labels.max()) + 1 if task is None else task.outputs
    return DataSet(rest, validation, Normalization.of(rest.images), outputs, read_test, task)


def _split(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Split:
    # A copy: what comes out of a file's bytes is read-only, which torch cannot express.
    return Split(torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()))


def _read_digits(config: DataConfig, any_targets: bool) -> tuple[Split, Callable[[], Split]]:
    everything = _split(*digits.read(digits.find_file()))
    border = len(everything) - digits.TEST_COUNT
    return (
        everything.select(torch.arange(border)),
        lambda: everything.select(torch.arange(border, len(everything))),
    )


def _read_cifar(config: DataConfig, any_targets: bool) -> tuple[Split, Callable[[], Split]]:
    layout = cifar.LAYOUTS[config.name]
    data_dir = config.data_dir or DEFAULT_DATA_DIR
    return _split(*cifar.read_training(layout, data_dir)), lambda: _split(*cifar.read_test(layout, data_dir))


def _read_factory(config: DataConfig, any_targets: bool) -> tuple[Split, Callable[[], Split]]:
    assert config.factory is not None, "the configuration refuses name: factory without one"
    parts = load_factory(config.factory, "data.factory")(config.data_dir)
    if not isinstance(parts, tuple) or len(parts) != 4:
        raise FactoryError(
            f"data.factory {config.factory} must return (train_images, train_labels, test_images, test_labels)"
        )
    training = _checked(config.factory, "training", parts[0], parts[1], any_targets)
    test = _checked(config.factory, "test", parts[2], parts[3], any_targets)
    return training, lambda: test


def _checked(factory: str, what: str, images: Any, labels: Any, any_targets: bool) -> Split:
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.dtype not in (torch.uint8, torch.float32) or images.dim() < 2:
        raise FactoryError(
            f"data.factory {factory}: {what} images must be uint8 or float32 [N, ...], "
            f"not {images.dtype} of shape {tuple(images.shape)}"
        )
    if any_targets:
        if labels.dtype not in (torch.int64, torch.float32) or labels.shape[:1] != images.shape[:1]:
            raise FactoryError(
                f"data.factory {factory}: {what} targets must be int64 or float32 [{len(images)}, ...], "
                f"not {labels.dtype} of shape {tuple(labels.shape)}"
            )
    elif labels.dtype != torch.int64 or labels.shape != images.shape[:1] or int(labels.min()) < 0:
        raise FactoryError(
            f"data.factory {factory}: {what} labels must be int64 [{len(images)}] counting from 0, "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    return Split(images, labels)


_READERS: Final[dict[str, Callable[[DataConfig, bool], tuple[Split, Callable[[], Split]]]]] = {
    "digits": _read_digits,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "factory": _read_factory,
}

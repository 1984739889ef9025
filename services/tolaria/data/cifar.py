"""CIFAR-10 and CIFAR-100 from the official python files (https://www.cs.toronto.edu/~kriz/cifar.html). Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.tolaria.data import restricted_pickle
from services.tolaria.errors import DataCorruptError, DataMissingError

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CifarLayout:
    """Where the files of one data set are and what they must be. ``files`` maps each name to its MD5."""

    name: str
    folder: str
    archive: str
    archive_md5: str
    archive_url: str
    files: Mapping[str, str]
    training: Sequence[str]
    test: str
    label_key: bytes
    classes: int


CIFAR10: Final = CifarLayout(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    archive_md5="c58f30108f718f92721af3b95e74349a",
    archive_url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    training=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    test="test_batch",
    label_key=b"labels",
    classes=10,
)
CIFAR100: Final = CifarLayout(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
    archive_url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    files={"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    training=("train",),
    test="test",
    label_key=b"fine_labels",
    classes=100,
)
LAYOUTS: Final[Mapping[str, CifarLayout]] = {layout.name: layout for layout in (CIFAR10, CIFAR100)}


def find_folder(layout: CifarLayout, data_dir: Path) -> Path:
    """The folder with all files of ``layout``: ``data_dir`` itself or the official folder below it.

    Raises DataMissingError naming the files that are missing and the command that fetches them.
    """
    folder = data_dir if data_dir.name == layout.folder else data_dir / layout.folder
    missing = [name for name in layout.files if not (folder / name).is_file()]
    if missing:
        raise DataMissingError(
            f"{layout.name}: {', '.join(missing)} not found in {folder}. Set data.data_dir to the folder that holds "
            f"{layout.folder}/, or fetch the files: "
            f"python -m services.tolaria.data.download {layout.name} --data-dir {data_dir}"
        )
    return folder


def read_training(layout: CifarLayout, data_dir: Path) -> tuple[Images, Labels]:
    """All training images, uint8 [N, 3, 32, 32], and labels, int64 [N].

    Raises DataMissingError, or DataCorruptError for a file whose MD5 is not the published one.
    """
    folder = find_folder(layout, data_dir)
    parts = [_read(layout, folder / name) for name in layout.training]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def read_test(layout: CifarLayout, data_dir: Path) -> tuple[Images, Labels]:
    """The test images and labels; shapes and errors as :func:`read_training`."""
    return _read(layout, find_folder(layout, data_dir) / layout.test)


def check_file(path: Path, md5: str) -> bytes:
    """The content of ``path``; raises DataCorruptError unless its MD5 is ``md5``, DataMissingError if unreadable."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read: {error.strerror}") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataCorruptError(
            f"{path} is damaged or truncated: {len(data)} bytes with MD5 {found}, published is {md5}. "
            "Delete it and download it again."
        )
    return data


def _read(layout: CifarLayout, path: Path) -> tuple[Images, Labels]:
    data = check_file(path, layout.files[path.name])
    try:
        content = restricted_pickle.read(data)
        images = content[b"data"].reshape(-1, 3, 32, 32)
        labels = np.asarray(content[layout.label_key], dtype=np.int64)
    except DataCorruptError as error:
        raise DataCorruptError(f"{path} {error}") from None
    except (KeyError, AttributeError, ValueError) as error:
        raise DataCorruptError(f"{path} is no batch of {layout.name}: {error}") from error
    if len(images) != len(labels):
        raise DataCorruptError(f"{path} has {len(images)} images and {len(labels)} labels")
    return images, labels

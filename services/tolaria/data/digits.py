"""The handwritten digits that scikit-learn bundles (E. Alpaydin, C. Kaynak, UCI 1998): 1,797 images of 8x8. Torch-free.

``digits.csv.gz`` is read directly: importing scikit-learn for it costs two seconds.
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.tolaria.errors import DataCorruptError, DataMissingError

COUNT: Final = 1797
#: The last 600 images are the test set: other people wrote them, which makes it a real test.
TEST_COUNT: Final = 600


def find_file() -> Path:
    """The bundled file. Raises DataMissingError without scikit-learn."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataMissingError(
            "digits: scikit-learn, which bundles the images, is not installed: pip install scikit-learn"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def read(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All images, uint8 0..16 [1797, 1, 8, 8], and labels, int64 [1797], in the file's order.

    Raises DataMissingError or DataCorruptError naming ``path``.
    """
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64, ndmin=2)
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise DataCorruptError(f"{path} is truncated or damaged ({error}): reinstall scikit-learn") from error
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read: {error.strerror}") from error
    if table.shape != (COUNT, 65):
        raise DataCorruptError(f"{path} has shape {table.shape} instead of ({COUNT}, 65): reinstall scikit-learn")
    return table[:, :64].astype(np.uint8).reshape(-1, 1, 8, 8), table[:, 64].copy()

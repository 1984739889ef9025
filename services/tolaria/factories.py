"""A user's own callable by import path. Torch-free."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.tolaria.errors import FactoryError


def load_factory(path: str, key: str) -> Callable[..., Any]:
    """The callable at ``path`` ("package.module:callable"); ``key`` is the configuration key to blame.

    The current folder is searched too, as ``python -m`` would. What the callable raises when called becomes a
    FactoryError with the user's error as its cause. Raises FactoryError when it cannot be imported or called.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise FactoryError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise FactoryError(f"{key}: {module_name} has no callable {attribute!r}")

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise FactoryError(f"{key}: {path} failed: {type(error).__name__}: {error}") from error

    return call

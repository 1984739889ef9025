"""What growth is compared with: the same host without growth, and the final shape trained from scratch.

Both go through the same trainer with growth off, for as many epochs, on the same batches (the generators of data order
and augmentation depend on the run's seed alone); each touches the test set once, at its own end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from services.tolaria import rebuild
from services.tolaria.seeds import derive

ControlName = Literal["host", "bigger"]


def builder(
    name: ControlName, build_host: Callable[[], nn.Module], changes: Sequence[Mapping[str, Any]], seed: int
) -> Callable[[], nn.Module]:
    """How to make a fresh network of control ``name``; ``seed`` is the run's root seed.

    Raises ValueError from the builder for changes that :mod:`services.tolaria.rebuild` cannot follow.
    """
    if name == "host":
        return build_host

    def build_bigger() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "initialization", "bigger"))
            return rebuild.grow(build_host(), changes)

    return build_bigger

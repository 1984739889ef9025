"""Interfaces of places that blueprints are fitted to, for tests."""

from __future__ import annotations

from services.blueprints import families
from services.blueprints.spec import Blueprint, Interface, LayerInterface, SlotKind
from services.blueprints.vocabulary import Operation


def layer(path: str, operation: Operation, *weight: int, output: tuple[int, ...], bias: bool = False) -> LayerInterface:
    """One layer at a slot."""
    return LayerInterface(path, operation, weight, output, bias)


#: A convolution of 3 channels, normalised, read by a convolution, a flattened linear layer and (depthwise) followed.
WIDTH = Interface(
    SlotKind.WIDTH,
    (1, 8, 8),
    (3, 8, 8),
    writers=(layer("a", Operation.CONV2D, 3, 1, 3, 3, output=(3, 8, 8)),),
    followers=(
        layer("b", Operation.BATCH_NORM2D, 3, output=(3, 8, 8), bias=True),
        layer("e", Operation.DEPTHWISE_CONV2D, 3, 1, 3, 3, output=(3, 8, 8)),
    ),
    readers=(
        layer("c", Operation.CONV2D, 4, 3, 3, 3, output=(4, 8, 8)),
        layer("d", Operation.LINEAR, 10, 192, output=(10,), bias=True),
    ),
)

#: Two linear layers with a normalisation between them; the first also reads what it writes (a residual stream).
FEATURES = Interface(
    SlotKind.WIDTH,
    (6,),
    (6,),
    writers=(layer("a", Operation.LINEAR, 6, 6, output=(6,), bias=True),),
    followers=(layer("n", Operation.BATCH_NORM1D, 6, output=(6,), bias=True),),
    readers=(
        layer("a", Operation.LINEAR, 6, 6, output=(6,), bias=True),
        layer("h", Operation.LINEAR, 4, 6, output=(4,), bias=True),
    ),
)

SPAN = Interface(SlotKind.SPAN, (8, 4, 4), (8, 4, 4))


def builtin(family: str) -> Blueprint:
    """The blueprint that every library starts with."""
    return next(blueprint for blueprint in families.builtin_blueprints() if blueprint.family == family)

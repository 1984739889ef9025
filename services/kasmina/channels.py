"""Labels of tensor dimensions: which channels an axis holds, and which of them must stay equal.

A dimension that a layer writes gets a *variable*, counted in raw entries of that layer's output. An axis is a run of
pieces, each of one variable or fixed: a concatenation has several. A piece has ``factor`` entries per raw entry: more
than one behind a flatten (each channel at several positions), fewer behind a split into parts of constant size (the
heads of an attention). Splits give a variable its *grain*: it grows by whole grains, which are the slot's channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive entries of a dimension.

    Attributes:
        variable: Whose entries they are; ``None``: they are fixed.
        factor: Entries per raw entry of the variable; 1 where fixed.
        size: Entries in all, as the network is now.
    """

    variable: int | None
    factor: Fraction
    size: int


@dataclass(frozen=True, slots=True)
class Axis:
    """Label of a dimension that holds at least one variable."""

    pieces: tuple[Piece, ...]

    def times(self, count: int) -> Axis:
        """The axis with each entry taken ``count`` times in a row."""
        return Axis(
            tuple(replace(piece, factor=_times(piece, count), size=piece.size * count) for piece in self.pieces)
        )


def _times(piece: Piece, count: int) -> Fraction:
    return piece.factor if piece.variable is None else piece.factor * count


Labels = tuple[Axis | None, ...]


class Channels:
    """Union-find over variables, with the grain of each set and the reason that pins it."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._grains: list[int] = []
        self._pins: dict[int, str] = {}

    def new(self, size: int) -> Axis:
        """A new variable of ``size`` raw entries."""
        self._parent.append(len(self._parent))
        self._grains.append(1)
        return Axis((Piece(len(self._parent) - 1, Fraction(1), size),))

    def find(self, variable: int) -> int:
        """Representative of a variable's set."""
        while self._parent[variable] != variable:
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def same(self, one: Axis | None, other: Axis | None) -> bool:
        """Whether two axes will always have the same entries."""
        return one is other or (one is not None and other is not None and self._key(one) == self._key(other))

    def _key(self, axis: Axis) -> list[tuple[int | None, Fraction, int]]:
        return [
            (None if piece.variable is None else self.find(piece.variable), piece.factor, piece.size)
            for piece in axis.pieces
        ]

    def unite(self, one: Axis, other: Axis, reason: str) -> None:
        """Make two axes stay equal; both are pinned with ``reason`` where their layouts differ."""
        shapes = [[(p.variable is None, p.factor, p.size) for p in axis.pieces] for axis in (one, other)]
        if shapes[0] != shapes[1]:
            self.pin((one, other), reason)
            return
        for left, right in zip(one.pieces, other.pieces, strict=True):
            if left.variable is not None and right.variable is not None:
                self._unite(left.variable, right.variable)

    def _unite(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low
        self._grains[low] = math.lcm(self._grains[low], self._grains[high])
        if high in self._pins:
            self._pins.setdefault(low, self._pins[high])

    def refine(self, variable: int, grain: int) -> None:
        """Let a variable grow by multiples of ``grain`` raw entries only."""
        root = self.find(variable)
        self._grains[root] = math.lcm(self._grains[root], grain)

    def grain(self, variable: int) -> int:
        """Raw entries that a variable grows by at least."""
        return self._grains[self.find(variable)]

    def pin(self, labels: Sequence[Axis | None], reason: str) -> None:
        """Fix all variables of some axes; the first reason stays."""
        for axis in labels:
            for piece in axis.pieces if axis is not None else ():
                if piece.variable is not None:
                    self._pins.setdefault(self.find(piece.variable), reason)

    def pinned(self, variable: int) -> str | None:
        """Why a variable is fixed; ``None`` if it is not."""
        return self._pins.get(self.find(variable))

    def split(self, axis: Axis, rest: int) -> Axis | None:
        """``axis`` split into parts of ``rest`` entries, its leading dimension; ``None`` where that mixes channels."""
        [piece, *more] = axis.pieces
        if more or piece.variable is None:
            return None
        factor = piece.factor / rest
        if 1 not in (factor.numerator, factor.denominator):
            return None
        self.refine(piece.variable, factor.denominator)
        return Axis((replace(piece, factor=factor, size=piece.size // rest),))


def groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest groups of dimensions with equal products.

    Dimensions of size 1 join the group before them, so that a labelled first dimension stays first.
    """
    i = j = 0
    while i < len(before) and j < len(after):
        sources, targets = [i], [j]
        size_in, size_out = before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out:
                size_in *= before[i]
                sources.append(i)
                i += 1
            else:
                size_out *= after[j]
                targets.append(j)
                j += 1
        while i < len(before) and before[i] == 1 and (j >= len(after) or after[j] != 1):
            sources.append(i)
            i += 1
        yield sources, targets


__all__ = ["Axis", "Channels", "Labels", "Piece", "groups"]

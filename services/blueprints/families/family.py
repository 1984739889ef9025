"""What a family of blueprints must say about itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

from services.blueprints.spec import InitRecipe, Interface, Scalar, SlotKind
from services.blueprints.vocabulary import InitRule, LayerSpec

LifecyclePath: TypeAlias = Literal["widening", "branch"]
"""Paths through the seed lifecycle, as Kasmina's table names them."""

BranchSource: TypeAlias = Literal["input", "output"]
"""What a branch reads: what enters its span, or what leaves it."""


class Family(Protocol):
    """A kind of blueprint. Implementations are stateless.

    ``applies_to`` comes before every method that takes an interface: they count on a place that fits.
    """

    @property
    def name(self) -> str:
        """Name in blueprints, e.g. ``widen``."""

    @property
    def description(self) -> str:
        """One sentence for people."""

    @property
    def slot_kind(self) -> SlotKind:
        """Kind of slot it goes into."""

    @property
    def path(self) -> LifecyclePath:
        """Its path through the seed lifecycle."""

    @property
    def source(self) -> BranchSource:
        """What its branch reads; of no meaning for a widening."""

    @property
    def defaults(self) -> Mapping[str, Scalar]:
        """All its parameters with their default values."""

    @property
    def initialization(self) -> InitRecipe:
        """Default recipe of its newborn weights."""

    @property
    def rules(self) -> frozenset[InitRule]:
        """Rules of initialization it can follow."""

    def validate(self, parameters: Mapping[str, Scalar]) -> None:
        """Return if these are all its parameters and each is in range; raises SpecError naming the field otherwise."""

    def applies_to(self, interface: Interface) -> str | None:
        """Why it cannot go there, in words; ``None`` if it can."""

    def default_size(self, parameters: Mapping[str, Scalar], interface: Interface) -> int:
        """The size to take where nobody chose one, 1 or more."""

    def layers(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> tuple[LayerSpec, ...]:
        """The layers of its branch in forward order, first to last; empty for a widening."""

    def parameters(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int:
        """Parameters it adds to the network."""

    def flops(self, parameters: Mapping[str, Scalar], interface: Interface, size: int) -> int | None:
        """Forward FLOPs per sample it adds; ``None`` where the interface leaves out a shape they depend on."""

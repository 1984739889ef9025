"""The life of a seed, as data: states, allowed transitions and the path of each family.

This is the one place where a rule of the lifecycle lives; nothing else in Esper decides what may
follow what. States are those of a *seed*: a *slot* is free, occupied, under embargo or locked.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class SeedState(StrEnum):
    """States of a seed, spelled as in the contract without its enum prefix."""

    DORMANT = "DORMANT"
    GERMINATED = "GERMINATED"
    LOADING = "LOADING"
    TRAINING = "TRAINING"
    GRAFTING = "GRAFTING"
    STABILIZATION = "STABILIZATION"
    EVALUATING = "EVALUATING"
    FINE_TUNING = "FINE_TUNING"
    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"


_S = SeedState

TRANSITIONS: Mapping[SeedState, frozenset[SeedState]] = {
    _S.DORMANT: frozenset({_S.GERMINATED}),
    _S.GERMINATED: frozenset({_S.LOADING, _S.CANCELLED}),
    _S.LOADING: frozenset({_S.TRAINING, _S.GRAFTING, _S.CULLED, _S.ROLLED_BACK}),
    _S.TRAINING: frozenset({_S.GRAFTING, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK}),
    _S.GRAFTING: frozenset({_S.STABILIZATION, _S.EVALUATING, _S.CULLED, _S.ROLLED_BACK}),
    _S.STABILIZATION: frozenset({_S.EVALUATING, _S.CULLED, _S.ROLLED_BACK}),
    _S.EVALUATING: frozenset({_S.FINE_TUNING, _S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK}),
    _S.FINE_TUNING: frozenset({_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK}),
    _S.FOSSILIZED: frozenset(),
    _S.CULLED: frozenset({_S.DORMANT}),
    _S.CANCELLED: frozenset({_S.DORMANT}),
    _S.ROLLED_BACK: frozenset({_S.DORMANT}),
}
"""What may follow each state. A transition that is not here is refused."""

FAMILY_PATHS: Mapping[str, tuple[SeedState, ...]] = {
    "widening": (_S.GERMINATED, _S.LOADING, _S.GRAFTING, _S.EVALUATING, _S.FOSSILIZED),
    "branch": (
        _S.GERMINATED,
        _S.LOADING,
        _S.TRAINING,
        _S.GRAFTING,
        _S.STABILIZATION,
        _S.EVALUATING,
        _S.FINE_TUNING,
        _S.FOSSILIZED,
    ),
}
"""Successful path of the two ways to graft: widening a set of channels, or bridging a span by a branch."""

OPTIONAL_STAGES = frozenset({_S.TRAINING, _S.STABILIZATION, _S.FINE_TUNING})
"""Stages a strategy may leave out, by declaring in its configuration that they last zero steps."""

IN_FORWARD = frozenset({_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED})
"""States in which a seed contributes to the network's output."""

ALIVE = frozenset(
    {_S.GERMINATED, _S.LOADING, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING}
)
"""States in which a seed is under way: neither fossilized nor gone."""

ENDED = frozenset({_S.CULLED, _S.CANCELLED, _S.ROLLED_BACK, _S.DORMANT})
"""States in which a seed has left the network."""


class IllegalTransitionError(ValueError):
    """A transition that is not in :data:`TRANSITIONS` or not on the family's path.

    Attributes:
        from_state: State the seed is in.
        to_state: State that was asked for.
    """

    def __init__(self, from_state: SeedState, to_state: SeedState, detail: str = "") -> None:
        """Say which transition was refused and what would have been allowed."""
        allowed = ", ".join(sorted(TRANSITIONS[from_state])) or "none, it is the end"
        super().__init__(f"no transition from {from_state} to {to_state} (allowed: {allowed}){detail}")
        self.from_state = from_state
        self.to_state = to_state


def check_transition(from_state: SeedState, to_state: SeedState) -> None:
    """Refuse a transition that the table does not hold.

    Raises:
        IllegalTransitionError: The table has no such transition.
    """
    if to_state not in TRANSITIONS[from_state]:
        raise IllegalTransitionError(from_state, to_state)


def next_on_path(path: tuple[SeedState, ...], state: SeedState, *, skip: frozenset[SeedState]) -> SeedState:
    """The state that follows ``state`` on a family's path, optional stages in ``skip`` left out.

    Raises:
        IllegalTransitionError: ``state`` is the last one of the path or not on it, or ``skip`` names a
            stage that may not be skipped.
    """
    if not skip <= OPTIONAL_STAGES:
        raise IllegalTransitionError(state, min(skip - OPTIONAL_STAGES), "; only optional stages may be skipped")
    following = path[path.index(state) + 1 :] if state in path else ()
    for candidate in following:
        if candidate not in skip:
            check_transition(state, candidate)
            return candidate
    raise IllegalTransitionError(state, state, "; the path ends here")

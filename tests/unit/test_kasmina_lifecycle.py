"""The lifecycle table, against the table of the architecture documentation."""

from __future__ import annotations

import itertools

import pytest

from services.blueprints.families import FAMILIES
from services.kasmina.lifecycle import (
    ALIVE,
    ENDED,
    FAMILY_PATHS,
    IN_FORWARD,
    TRANSITIONS,
    IllegalTransitionError,
    SeedState,
    check_transition,
    next_on_path,
)

S = SeedState

DOCUMENTED = """
DORMANT: GERMINATED
GERMINATED: LOADING CANCELLED
LOADING: TRAINING GRAFTING CULLED ROLLED_BACK
TRAINING: GRAFTING CULLED CANCELLED ROLLED_BACK
GRAFTING: STABILIZATION EVALUATING CULLED ROLLED_BACK
STABILIZATION: EVALUATING CULLED ROLLED_BACK
EVALUATING: FINE_TUNING FOSSILIZED CULLED ROLLED_BACK
FINE_TUNING: FOSSILIZED CULLED ROLLED_BACK
FOSSILIZED:
CULLED: DORMANT
CANCELLED: DORMANT
ROLLED_BACK: DORMANT
"""


def documented() -> dict[str, set[str]]:
    rows = (line.split(":") for line in DOCUMENTED.strip().splitlines())
    return {state: set(allowed.split()) for state, allowed in rows}


@pytest.mark.parametrize(("one", "other"), list(itertools.product(SeedState, SeedState)))
def test_every_pair_is_allowed_or_refused_as_documented(one: SeedState, other: SeedState) -> None:
    if other in documented()[one]:
        check_transition(one, other)
    else:
        with pytest.raises(IllegalTransitionError, match=f"from {one} to {other}") as caught:
            check_transition(one, other)
        assert (caught.value.from_state, caught.value.to_state) == (one, other)


def test_every_family_has_a_path_through_the_table() -> None:
    assert {family.path for family in FAMILIES.values()} <= set(FAMILY_PATHS)
    for path in FAMILY_PATHS.values():
        assert path[0] is S.GERMINATED
        assert path[-1] is S.FOSSILIZED
        for one, other in itertools.pairwise(path):
            check_transition(one, other)


def test_groups_of_states_do_not_contradict_the_table() -> None:
    assert set(TRANSITIONS) == set(SeedState)
    assert set(SeedState) == ALIVE | ENDED | {S.FOSSILIZED}
    assert ALIVE | {S.FOSSILIZED} >= IN_FORWARD


def test_optional_stages_may_be_left_out_and_no_others() -> None:
    path = FAMILY_PATHS["branch"]
    assert next_on_path(path, S.LOADING, skip=frozenset()) is S.TRAINING
    assert next_on_path(path, S.LOADING, skip=frozenset({S.TRAINING})) is S.GRAFTING
    assert next_on_path(path, S.GRAFTING, skip=frozenset({S.STABILIZATION})) is S.EVALUATING
    assert next_on_path(path, S.EVALUATING, skip=frozenset({S.FINE_TUNING})) is S.FOSSILIZED
    with pytest.raises(IllegalTransitionError, match="only optional stages"):
        next_on_path(path, S.GRAFTING, skip=frozenset({S.EVALUATING}))


def test_a_path_ends_at_its_end_and_knows_only_its_own_states() -> None:
    with pytest.raises(IllegalTransitionError, match="ends here"):
        next_on_path(FAMILY_PATHS["branch"], S.FOSSILIZED, skip=frozenset())
    with pytest.raises(IllegalTransitionError, match="ends here"):
        next_on_path(FAMILY_PATHS["widening"], S.TRAINING, skip=frozenset())

"""The policies: within the budget, deterministic, blind to the order of slots, with evidence for every slot."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.errors import EsperError, Reason
from services.tamiyo.learning import learn
from services.tamiyo.observation import (
    BranchCost,
    BudgetKind,
    Candidate,
    Observation,
    Occupancy,
    Plan,
    SlotKind,
    cost_of,
)
from services.tamiyo.policies import ALGORITHMS
from services.tamiyo.policies.parameters import FamilyEstimate
from services.tamiyo.policies.planning import closed, nothing
from tests.support.observations import BRANCH, WIDEN, observation, slot

_CHOOSING = ("utilization", "uniform", "random", "narrowest", "permuted")


def decide(algorithm: str, seen: Observation, **parameters: object) -> Plan:
    policy = ALGORITHMS[algorithm]
    return policy.decide(seen, {**policy.DEFAULTS, **parameters}, {})


def sizes(plan: Plan) -> dict[str, int]:
    return {change.slot: change.size for change in plan.changes}


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    count = draw(st.integers(1, 6))
    slots = []
    for index in range(count):
        width = draw(st.integers(1, 12))
        rank = draw(st.none() | st.floats(0.5, width))
        occupancy = draw(st.sampled_from([Occupancy.FREE, Occupancy.FREE, *Occupancy]))
        slots.append(slot(f"runs/r/slots/s{index}", width, rank, occupancy=occupancy))
    factor, left = draw(st.floats(1.01, 6)), draw(st.integers(1, 4))
    return observation(slots, factor=factor, decisions_left=left, max_factor=draw(st.floats(1.1, 4)))


@pytest.mark.parametrize("algorithm", _CHOOSING)
@given(seen=observations(), shuffle=st.randoms(use_true_random=False))
def test_every_plan_keeps_the_rules(algorithm: str, seen: Observation, shuffle: random.Random) -> None:
    plan = decide(algorithm, seen)
    share = (seen.budget_limit - seen.budget_current) / seen.decisions_left
    widths = {one.name: one.width for one in seen.slots}
    for change in plan.changes:
        view = next(one for one in seen.slots if one.name == change.slot)
        assert view.occupancy is Occupancy.FREE
        assert change.blueprint == WIDEN
        assert change.size >= 1
        # As the rule says it: 5 times 1.2 is 6, but 5 times what 1.2 is above 1 is less than 1.
        assert view.width + change.size <= view.width * seen.max_factor
        assert change.reason
        widths[change.slot] += change.size
    priced = cost_of(seen.cost_terms, widths)
    assert plan.cost == pytest.approx(priced)
    assert priced <= seen.budget_current + share * (1 + 1e-9)
    assert [item.slot for item in plan.evidence] == [one.name for one in seen.slots]
    assert all(item.reason for item in plan.evidence)
    assert {item.slot for item in plan.evidence if item.chosen} == set(sizes(plan))
    assert plan.explanation
    assert decide(algorithm, seen) == plan
    slots = list(seen.slots)
    shuffle.shuffle(slots)
    assert sizes(decide(algorithm, replace(seen, slots=slots))) == sizes(plan)


def test_utilization_widens_what_is_full_and_never_what_is_unmeasured() -> None:
    full, idle, unknown = slot("full", 4, 3.9), slot("idle", 8, 1.2), slot("unknown", 2)
    plan = decide("utilization", observation([full, idle, unknown], factor=3))
    assert set(sizes(plan)) == {"full"}
    evidence = {item.slot: item for item in plan.evidence}
    assert evidence["unknown"].need is None
    assert "not measured: no health was reported" in evidence["unknown"].reason
    assert "not short of capacity" in evidence["idle"].reason
    assert "dimensions in use" in evidence["full"].reason
    assert "full" in plan.explanation


def test_need_falls_as_a_slot_grows_so_that_a_plan_spreads() -> None:
    plan = decide("utilization", observation([slot("a", 4, 4.0), slot("b", 4, 3.6)], factor=3))
    assert set(sizes(plan)) == {"a", "b"}
    assert sizes(plan)["a"] >= sizes(plan)["b"]


def test_the_other_measure_and_its_least_need() -> None:
    seen = observation([slot("a", 4, 4.0)], factor=4, decisions_left=1)
    assert sizes(decide("utilization", seen, measure="participation", least_need=0.45)) == {"a": 1}
    assert "in need within" in decide("utilization", seen, least_need=1.0, measure="participation").explanation
    crowded = observation([slot("a", 4, 4.0), slot("b", 4, 3.0)], factor=1.2, decisions_left=1)
    reasons = [item.reason for item in decide("utilization", crowded).evidence if not item.chosen]
    assert any("others need it more" in reason for reason in reasons)


def test_penalties_count_against_a_slot() -> None:
    penalised = slot("a", 4, 4.0, penalties={WIDEN: 0.9})
    assert set(sizes(decide("utilization", observation([penalised, slot("b", 4, 3.0)], factor=1.5)))) == {"b"}


def test_a_branch_is_grafted_only_where_nothing_can_be_widened() -> None:
    spans = [slot("span:a", 8, 7.0, kind=SlotKind.SPAN), slot("span:b", 8, 3.0, kind=SlotKind.SPAN)]
    blind = slot("span:c", 8, kind=SlotKind.SPAN)
    held = slot("span:d", 8, 8.0, kind=SlotKind.SPAN, occupancy=Occupancy.OCCUPIED)
    stuck = slot("w", 4, 4.0, occupancy=Occupancy.LOCKED, free_epoch=9)
    plan = decide("utilization", observation([stuck, *spans, blind, held], factor=4))
    assert [(change.slot, change.blueprint, change.size) for change in plan.changes] == [("span:a", BRANCH, 2)]
    reasons = {item.slot: item.reason for item in plan.evidence}
    assert reasons["w"] == "locked after a rollback until epoch 9"
    assert reasons["span:b"] == "another span is fuller"
    assert reasons["span:c"] == "not measured"
    assert reasons["span:d"] == "a seed is under way in it"
    beside = decide("utilization", observation([slot("w", 4, 4.0), *spans], factor=4))
    assert {item.slot: item.reason for item in beside.evidence}["span:a"] == "widening comes before branches"
    poor = decide("utilization", observation([stuck, *spans], factor=1.0001))
    assert "no branch fits" in poor.explanation


_BRANCHES = {"gate": "squeeze_excite", "residual": "residual_bottleneck", "attention": "attention"}


def test_among_families_of_branches_outcomes_come_before_the_order_given() -> None:
    spans = [slot("span:a", 8, 7.0, kind=SlotKind.SPAN)]
    names, costs = frozenset({"span:a"}), {"span:a": BranchCost(1.0, 2.0)}
    fitting = [Candidate(name, family, names, costs) for name, family in _BRANCHES.items()]
    seen, policy = observation(spans, factor=9, candidates=fitting), ALGORITHMS["utilization"]

    def chosen(estimates: dict[str, FamilyEstimate], **parameters: object) -> str:
        return policy.decide(seen, {**policy.DEFAULTS, **parameters}, estimates).changes[0].blueprint

    assert chosen({}) == "residual"
    assert chosen({"attention": FamilyEstimate(outcomes=9, survival=0.9, contribution=1.0)}) == "attention"
    assert chosen({"residual_bottleneck": FamilyEstimate(outcomes=9, survival=0.4, contribution=1.0)}) == "attention"
    assert chosen({}, branch_families="squeeze_excite attention") == "gate"
    # A version that was stored before the parameter was there.
    old = {key: value for key, value in policy.DEFAULTS.items() if key != "branch_families"}
    policy.check(old)
    assert policy.decide(seen, old, {}).changes[0].blueprint == "residual"
    # Culled here once: the next family has its turn.
    culled = observation([slot("span:a", 8, 7.0, kind=SlotKind.SPAN, penalties={"residual": 1.0})], factor=9)
    again = replace(culled, candidates=fitting)
    assert policy.decide(again, policy.DEFAULTS, {}).changes[0].blueprint == "attention"


def test_a_family_that_hardly_ever_stays_is_given_up() -> None:
    seen, policy = observation([slot("a", 4, 4.0)]), ALGORITHMS["utilization"]
    gone = {"widen": FamilyEstimate(outcomes=9, survival=0.0, contribution=None)}
    assert "hardly ever stayed" in policy.decide(seen, policy.DEFAULTS, gone).explanation
    good = {"widen": FamilyEstimate(outcomes=9, survival=0.9, contribution=1.0)}
    assert policy.decide(seen, policy.DEFAULTS, good).changes
    span = observation([slot("span:a", 8, 7.0, kind=SlotKind.SPAN)], factor=4)
    branches = {"residual_bottleneck": FamilyEstimate(outcomes=9, survival=0.0, contribution=None)}
    assert not policy.decide(span, policy.DEFAULTS, branches).changes


def test_fixed_does_what_its_parameters_say_as_far_as_the_budget_goes() -> None:
    seen = observation([slot("runs/r/slots/a", 4, 1.0), slot("runs/r/slots/b", 4, 1.0)], factor=3, decisions_left=1)
    assert sizes(decide("fixed", seen, plan={"a": 2, "runs/r/slots/b": 1})) == {
        "runs/r/slots/a": 2,
        "runs/r/slots/b": 1,
    }
    assert "names nothing that fits" in decide("fixed", seen).explanation
    assert sizes(decide("fixed", seen, plan={"a": 99}))["runs/r/slots/a"] <= 4


def test_what_no_blueprint_fits_is_passed_over() -> None:
    seen = observation([slot("a", 4, 4.0)], candidates=[Candidate(WIDEN, "widen", frozenset())])
    assert not decide("uniform", seen).changes
    assert decide("uniform", seen).evidence[0].reason == "no widening blueprint fits it"


@pytest.mark.parametrize("algorithm", [*_CHOOSING, "fixed", "transplant"])
def test_a_budget_too_small_for_a_channel_is_said(algorithm: str) -> None:
    plan = decide(algorithm, observation([slot("a", 4, 4.0)], factor=1.000001))
    assert not plan.changes
    assert plan.explanation.startswith("No adaptation")
    assert "parameters" in decide(
        algorithm, observation([slot("a", 9, 9.0)], factor=3, budget_kind=BudgetKind.PARAMETERS, decisions_left=1)
    ).explanation or algorithm in ("fixed", "transplant")


def test_outside_the_window_and_without_budget_nothing_happens() -> None:
    seen = observation([slot("a", 4, 4.0, occupancy=Occupancy.EMBARGO, free_epoch=5)])
    assert closed(seen) is None
    assert "has not opened" in (closed(replace(seen, progress=0.01)) or "")
    assert "has closed" in (closed(replace(seen, progress=0.9)) or "")
    assert "budget is spent" in (closed(replace(seen, budget_current=seen.budget_limit)) or "")
    assert nothing(seen, "why").evidence[0].reason == "under embargo after a cull until epoch 5"


@pytest.mark.parametrize(
    ("algorithm", "parameters", "field"),
    [
        ("utilization", {"least_need": 2}, "parameters.least_need"),
        ("utilization", {"least_need": True}, "parameters.least_need"),
        ("utilization", {"measure": "mood"}, "parameters.measure"),
        ("random", {"concentration": "x"}, "parameters.concentration"),
        ("fixed", {"plan": 3}, "parameters.plan"),
        ("fixed", {"plan": {"a": 0.5}}, "parameters.plan.a"),
        ("permuted", {"least_need": 2}, "parameters.least_need"),
        ("utilization", {"branch_families": ["attention"]}, "parameters.branch_families"),
        ("transplant", {"plans": "a"}, "parameters.plans"),
        ("transplant", {"plans": [{}, 3]}, "parameters.plans[1]"),
        ("transplant", {"plans": [{"a": 0.5}]}, "parameters.plans[0].a"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(algorithm: str, parameters: dict[str, object], field: str) -> None:
    policy = ALGORITHMS[algorithm]
    with pytest.raises(EsperError) as caught:
        policy.check({**policy.DEFAULTS, **parameters})
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_defaults_are_sound_and_described(algorithm: str) -> None:
    policy = ALGORITHMS[algorithm]
    policy.check(policy.DEFAULTS)
    assert policy.DESCRIPTION


def test_learning_needs_enough_judged_outcomes_of_a_family() -> None:
    outcomes: list[dict[str, Any]] = [
        {"seed": "s0", "family": "widen", "state": "FOSSILIZED", "contribution": 2.0},
        {"seed": "s1", "family": "widen", "state": "CULLED", "contribution": None},
        {"seed": "s2", "family": "widen", "state": "CANCELLED", "contribution": None},
        {"seed": "s3", "family": "branch", "state": "ROLLED_BACK", "contribution": None},
    ]
    assert learn(outcomes, min_outcomes=2) == {"widen": FamilyEstimate(outcomes=2, survival=0.5, contribution=2.0)}
    assert learn(outcomes, min_outcomes=0)["branch"] == FamilyEstimate(outcomes=1, survival=0.0, contribution=None)
    resumed = [*outcomes, {**outcomes[1], "state": "FOSSILIZED", "contribution": 1.0}, {**outcomes[3], "family": ""}]
    again = learn(resumed, min_outcomes=1)
    assert again == {"widen": FamilyEstimate(outcomes=2, survival=1.0, contribution=1.5)}


def test_very_uneven_draws_still_spend() -> None:
    seen = observation([slot("a", 4, 4.0)], factor=4, decisions_left=1)
    assert all(sizes(decide("random", replace(seen, seed=n), concentration=0.01)) for n in range(2000))


def test_a_fixed_plan_larger_than_any_network_ends() -> None:
    seen = observation([slot("runs/r/slots/a", 4, 1.0)], factor=3, decisions_left=1)
    assert sizes(decide("fixed", seen, plan={"a": 10**15})) == {"runs/r/slots/a": 4}
    ALGORITHMS["fixed"].check({"plan": {"a": 2.0, "b": 1}})
    for size in (float("inf"), float("nan"), 1.5):
        with pytest.raises(EsperError):
            ALGORITHMS["fixed"].check({"plan": {"a": size}})


@pytest.mark.parametrize("seed", range(8))
def test_chance_spends_as_much_as_any_rule(seed: int) -> None:
    seen = observation([slot(name, 8) for name in "abcd"], factor=2.5, decisions_left=1, seed=seed)
    widths = {one.name: one.width + sizes(decide("random", seen)).get(one.name, 0) for one in seen.slots}
    for name, width in widths.items():
        more = cost_of(seen.cost_terms, {**widths, name: width + 1})
        assert width == 8 * seen.max_factor or more > seen.budget_limit, "nothing that could be bought is left"


def test_permuted_spends_the_measured_needs_on_other_layers() -> None:
    full, idle = slot("full", 4, 4.0), slot("idle", 4, 0.4)
    plans = [decide("permuted", replace(observation([full, idle]), seed=seed)) for seed in range(20)]
    assert {frozenset(sizes(plan)) for plan in plans} == {frozenset({"full"}), frozenset({"idle"})}
    evidence = {item.slot: item.need for item in plans[0].evidence if not item.chosen}
    assert evidence in ({"idle": 0.1}, {"full": 0.1})
    unknown = decide("permuted", observation([full, slot("unknown", 4)]))
    assert set(sizes(unknown)) == {"full"}
    assert {item.slot: item.need for item in unknown.evidence}["unknown"] is None


def test_transplant_repeats_the_decision_of_as_many_left() -> None:
    slots = [slot("runs/r/slots/a", 4, 1.0), slot("runs/r/slots/b", 4, 1.0)]
    plans: list[object] = [{"a": 1}, {"runs/r/slots/b": 2, "a": 1.0}]
    ALGORITHMS["transplant"].check({"plans": plans})
    first = observation(slots, factor=4, decisions_left=2)
    assert sizes(decide("transplant", first, plans=plans)) == {"runs/r/slots/a": 1}
    last = replace(first, decisions_left=1)
    assert sizes(decide("transplant", last, plans=plans)) == {"runs/r/slots/a": 1, "runs/r/slots/b": 2}
    assert not decide("transplant", replace(first, decisions_left=3), plans=plans).changes
    # A budget that ends early cuts all layers alike.
    tight = observation(slots, factor=2.0, decisions_left=1)
    cut = sizes(decide("transplant", tight, plans=[{"a": 4, "b": 4}]))
    assert sorted(cut.values()) in ([1, 1], [1, 2], [2, 2])

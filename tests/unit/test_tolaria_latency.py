"""The model of what a training step costs in time, against networks whose times are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from pydantic import ValidationError

from services.chassis.config.schema import BudgetConfig
from services.kasmina.model import CostTerm
from services.tolaria import budget
from services.tolaria.budget import Limit
from services.tolaria.errors import BudgetError
from services.tolaria.latency import LatencyModel, Probe, compare, fit

TERMS = [
    CostTerm(100.0, 9.0, ("a",)),
    CostTerm(50.0, 9.0, ("a", "b")),
    CostTerm(400.0, 5.0, ("b",)),
    CostTerm(70.0, 1.0),
]
WIDTHS = {"a": 8, "b": 12}


def probes(time_of: Callable[[Mapping[str, int]], float]) -> tuple[dict[str, Probe], Probe]:
    """What would be measured of networks that take ``time_of(widths)`` milliseconds."""
    host = time_of(WIDTHS)
    alone = {slot: Probe(host, time_of({**WIDTHS, slot: 2 * width}) - host) for slot, width in WIDTHS.items()}
    return alone, Probe(host, time_of({slot: 2 * width for slot, width in WIDTHS.items()}) - host)


def test_where_all_flops_cost_the_same_the_model_is_exact() -> None:
    def time_of(widths: Mapping[str, int]) -> float:
        a, b = widths["a"], widths["b"]
        return 2.0 + 1e-4 * (100 * a + 50 * a * b + 400 * b)

    model = fit(TERMS, WIDTHS, *probes(time_of))
    for widths in (WIDTHS, {"a": 11, "b": 12}, {"a": 8, "b": 30}, {"a": 16, "b": 24}):
        assert model.cost(TERMS, widths) == pytest.approx(time_of(widths))
    assert model.overhead == pytest.approx(2.0)
    assert model.of_terms(TERMS)[3] == 0.0, "what no width changes is in the overhead"


def test_a_layer_whose_flops_are_slow_is_dear() -> None:
    def time_of(widths: Mapping[str, int]) -> float:
        return 1.0 + 1e-3 * 100 * widths["a"] + 1e-5 * 400 * widths["b"]

    model = fit([TERMS[0], TERMS[2]], WIDTHS, *probes(time_of))
    assert model.cost([TERMS[0], TERMS[2]], {"a": 20, "b": 40}) == pytest.approx(time_of({"a": 20, "b": 40}))
    slow, fast = model.rates
    assert slow == pytest.approx(100 * fast)


def test_branches_are_priced_at_what_flops_cost_on_the_whole() -> None:
    model = fit(TERMS, WIDTHS, *probes(lambda widths: 1.0 + 0.1 * widths["a"] + 0.2 * widths["b"]))
    grown = [*TERMS, CostTerm(1000.0, 0.0)]
    assert model.cost(grown, WIDTHS) - model.cost(TERMS, WIDTHS) == pytest.approx(1000 * model.other_rate)
    assert model.other_rate > 0


def test_width_that_costs_nothing_measurable_is_free_and_never_negative() -> None:
    free = fit(TERMS, WIDTHS, {"a": Probe(3.0, -0.1), "b": Probe(3.0, 0.0)}, Probe(3.0, -0.2))
    assert free.cost(TERMS, {"a": 80, "b": 120}) == free.host == free.overhead == 3.0
    unsure = fit(TERMS, WIDTHS, {"a": Probe(3.0, -0.1), "b": Probe(3.0, 0.0)}, Probe(3.0, 2.0))
    assert unsure.cost(TERMS, {"a": 16, "b": 24}) == pytest.approx(5.0), "too little alone, measurable together"


def test_a_step_is_never_cheaper_than_nothing() -> None:
    # Twice the widths took ten times as long: more than FLOPs explain.
    model = fit(TERMS, WIDTHS, {"a": Probe(1.0, 4.0), "b": Probe(1.0, 4.0)}, Probe(1.0, 9.0))
    assert model.overhead == 0.0
    assert model.cost(TERMS, WIDTHS) == pytest.approx(1.0)


def test_without_a_slot_branches_cost_at_most_what_all_flops_cost() -> None:
    model = fit([CostTerm(500.0, 1.0)], {}, {}, Probe(2.0, 0.0))
    assert (model.host, model.overhead, model.other_rate) == (2.0, 2.0, 2.0 / 500)


def test_the_comparison_is_paired_alternating_and_bounded() -> None:
    now, order = [0.0], ""

    def step(name: str, seconds: float) -> Callable[[], None]:
        def take() -> None:
            nonlocal order
            order += name
            now[0] += seconds

        return take

    probe = compare(step("h", 0.001), step("w", 0.003), clock=lambda: now[0])
    assert [probe.host, probe.extra] == pytest.approx([1.0, 2.0])
    assert order.startswith("hhww" + "hwwh" * 3)
    assert order.count("h") == 2 + 25
    order = ""
    compare(step("h", 10.0), step("w", 30.0), clock=lambda: now[0])
    assert order.count("h") == 2 + 5, "slow steps are taken as rarely as a median allows"


def test_the_model_survives_the_journal() -> None:
    model = LatencyModel(1.0, 0.5, (0.1, 0.2), 0.3)
    assert LatencyModel.from_json({"host": 1.0, "overhead": 0.5, "rates": [0.1, 0.2], "other_rate": 0.3}) == model


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (BudgetConfig(flops=2.0), Limit("flops", 200.0)),
        (BudgetConfig(parameters=3.0), Limit("parameters", 30.0)),
        (BudgetConfig(latency=1.5), Limit("latency", 6.0)),
        (BudgetConfig(flops_absolute=150), Limit("flops", 150)),
        (BudgetConfig(parameters_absolute=10), Limit("parameters", 10)),
        (BudgetConfig(latency_ms=4.5), Limit("latency", 4.5)),
    ],
)
def test_limits_are_multiples_or_absolute(config: BudgetConfig, limit: Limit) -> None:
    assert budget.resolve(config, flops=100, parameters=10, latency=4.0) == limit


def test_a_limit_below_the_host_names_its_key_and_the_way_out() -> None:
    with pytest.raises(
        BudgetError, match=r"growth\.budget\.latency_ms: 3 ms per training step .* 4; set it higher"
    ) as told:
        budget.resolve(BudgetConfig(latency_ms=3), flops=1, parameters=1, latency=4.0)
    assert told.value.reason == "INVALID_FIELD"


@pytest.mark.parametrize("limits", [{}, {"flops": 2.0, "latency": 2.0}, {"flops_absolute": 9.0, "flops": 2.0}])
def test_exactly_one_limit(limits: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=r"set exactly one of flops, parameters, latency, flops_absolute") as told:
        BudgetConfig(**limits)
    assert all(name in str(told.value) for name in limits)


def test_limits_in_words() -> None:
    assert str(BudgetConfig(flops=2.5)) == "2.5 times the host's FLOPs"
    assert str(BudgetConfig(latency=1.2)) == "1.2 times the host's time per training step"
    assert str(BudgetConfig(parameters_absolute=12e6)) == "12,000,000 parameters"
    assert str(BudgetConfig(latency_ms=0.5)) == "0.5 ms per training step"

"""What a network is short of: the suggestion at equal FLOPs, the judgment of layers, and how it is told."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.blueprints.spec import SlotKind
from services.kasmina.model import CostTerm, HealthReport, SlotHealth, SlotInfo
from services.tamiyo.policies import utilization
from services.tolaria.charts import Share, share_bars
from services.tolaria.diagnosis import TRUST, Subject, assess, nothing, suggestion, verdict
from services.tolaria.diagnosis_report import plain_table, render, show
from services.tolaria.suggestion import Usage, flops_of, step_of, suggest
from tests.support.observations import chain, observation, slot


def row(*layers: tuple[str, int, float | None]) -> tuple[list[Usage], list[CostTerm]]:
    """Layers in a row, and what they cost."""
    usages = [Usage(*layer) for layer in layers]
    terms = chain([slot(name, width) for name, width, _ in layers])
    return usages, [CostTerm(term.coefficient, term.coefficient / 2, term.slots) for term in terms]


def one(_width: int) -> int:
    return 1


# ---- the rule ----------------------------------------------------------------------------------------------------


def test_a_starved_layer_gets_what_idle_ones_give_at_equal_flops() -> None:
    usages, terms = row(("a", 8, 5.0), ("b", 4, 3.9), ("c", 12, 3.0), ("d", 12, 6.0))
    widths = suggest(usages, terms, max_factor=2.0)
    assert widths["b"] > 4, "it uses nearly all of its width"
    assert widths["c"] < 12, "it uses a quarter"
    present = flops_of(terms, {usage.slot: usage.width for usage in usages})
    assert flops_of(terms, widths) <= present
    for usage in usages:
        wider = widths | {usage.slot: widths[usage.slot] + 1}
        assert flops_of(terms, wider) > present, "what is left over buys no channel"


def test_an_unmeasured_layer_keeps_its_width_and_none_goes_below_one() -> None:
    usages, terms = row(("a", 8, None), ("b", 1, 0.1), ("c", 6, 5.0))
    widths = suggest(usages, terms, max_factor=4.0)
    assert widths["a"] == 8
    assert min(widths.values()) >= 1
    nobody, terms = row(("a", 8, None), ("b", 3, None))
    assert suggest(nobody, terms, max_factor=2.0) == {"a": 8, "b": 3}


def test_a_layer_alone_keeps_its_width_and_equal_needs_change_nothing() -> None:
    usages, terms = row(("a", 7, 2.0))
    assert suggest(usages, terms, max_factor=2.0) == {"a": 7}
    usages, terms = row(("a", 8, 4.0), ("b", 8, 4.0), ("c", 8, 4.0))
    assert suggest(usages, terms, max_factor=2.0) == {"a": 8, "b": 8, "c": 8}


def test_no_width_changes_by_more_than_the_factor() -> None:
    usages, terms = row(("a", 9, 9.0), ("b", 90, 0.5), ("c", 9, 9.0))
    widths = suggest(usages, terms, max_factor=1.5)
    assert all(usage.width / 1.5 <= widths[usage.slot] <= usage.width * 1.5 for usage in usages)
    assert widths["b"] == 66, "as narrow as it may become in whole steps of 8; nothing is in less need"
    assert widths["a"] > 9


def test_wide_layers_change_in_steps_that_processors_like() -> None:
    assert [step_of(width) for width in (1, 15, 16, 31, 32, 63, 64, 4096)] == [1, 1, 2, 2, 4, 4, 8, 8]
    usages, terms = row(("a", 64, 60.0), ("b", 128, 30.0), ("c", 256, 200.0))
    widths = suggest(usages, terms, max_factor=2.0)
    assert widths["a"] > 64 > widths["b"] - 64
    assert all(width % 8 == 0 for width in widths.values())


@pytest.mark.parametrize(
    "ranks", [(5.0, 3.9, 3.0, 6.0), (1.0, 1.0, 1.0, 1.0), (7.9, 0.5, 11.0, 2.0), (2.0, 4.0, 6.0, 8.0)]
)
def test_tamiyo_would_plan_the_same(ranks: Sequence[float]) -> None:
    """From the narrowest widths, with today's FLOPs as its budget: the same rule, decided by the policy itself."""
    narrow = [slot(name, width, rank) for name, width, rank in zip("abcd", (4, 2, 6, 6), ranks, strict=True)]
    usages, terms = row(*((name, 2 * one.width, rank) for name, one, rank in zip("abcd", narrow, ranks, strict=True)))
    budget = flops_of(terms, {usage.slot: usage.width for usage in usages})
    asked = observation(narrow, budget_limit=budget, decisions_left=1, max_factor=4.0)
    plan = utilization.decide(asked, {**utilization.DEFAULTS, "least_need": 0.0}, {})
    planned = {evidence.slot: evidence.planned_width for evidence in plan.evidence}
    assert suggest(usages, terms, max_factor=2.0, step=one) == planned
    assert plan.changes, "there was something to plan"


# ---- the diagnosis -----------------------------------------------------------------------------------------------


def health(name: str, width: int, rank: float | None, participation: float | None = None) -> SlotHealth:
    unmeasured = rank is None
    return SlotHealth(
        slot=name,
        width=width,
        effective_rank=rank,
        participation_ratio=None if unmeasured else participation or rank,
        utilization=None if rank is None else rank / width,
        dead_ratio=None if unmeasured else 0.25,
        gradient_norm=None,
        samples=40,
        unmeasured_reason="40 images are too few for it" if unmeasured else "",
    )


def subject(*layers: SlotHealth, refused: dict[str, str] | None = None, **changes: Any) -> Subject:
    _, terms = row(*((layer.slot, layer.width, layer.effective_rank) for layer in layers)) if layers else ([], [])
    slots = [SlotInfo(h.slot, SlotKind.WIDTH, h.width, h.width, (h.slot, "twin"), ("norm",), ("next",)) for h in layers]
    fields: dict[str, Any] = {
        "epochs": 5,
        "validation_accuracy": 80.0,
        "chance": 10.0,
        "slots": [*slots, SlotInfo("span:x", SlotKind.SPAN, 4, 4)],
        "terms": terms,
        "refused": refused or {},
        "health": HealthReport(tuple(layers), 7.0, 40),
        "training_flops": 100.0,
        "measuring_flops": 10.0,
    }
    return Subject(**{**fields, **changes})


def diagnosed(*layers: SlotHealth, **changes: Any) -> dict[str, Any]:
    return {"status": "succeeded", "reason": "", **assess(subject(*layers, **changes), max_factor=2.0)}


STARVED = (health("a", 8, 4.0), health("b", 4, 3.9), health("c", 12, 3.0))


def test_layers_are_judged_and_the_tightest_is_named() -> None:
    found = diagnosed(*STARVED, refused={"head": "its channels are the model's output", "span:x": "not selected"})
    assert (found["tightest"], found["tightest_by_participation"]) == ("b", "b")
    assert [layer["judgment"] for layer in found["layers"]] == ["fits", "short", "idle"]
    assert found["layers"][0]["dead_units"] == 2
    assert found["layers"][0]["changes_with"] == ["twin", "norm"]
    assert found["refused"] == [{"layer": "head", "reason": "its channels are the model's output"}]
    assert found["flops"]["suggested"] <= found["flops"]["present"]
    assert found["parameters"]["present"] > 0
    assert found["cautions"] == []
    assert verdict(found) == "Layer b is the tightest: 98% of its width of 4 in use, then a with 50% of 8."
    assert suggestion(found).startswith("At equal FLOPs this rule would change ")
    assert "b (4 to " in suggestion(found)
    assert json.loads(json.dumps(found)) == found


def test_what_makes_the_figures_doubtful_is_said() -> None:
    early = diagnosed(*STARVED, validation_accuracy=18.9)
    assert "hardly begun to learn (18.9 % on the validation split, where guessing gives 10.0 %)" in early["cautions"][0]
    torn = diagnosed(health("a", 8, 6.0, 2.0), health("b", 8, 5.0, 4.0))
    assert torn["cautions"] == [
        "The two forms of the rank disagree: by the participation ratio b is the tightest, not a."
    ]
    roomy = diagnosed(health("a", 8, 2.0), health("b", 8, 1.0))
    assert "Even the tightest layer uses no more than 25% of its width" in roomy["cautions"][0]


def test_an_unmeasured_layer_is_null_and_keeps_its_width() -> None:
    found = diagnosed(health("a", 8, None), health("b", 8, 8.0))
    layer = found["layers"][0]
    assert {
        key: layer[key] for key in ("effective_rank", "participation", "dead_units", "utilization", "judgment")
    } == (dict.fromkeys(("effective_rank", "participation", "dead_units", "utilization", "judgment")))
    assert layer["suggested_width"] == 8
    assert found["cautions"] == ["Layers that were not measured keep their width in the suggestion."]
    assert suggestion(found) == "At equal FLOPs this rule would leave all widths as they are."
    assert verdict(found) == "Layer b is the tightest: 100% of its width of 8 in use."


@pytest.mark.parametrize(
    ("layers", "refused", "reason"),
    [
        ((), {"": "torch.fx cannot trace it"}, "torch.fx cannot trace it"),
        ((health("a", 8, None),), {}, "40 images are too few for it"),
        ((), {"head": "its channels are the model's output"}, "none of them has a width that could change"),
    ],
)
def test_a_network_without_a_measured_layer_says_why(
    layers: tuple[SlotHealth, ...], refused: dict[str, str], reason: str
) -> None:
    found = diagnosed(*layers, refused=refused)
    assert found["tightest"] is None
    assert found["cautions"] == []
    assert verdict(found) == f"No layer could be measured: {reason}."


def test_what_failed_has_the_same_fields() -> None:
    assert nothing().keys() | {"status", "reason"} == diagnosed(*STARVED).keys()


# ---- telling -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_and_a_drawn_table_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    found = diagnosed(*STARVED, health("new", 4, None), refused={"head": "fixed"}, epochs=1)
    plain, drawn = io.StringIO(), Terminal()
    show(found, plain)
    show(found, drawn)
    for text in (plain.getvalue(), drawn.getvalue()):
        for words in ("after 1 epoch without growth", "Layer b is the tightest", "short", "unmeasured", TRUST[0]):
            assert words in text
        assert "head has no width that could change: fixed" in text
        assert "new was not measured: 40 images are too few for it" in text
        assert "Careful: Layers that were not measured" in text
    assert "█" in drawn.getvalue()
    assert "█" not in plain.getvalue()
    table = plain_table(found)
    assert len(table) == 5
    assert table[0].split()[:3] == ["layer", "width", "in"]


def test_a_network_with_nothing_to_measure_has_no_table() -> None:
    found = diagnosed(refused={"": "not traced"}, epochs=0)
    plain, drawn = io.StringIO(), Terminal()
    show(found, plain)
    show(found, drawn)
    assert "as it was given: 80.00 % on the validation split" in plain.getvalue()
    assert "No layer could be measured: not traced." in drawn.getvalue()
    assert "FLOPs" not in plain.getvalue()
    assert len(plain.getvalue().splitlines()) == 2
    assert "effective rank" not in drawn.getvalue()


def test_the_report_shows_the_diagnosis(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: <b>\n", encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "validation_accuracy": 40.0}\n{"cut', encoding="utf-8")
    page = render(tmp_path, diagnosed(*STARVED, health("<new>", 4, None), validation_accuracy=11.0))
    assert "Layer b is the tightest" in page
    assert "&lt;new&gt;" in page
    assert "hardly begun" in page
    assert TRUST[0] in page
    assert "a: &lt;b&gt;" in page
    assert "<script" not in page
    (tmp_path / "metrics.jsonl").unlink()
    assert "not measured" in render(tmp_path, diagnosed(*STARVED))
    failed = render(tmp_path, {**nothing(), "status": "failed", "reason": "no <data>"})
    assert "No diagnosis" in failed
    assert "no &lt;data&gt;" in failed


def test_bars_have_their_figures_and_unmeasured_is_no_bar() -> None:
    drawn = share_bars([Share("x" * 40, 0.5, "fits"), Share("y", None, "unmeasured")], x_label="<share>")
    assert drawn.count("<rect") == 1
    assert "50% fits" in drawn
    assert "not measured" in drawn
    assert "..." + "x" * 21 in drawn
    assert "&lt;share&gt;" in drawn
    assert share_bars([], x_label="share") == '<p class="none">not measured</p>'

"""What a run says about growing: intervals that hold what they promise, and a verdict for every outcome."""

from __future__ import annotations

import random
from statistics import NormalDist
from typing import Any

import pytest

from services.tolaria.verdict import accuracy_interval, judge, paired_difference, shape

# ---- intervals ---------------------------------------------------------------------------------------------------


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    # 81 of 263, from Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
    low, high = accuracy_interval(100 * 81 / 263, 263)
    assert (round(low / 100, 4), round(high / 100, 4)) == (0.2553, 0.3662)
    assert accuracy_interval(100.0, 10)[1] == pytest.approx(100.0)
    assert accuracy_interval(0.0, 10)[0] == pytest.approx(0.0)
    assert accuracy_interval(0.0, 10)[1] > 0, "ten errors in a row prove little"
    with pytest.raises(ValueError, match="an image or more"):
        accuracy_interval(50.0, 0)


def test_a_difference_counts_the_images_that_only_one_got_right() -> None:
    first = [1.0] * 10 + [1.0] * 30 + [0.0] * 60
    second = [0.0] * 10 + [1.0] * 30 + [1.0] * 4 + [0.0] * 56
    found = paired_difference(first, second)
    assert found.points == pytest.approx(6.0)
    # Bonett & Price by their own formula.
    more, less, z = 11 / 102, 5 / 102, NormalDist().inv_cdf(0.975)
    reach = z * ((more + less - (more - less) ** 2) / 102) ** 0.5
    assert found.low == pytest.approx(100 * (more - less - reach))
    assert found.high == pytest.approx(100 * (more - less + reach))
    assert found.samples == 100
    turned = paired_difference(second, first)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_networks_that_agree_on_every_image_are_not_proven_equal() -> None:
    found = paired_difference([1.0] * 50, [1.0] * 50)
    assert found.points == 0.0
    assert found.low < 0 < found.high
    assert found.sign == 0


def test_shares_of_right_are_scores_too() -> None:
    found = paired_difference([0.75, 0.5, 1.0], [0.25, 0.5, 0.5])
    assert found.points == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="an image or more"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [])


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(400):
        pairs = [draw.choices([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], (60, 12, 5, 23))[0] for _ in range(150)]
        found = paired_difference([one for one, _ in pairs], [other for _, other in pairs])
        held += found.low <= 7.0 <= found.high
    assert 0.92 <= held / 400 <= 0.98


# ---- the verdict -------------------------------------------------------------------------------------------------

BETTER = {"points": 5.0, "low": 3.0, "high": 7.0, "confidence": 0.95, "samples": 10_000}
SAME = {**BETTER, "points": -0.2, "low": -0.9, "high": 0.5}
UNSURE = {**BETTER, "points": -1.3, "low": -3.6, "high": 0.9}
WORSE = {**BETTER, "points": -5.0, "low": -7.0, "high": -3.0}


def run(spent: dict[str, float] | None = None, **comparisons: Any) -> dict[str, Any]:
    """A summary; ``spent`` are FLOPs by arm, 100 where nothing is said."""
    arms = {
        name: {"training_flops": (spent or {}).get(name, 100.0) - 1, "growth_flops": 1.0}
        for name in ("grown", *comparisons)
    }
    return {
        "accuracy": {"grown": 80.0},
        "arms": arms,
        "comparisons": comparisons,
        "adaptations": {"started": 2, "fossilized": 1, "culled": 1},
    }


@pytest.mark.parametrize(
    ("summary", "choice", "words"),
    [
        ({}, "no_result", "the run did not come to its end."),
        ({"accuracy": {"grown": None}, "reason": "the disk is full."}, "no_result", "the disk is full."),
        (run(), "not_compared", "set compare to"),
        (run(uniform=BETTER), "not_compared", "set compare to"),
        (run(host=BETTER), "grow", "add bigger to compare"),
        (run(host=BETTER, bigger=BETTER), "grow", "It is better than its own final shape trained from scratch: +5.00"),
        (run(bigger=BETTER), "grow", "at equal FLOPs"),
        (run({"bigger": 125.0}, host=BETTER, bigger=SAME), "grow", "It is at most 0.90 points worse than its own"),
        (run({"bigger": 125.0}, host=BETTER, bigger=SAME), "grow", "-0.20 [-0.90, +0.50], that at 125% of its FLOPs."),
        (
            run({"bigger": 125.0}, host=BETTER, bigger=UNSURE),
            "static",
            "It may be up to 3.60 points worse than its own",
        ),
        (run({"bigger": 101.0}, host=BETTER, bigger=SAME), "static", "that at equal FLOPs."),
        (run({"bigger": 60.0}, host=BETTER, bigger=SAME), "static", "that at 60% of its FLOPs."),
        (run(bigger=SAME), "static", "worse than its own final shape"),
        (run(host=BETTER, bigger=WORSE), "static", "It is worse than its own final shape"),
        (run(host=SAME, bigger=WORSE), "static", "is not shown to be better than the same host"),
        (run({"host": 40.0}, host=BETTER, bigger=WORSE), "static", "the host at 40% of its FLOPs."),
        (run(host=SAME, bigger=SAME), "no_gain", "is not shown to be better than the same host"),
        (run(host=SAME, bigger=BETTER), "no_gain", "is not shown to be better than the same host"),
        (run(host=WORSE), "no_gain", "The grown network is worse than the same host"),
        ({**run(host=BETTER), "start_accuracy": 75.0}, "grow", "better than the trained host trained on"),
        ({**run(host=BETTER), "adaptations": {"started": 1, "fossilized": 0}}, "no_gain", "No seed was kept"),
        ({**run(), "adaptations": {"started": 0, "fossilized": 0}}, "not_compared", "Nothing was grown"),
    ],
)
def test_every_outcome_has_its_verdict(summary: dict[str, Any], choice: str, words: str) -> None:
    found = judge(summary)
    assert found.choice == choice
    assert words in " ".join(found.reasons)
    assert len(found.reasons) <= 2


def test_a_single_seed_is_said_to_be_one() -> None:
    (note,) = judge(run(host=BETTER)).notes
    assert "One training run of each" in note
    assert "10,000 test images, not over seeds" in note
    assert judge(run()).notes == ()


@pytest.mark.parametrize(
    ("uniform", "words"),
    [
        (BETTER, "Choosing where to grow was better than growing all layers alike: +5.00"),
        (SAME, "Choosing where to grow is not shown to be better"),
        (WORSE, "try growth.policy: uniform"),
    ],
)
def test_whether_choosing_was_worth_anything_is_said_apart(uniform: dict[str, Any], words: str) -> None:
    found = judge(run(host=BETTER, uniform=uniform))
    assert found.choice == "grow"
    assert words in found.notes[0]


def test_the_shape_is_what_became_wider_and_what_was_added() -> None:
    def change(path: str, operation: str, before: list[int], after: list[int]) -> dict[str, Any]:
        return {"path": path, "operation": operation, "before_shape": before, "after_shape": after}

    changes = [
        change("conv1", "conv2d", [4, 1, 3, 3], [6, 1, 3, 3]),
        change("norm1", "batch_norm2d", [4], [6]),
        change("depthwise", "depthwise_conv2d", [4, 1, 3, 3], [6, 1, 3, 3]),
        change("head", "linear", [10, 4], [10, 6]),
        change("conv1", "branch:residual_bottleneck", [], [6, 2, 6]),
    ]
    assert shape({"changes": changes}) == ["conv1 4 to 6", "residual_bottleneck at conv1"]
    assert shape({}) == []

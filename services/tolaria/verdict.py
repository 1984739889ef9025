"""What a run says about growing: grow, use a static shape, or no gain shown; with intervals, so as not to overclaim.

Torch-free: the launcher and the report read it out of a run's summary, and it needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final, Literal

from services.tolaria.progress import GROWN

CONFIDENCE: Final = 0.95
#: Costs that differ by less are called equal.
_EQUAL_COST: Final = 0.02
#: Points that the grown network may be worse than its shape from scratch, surely, and still be the cheaper choice.
_MARGIN: Final = 1.0

Choice = Literal["grow", "static", "no_gain", "not_compared", "no_result"]
_TITLES: Final[Mapping[Choice, str]] = {
    "grow": "Grow",
    "static": "Use this static shape",
    "no_gain": "No gain shown",
    "not_compared": "Not compared",
    "no_result": "No result",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better the first of two networks is on the same images, in points of accuracy.

    Attributes:
        points: Accuracy of the first minus that of the second.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        confidence: Of the interval, 0..1.
        samples: Images behind it.
    """

    points: float
    low: float
    high: float
    confidence: float
    samples: int

    @property
    def sign(self) -> int:
        """1 if the first is shown to be better, -1 if the second is, 0 if neither is."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return f"{self.points:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, why, and how far to trust it.

    Attributes:
        choice: The verdict in one word, for programs.
        title: The same for people.
        reasons: At most two sentences.
        notes: What else is worth knowing, and what the figures do not show.
    """

    choice: Choice
    title: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


def accuracy_interval(accuracy: float, samples: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of an accuracy (percent) on ``samples`` images, in percent (Wilson, 1927).

    For scores between right and wrong it is wider than need be. Raises ValueError without images.
    """
    if samples < 1:
        raise ValueError("an interval needs an image or more")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = accuracy / 100, z * z / samples
    middle = (share + weight / 2) / (1 + weight)
    reach = z * (share * (1 - share) / samples + weight / (4 * samples)) ** 0.5 / (1 + weight)
    return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Compare two networks by their scores, 0 to 1, on the same images.

    The adjusted Wald interval: one difference of +1 and one of -1 are added to those measured, so that it never has
    width zero (Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", 2012). Raises ValueError without images, or for sequences of two lengths.
    """
    if not first:
        raise ValueError("a difference needs an image or more")
    differences = [one - other for one, other in zip(first, second, strict=True)]
    samples, total = len(differences), math.fsum(differences)
    middle = total / (samples + 2)
    spread = (math.fsum(value * value for value in differences) + 2) / (samples + 2) - middle**2
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * (spread / (samples + 2)) ** 0.5
    low, high = 100 * max(-1.0, middle - reach), 100 * min(1.0, middle + reach)
    return Difference(100 * total / samples, low, high, confidence, samples)


def judge(summary: Mapping[str, Any]) -> Verdict:
    """The verdict of a run, from its summary."""
    if (summary.get("accuracy") or {}).get(GROWN) is None:
        return _verdict("no_result", _sentence(summary.get("reason") or "the run did not come to its end"))
    arms: Mapping[str, Mapping[str, Any]] = summary.get("arms") or {}
    found = {name: Difference(**content) for name, content in (summary.get("comparisons") or {}).items()}
    costs = {name: _share_of_cost(arms[name], arms[GROWN]) for name in found}
    host, bigger = found.get("host"), found.get("bigger")
    notes = _notes(found)
    adaptations = summary.get("adaptations") or {}
    if adaptations.get("started") == 0:
        return _verdict("not_compared", "Nothing was grown: growth was off, or no layer was in need.", notes=notes)
    if adaptations.get("fossilized") == 0:
        return _verdict("no_gain", "No seed was kept: the network is the host it began as.", notes=notes)
    if host is None and bigger is None:
        reason = (
            "No host and no final shape from scratch was trained beside it: set compare to [host, bigger] for that."
        )
        return _verdict("not_compared", reason, notes=notes)
    reasons = []
    if host is not None:
        reasons.append(_against_host(host, costs["host"], trained=summary.get("start_accuracy") is not None))
    if bigger is not None:
        reasons.append(_against_bigger(bigger, costs["bigger"]))
    choice = _choose(host, bigger, costs.get("bigger", 1.0))
    if choice == "grow" and bigger is None:
        reasons.append("Whether its final shape is as good from scratch was not asked: add bigger to compare.")
    return _verdict(choice, *reasons, notes=notes)


def shape(summary: Mapping[str, Any]) -> list[str]:
    """The final shape in words: layers that became wider, then branches that were added. Empty if nothing was."""
    words = []
    for change in summary.get("changes") or []:
        before, after, operation = change["before_shape"], change["after_shape"], str(change["operation"])
        if operation.startswith("branch:"):
            words.append(f"{operation.removeprefix('branch:')} at {change['path']}")
        elif len(after) > 1 and before[0] != after[0] and not operation.startswith("depthwise"):
            words.append(f"{change['path']} {before[0]} to {after[0]}")
    return words


def spent(arm: Mapping[str, Any]) -> float:
    """FLOPs of an arm's training and growth: what arms at equal FLOPs have in common."""
    return float(arm["training_flops"] + arm["growth_flops"])


def _verdict(choice: Choice, *reasons: str, notes: tuple[str, ...] = ()) -> Verdict:
    return Verdict(choice, _TITLES[choice], reasons, notes)


def _choose(host: Difference | None, bigger: Difference | None, cost_of_bigger: float) -> Choice:
    """``cost_of_bigger`` is its share of what the grown network cost."""
    if bigger is not None and bigger.sign < 0:
        return "static"
    if host is not None and host.sign <= 0:
        return "no_gain"
    if bigger is None or bigger.sign > 0:
        return "grow"
    # None is shown to be better. That is no proof that they are equal: growing has to be cheaper, and surely not worse
    # by more than the margin; else the simpler one.
    return "grow" if cost_of_bigger > 1 + _EQUAL_COST and bigger.low > -_MARGIN else "static"


def _share_of_cost(arm: Mapping[str, Any], grown: Mapping[str, Any]) -> float:
    """What an arm spent, training and growth, as a share of what the grown network did."""
    return spent(arm) / spent(grown)


def _against_host(difference: Difference, cost: float, *, trained: bool) -> str:
    other = "the trained host trained on" if trained else "the same host without growth"
    match difference.sign:
        case 1:
            return f"The grown network is better than {other}: {difference} points, the host {_at(cost)}."
        case -1:
            return f"The grown network is worse than {other}: {difference} points, the host {_at(cost)}."
        case _:
            return f"The grown network is not shown to be better than {other}: {difference} points."


def _against_bigger(difference: Difference, cost: float) -> str:
    other = "its own final shape trained from scratch"
    match difference.sign:
        case 1:
            return f"It is better than {other}: {difference} points, that {_at(cost)}."
        case -1:
            return f"It is worse than {other}: {difference} points, that {_at(cost)}."
        case _ if difference.low > -_MARGIN:
            return f"It is at most {-difference.low:.2f} points worse than {other}: {difference}, that {_at(cost)}."
        case _:
            return f"It may be up to {-difference.low:.2f} points worse than {other}: {difference}, that {_at(cost)}."


def _at(cost: float) -> str:
    if abs(cost - 1) <= _EQUAL_COST:
        return "at equal FLOPs"
    return f"at {cost:.0%} of its FLOPs"


def _notes(found: Mapping[str, Difference]) -> tuple[str, ...]:
    notes = []
    if (uniform := found.get("uniform")) is not None:
        notes.append(_against_uniform(uniform))
    if found:
        images = next(iter(found.values())).samples
        notes.append(
            f"One training run of each: the intervals are over {images:,} test images, not over seeds. "
            "Try other values of run.seed before you trust a small difference."
        )
    return tuple(notes)


def _against_uniform(difference: Difference) -> str:
    match difference.sign:
        case 1:
            return f"Choosing where to grow was better than growing all layers alike: {difference} points."
        case -1:
            return f"Growing all layers alike was better ({difference} points): try growth.policy: uniform."
        case _:
            return (
                f"Choosing where to grow is not shown to be better than growing all layers alike: {difference} points."
            )


def _sentence(text: Any) -> str:
    words = str(text)
    return words if words.endswith(".") else words + "."

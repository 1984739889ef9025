"""From finished runs to the JSON: figures by arm, and the contrasts with their intervals and tests. Torch-free.

Everything is paired by seed. One contrast over several entries is the mean of the entries' mean differences; its
standard error joins theirs, with the degrees of freedom of Welch and Satterthwaite. Intervals and tests are Student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from scipy import special  # type: ignore[import-untyped]  # scipy ships no types

from tests.benchmarks.growth.arms import ARMS, Record
from tests.benchmarks.growth.protocol import TRAINED, Contrast, Protocol

FIGURES: Final = (
    "validation_accuracy",
    "test_accuracy",
    "training_flops",
    "growth_flops",
    "parameters",
    "cpu_seconds",
    "wall_seconds",
    "latency_ms",
)


class DishonestRunsError(ValueError):
    """Runs that must not be compared: not paired, not equal in cost, or chosen by what must not choose."""


def check(protocol: Protocol, finished: Mapping[str, Record]) -> None:
    """Refuse finished runs that break the rules of comparison. Raises DishonestRunsError naming the runs."""
    for entry, described in protocol.entries.items():
        for seed in {run["seed"] for run in finished.values() if run["entry"] == entry}:
            arms = {run["arm"]: run for run in finished.values() if (run["entry"], run["seed"]) == (entry, seed)}
            _check_pairing(f"{entry}, seed {seed}", arms)
            in_flops = described.growth.target_parameters is None
            _check_costs(f"{entry}, seed {seed}", arms, protocol.tolerance, in_flops=in_flops)
            if "sweep" in arms:
                _check_sweep(f"{entry}, seed {seed}", arms["sweep"])
            if {"off", "host"} <= arms.keys() and arms["off"]["weights"] != arms["host"]["weights"]:
                raise DishonestRunsError(f"{entry}, seed {seed}: the platform with its controller off changed the host")


def _check_pairing(where: str, arms: Mapping[str, Record]) -> None:
    """All arms of a seed saw the same batches, as long as they lasted."""
    longest = max(arms.values(), key=lambda run: len(run["batches"]))
    for arm, run in arms.items():
        if run["batches"] != longest["batches"][: len(run["batches"])]:
            raise DishonestRunsError(f"{where}: {arm} was trained on other batches than {longest['arm']}: no pair")


def _check_costs(where: str, arms: Mapping[str, Record], tolerance: float, *, in_flops: bool) -> None:
    """Arms that follow another in FLOPs spent alike, growth's included; rules that plan under one budget trained alike.

    What a rule looks at and judges trains nothing, and differs with the number of layers it chooses: it is billed and
    shown. Under a budget of parameters rules end with as many of them.
    """
    for arm, run in arms.items():
        followed = arms.get(_measure_of(arm) or "")
        if followed is None:
            continue
        if ARMS[arm].kind != "grown":
            what, share = "FLOPs", _spent(run) / _spent(followed)
        elif in_flops:
            what, share = "training FLOPs", run["training_flops"] / followed["training_flops"]
        else:
            what, share = "parameters", run["parameters"] / followed["parameters"]
        # Whole steps: a short run cannot come nearer than one of them.
        if abs(share - 1) > tolerance + 1 / run["steps"]:
            raise DishonestRunsError(
                f"{where}: {arm} spent {share:.3f} of the {what} of {followed['arm']}, allowed are {tolerance:.0%}"
            )


def _measure_of(name: str) -> str | None:
    """The arm whose spending is that of the arm ``name``, too; None for an arm of any cost."""
    arm = ARMS[name]
    if arm.kind == "grown" and arm.policy is not None:
        return "grown" if arm.trained else "tamiyo"
    return arm.follows if arm.length == "flops" or arm.kind == "sweep" else None


def _spent(run: Record) -> float:
    flops: float = run["training_flops"] + run["growth_flops"]
    return flops


def _check_sweep(where: str, run: Record) -> None:
    accuracies = [shape["validation_accuracy"] for shape in run["sweep"]]
    if run["chosen"] != accuracies.index(max(accuracies)):
        raise DishonestRunsError(f"{where}: the sweep kept shape {run['chosen']}, which validation does not say")
    if run["validation_accuracy"] != accuracies[run["chosen"]]:
        raise DishonestRunsError(f"{where}: the sweep's network is not the one it chose")


def result(protocol: Protocol, finished: Mapping[str, Record], commit: str | None) -> dict[str, Any]:
    """The JSON of issue 5, with ``contrasts`` beside it. Runs that are missing are absent; unmeasured is null.

    Raises DishonestRunsError.
    """
    check(protocol, finished)
    tables = {name: {"arms": _arms(protocol, name, finished)} for name in protocol.entries}
    body: dict[str, Any] = {"hosts": tables}
    if TRAINED in tables:
        body = {"trained": tables.pop(TRAINED), "budgets": tables}
    described = {"hash": protocol.hash, "commit": commit, **protocol.content()}
    return {"protocol": described, **body, "contrasts": contrasts(protocol, tables)}


def _arms(protocol: Protocol, entry: str, finished: Mapping[str, Record]) -> dict[str, Any]:
    made = {}
    for arm in protocol.entries[entry].arms:
        runs = sorted(
            (run for run in finished.values() if (run["entry"], run["arm"]) == (entry, arm)),
            key=lambda run: run["seed"],
        )
        if runs:
            made[arm] = {key: [run[key] for run in runs] for key in ("seed", *FIGURES)}
            made[arm]["widths"] = [run["widths"] for run in runs]
    return made


# ---- contrasts ---------------------------------------------------------------------------------------------------


def differences(tables: Mapping[str, Any], entry: str, first: str, second: str) -> dict[int, float]:
    """By seed, where both arms are measured: ``first`` minus ``second``, points of test accuracy."""
    arms = tables.get(entry, {}).get("arms", {})

    def by_seed(arm: str) -> dict[int, float]:
        found = arms.get(arm, {"seed": [], "test_accuracy": []})
        pairs = zip(found["seed"], found["test_accuracy"], strict=True)
        return {seed: value for seed, value in pairs if value is not None}

    ours, theirs = by_seed(first), by_seed(second)
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def compare(samples: Sequence[Sequence[float]], *, margin: float | None, confidence: float) -> dict[str, Any]:
    """The mean of the samples' means with its interval and the p value of its test.

    Without a ``margin`` the test is two-sided against 0, with one it is one-sided against ``-margin``. A sample of
    fewer than two has no spread: everything but the mean is None.
    """
    means = [statistics.fmean(sample) for sample in samples]
    mean = statistics.fmean(means)
    nothing = {"mean": mean, "interval": None, "p": None, "holds": None}
    if any(len(sample) < 2 for sample in samples):
        return nothing
    parts = [statistics.variance(sample) / len(sample) / len(samples) ** 2 for sample in samples]
    error = math.sqrt(math.fsum(parts))
    if error == 0:
        return {**nothing, "interval": [mean, mean]}
    freedom = error**4 / math.fsum(part**2 / (len(sample) - 1) for part, sample in zip(parts, samples, strict=True))
    reach = float(special.stdtrit(freedom, 0.5 + confidence / 2)) * error
    above = float(special.stdtr(freedom, -(mean + (margin or 0.0)) / error))
    p = above if margin is not None else 2 * min(above, 1 - above)
    holds = p < 1 - confidence and mean + (margin or 0.0) > 0
    return {"mean": mean, "interval": [mean - reach, mean + reach], "p": p, "holds": holds}


def contrasts(protocol: Protocol, tables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every contrast of the protocol, with its verdict only when all of its pairs are there.

    ``holds`` is after Holm's correction of the secondary ones; of the primary ones, too, if there are more than two.
    """
    made = [_contrast(one, protocol, tables) for one in protocol.contrasts]
    for primary in (True, False):
        family = [one for one in made if one["primary"] is primary and one["p"] is not None]
        if primary and sum(one.primary for one in protocol.contrasts) <= 2:
            continue
        for one, corrected in zip(family, holm([one["p"] for one in family]), strict=True):
            one["p_corrected"] = corrected
            one["holds"] = corrected < 1 - protocol.confidence and one["mean"] + (one["margin"] or 0.0) > 0
    for one in made:
        # Whoever may stop when it looks good finds what is not there.
        if one["pairs"] < one["planned"]:
            one["holds"] = None
    return made


def _contrast(one: Contrast, protocol: Protocol, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Against several arms: the smallest difference, and the largest p value (an intersection-union test).

    The interval is that of the smallest difference, whichever arm it is to: from the lowest of the lower ends to the
    lowest of the upper ends. ``against`` has every arm's own.
    """
    against: dict[str, dict[str, Any]] = {}
    seeds = 0
    for second in one.second:
        samples = [list(differences(tables, entry, one.first, second).values()) for entry in one.entries]
        if all(samples):
            against[second] = compare(samples, margin=one.margin, confidence=protocol.confidence)
            seeds = sum(len(sample) for sample in samples)
    described = {
        "name": one.name,
        "first": one.first,
        "second": list(one.second),
        "entries": list(one.entries),
        "primary": one.primary,
        "margin": one.margin,
        "aim": one.aim,
        "pairs": seeds,
        "planned": sum(len(protocol.entries[entry].seeds) for entry in one.entries),
        "against": against,
        "p_corrected": None,
    }
    if len(against) < len(one.second):
        return {**described, "mean": None, "interval": None, "p": None, "holds": None}
    mean = min(float(found["mean"]) for found in against.values())
    intervals = [found["interval"] for found in against.values()]
    interval = None if None in intervals else [min(low for low, _ in intervals), min(high for _, high in intervals)]
    ps = [found["p"] for found in against.values()]
    worst = None if any(p is None for p in ps) else max(ps)
    holds = None if worst is None else all(bool(found["holds"]) for found in against.values())
    return {**described, "mean": mean, "interval": interval, "p": worst, "holds": holds}


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm, 1979), in the order given."""
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


# ---- words -------------------------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> list[str]:
    """A table for the terminal: accuracies by arm, then the contrasts."""
    made = []
    for name, table in result.get("hosts", result.get("budgets", {})).items():
        for arm, found in table["arms"].items():
            validation, test = (spread(found[key]) for key in ("validation_accuracy", "test_accuracy"))
            made.append(f"{name:18} {arm:20} seeds {len(found['seed']):2}  validation {validation:14} test {test}")
    for one in result["contrasts"]:
        made.append(f"{one['name']}: {verdict(one)}")
        made += [f"    against {arm}: {difference(found)}" for arm, found in parts(one).items()]
    return made


def parts(one: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The arms that a contrast with the best of several is made of, as far as they are measured; else nothing."""
    return one["against"] if len(one["second"]) > 1 else {}


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds; what is not measured is said."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "not measured"
    if len(measured) == 1:
        return f"{measured[0]:.2f}"
    return f"{statistics.fmean(measured):.2f} ± {statistics.stdev(measured):.2f}"


def difference(found: Mapping[str, Any]) -> str:
    """A mean difference with its interval."""
    text = f"{found['mean']:+.2f} points"
    return text if found["interval"] is None else f"{text} [{found['interval'][0]:+.2f}, {found['interval'][1]:+.2f}]"


def verdict(one: Mapping[str, Any]) -> str:
    """A contrast in words."""
    if one["mean"] is None:
        return "not measured"
    text = difference(one)
    claim = "not worse by more than " + f"{one['margin']:g}" if one["margin"] is not None else "better"
    if one["holds"] is None:
        missing = one["planned"] - one["pairs"]
        return f"{text}; no verdict: " + (f"{missing} pairs are missing" if missing > 0 else "too few pairs to say")
    return f"{text}; {claim}: {'yes' if one['holds'] else 'not shown'}"

"""What a network is short of: how much of its width each layer uses, and the widths the same FLOPs could buy instead.

Torch-free: figures in, one JSON object out (``diagnosis.json``). What was not measured is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.blueprints.spec import SlotKind
from services.kasmina.model import SPAN_PREFIX, CostTerm, HealthReport, SlotHealth, SlotInfo
from services.tolaria.suggestion import Usage, flops_of, parameters_of, suggest

DIAGNOSIS_FILE: Final = "diagnosis.json"
#: A suggestion that changes a width by less than this factor is within what another seed would change: the layer fits.
_NOTABLE: Final = 1.2
#: Below this share of the way from chance to a perfect score, a network has hardly begun to learn.
_LEARNED: Final = 0.1
#: If the tightest layer uses less of its width than this, no layer is short.
_ROOMY: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is diagnosed, measured and counted.

    Attributes:
        epochs: Epochs it was trained for before; 0: it came trained.
        validation_accuracy: Percent.
        chance: Score of guessing, percent.
        slots: Where it could change.
        terms: What it costs as a function of its widths.
        refused: Module path of what cannot change, with the reason.
        health: How the layers use their widths.
        training_flops: FLOPs of the training before.
        measuring_flops: FLOPs of the validation and of the measurement.
    """

    epochs: int
    validation_accuracy: float
    chance: float
    slots: Sequence[SlotInfo]
    terms: Sequence[CostTerm]
    refused: Mapping[str, str]
    health: HealthReport
    training_flops: float
    measuring_flops: float


def assess(subject: Subject, *, max_factor: float) -> dict[str, Any]:
    """The diagnosis. ``max_factor``: as in :func:`services.tolaria.suggestion.suggest`."""
    slots = {slot.name: slot for slot in subject.slots if slot.kind is SlotKind.WIDTH}
    found = [health for health in subject.health.slots if health.slot in slots]
    present = {health.slot: health.width for health in found}
    usages = [Usage(health.slot, health.width, health.effective_rank) for health in found]
    widths = suggest(usages, subject.terms, max_factor=max_factor)
    layers = [_layer(health, slots[health.slot], widths[health.slot]) for health in found]
    diagnosis = {
        "epochs": subject.epochs,
        "validation_accuracy": subject.validation_accuracy,
        "samples": subject.health.samples,
        "tightest": _tightest(layers, "utilization"),
        "tightest_by_participation": _tightest(layers, "participation"),
        "layers": layers,
        "refused": [
            {"layer": path, "reason": reason}
            for path, reason in subject.refused.items()
            if not path.startswith(SPAN_PREFIX)  # where branches go has no width
        ],
        "flops": {
            "present": round(flops_of(subject.terms, present)),
            "suggested": round(flops_of(subject.terms, widths)),
        },
        "parameters": {
            "present": round(parameters_of(subject.terms, present)),
            "suggested": round(parameters_of(subject.terms, widths)),
        },
        "cost": {"training_flops": subject.training_flops, "measuring_flops": subject.measuring_flops},
    }
    return {**diagnosis, "cautions": cautions(diagnosis, subject.chance)}


def nothing() -> dict[str, Any]:
    """The fields of a diagnosis that did not come about."""
    pair = {"present": None, "suggested": None}
    return {
        "epochs": None,
        "validation_accuracy": None,
        "samples": None,
        "tightest": None,
        "tightest_by_participation": None,
        "layers": [],
        "refused": [],
        "flops": dict(pair),
        "parameters": dict(pair),
        "cost": {"training_flops": None, "measuring_flops": None},
        "cautions": [],
    }


def _layer(health: SlotHealth, slot: SlotInfo, suggested: int) -> dict[str, Any]:
    dead, ratio = health.dead_ratio, health.participation_ratio
    return {
        "layer": health.slot,
        "changes_with": [*slot.writers[1:], *slot.followers],
        "read_by": list(slot.readers),
        "width": health.width,
        "effective_rank": health.effective_rank,
        "participation_ratio": ratio,
        "utilization": health.utilization,
        "participation": None if ratio is None else ratio / health.width,
        "dead_units": None if dead is None else round(dead * health.width),
        "gradient_norm": health.gradient_norm,
        "samples": health.samples,
        "unmeasured_reason": health.unmeasured_reason,
        "judgment": None if health.effective_rank is None else _judgment(health.width, suggested),
        "suggested_width": suggested,
    }


def _judgment(width: int, suggested: int) -> str:
    """``short``: others should give it channels; ``idle``: it could give some; ``fits``: neither, notably."""
    if suggested >= width * _NOTABLE:
        return "short"
    return "idle" if suggested * _NOTABLE <= width else "fits"


def by_need(layers: Sequence[Mapping[str, Any]], measure: str = "utilization") -> list[Mapping[str, Any]]:
    """The measured layers, the tightest first; ``measure`` is "utilization" or "participation"."""
    return sorted((one for one in layers if one[measure] is not None), key=lambda one: (-one[measure], one["layer"]))


def _tightest(layers: Sequence[Mapping[str, Any]], measure: str) -> str | None:
    return next((str(layer["layer"]) for layer in by_need(layers, measure)), None)


def cautions(diagnosis: Mapping[str, Any], chance: float) -> list[str]:
    """What in these very figures is a reason to trust them less; ``chance`` is the score of guessing, percent."""
    found = []
    accuracy, epochs = diagnosis["validation_accuracy"], diagnosis["epochs"]
    if accuracy < chance + _LEARNED * (100.0 - chance):
        found.append(
            f"It has hardly begun to learn ({accuracy:.1f} % on the validation split, where guessing gives "
            f"{chance:.1f} %): its ranks say little. Raise diagnose.epochs (now {epochs}) or the learning rate."
        )
    tightest, other = diagnosis["tightest"], diagnosis["tightest_by_participation"]
    if tightest != other:
        found.append(
            f"The two forms of the rank disagree: by the participation ratio {other} is the tightest, not {tightest}."
        )
    needs = by_need(diagnosis["layers"])
    if needs and needs[0]["utilization"] < _ROOMY:
        found.append(
            f"Even the tightest layer uses no more than {needs[0]['utilization']:.0%} of its width: "
            "as far as this measure sees, width is not what it is short of."
        )
    if needs and len(needs) < len(diagnosis["layers"]):
        found.append("Layers that were not measured keep their width in the suggestion.")
    return found


#: What the judgments of layers mean.
LEGEND: Final = "short, idle: at equal FLOPs this rule changes the width by a fifth or more; fits: by less."
#: What is known of this rule by measurement, and what is not.
TRUST: Final = (
    "This is a suggestion that was not tried: no network of these widths was trained.",
    (
        "On small networks on CIFAR-10, growing where this measure pointed came out at or near the best of the rules "
        "tried, on a balanced host and on one with a starved layer. That measuring beats widening all layers alike, or "
        "the narrowest first, is not shown; hosts where a narrow layer is not in need decide that, and nobody has run "
        "them."
    ),
    "A layer behind a narrow one can look idle because it is starved: widen the tightest first, then diagnose again.",
)


def verdict(diagnosis: Mapping[str, Any]) -> str:
    """The tightest layer and the one after it, in a sentence."""
    needs = by_need(diagnosis["layers"])
    if not needs:
        reasons = [str(item["reason"]) for item in diagnosis["refused"] if not item["layer"]]
        reasons += [str(layer["unmeasured_reason"]) for layer in diagnosis["layers"]]
        return f"No layer could be measured: {reasons[0] if reasons else 'none of them has a width that could change'}."
    first = needs[0]
    told = f"Layer {first['layer']} is the tightest: {first['utilization']:.0%} of its width of {first['width']} in use"
    if len(needs) > 1:
        told += f", then {needs[1]['layer']} with {needs[1]['utilization']:.0%} of {needs[1]['width']}"
    return told + "."


def suggestion(diagnosis: Mapping[str, Any]) -> str:
    """The changed widths at equal FLOPs, in a sentence."""
    changed = [layer for layer in diagnosis["layers"] if layer["suggested_width"] != layer["width"]]
    if not changed:
        return "At equal FLOPs this rule would leave all widths as they are."
    moves = ", ".join(f"{layer['layer']} ({layer['width']} to {layer['suggested_width']})" for layer in changed)
    flops, parameters = diagnosis["flops"], diagnosis["parameters"]
    return (
        f"At equal FLOPs this rule would change {moves}: {flops['present']:,} to {flops['suggested']:,} FLOPs per "
        f"sample, {parameters['present']:,} to {parameters['suggested']:,} parameters."
    )

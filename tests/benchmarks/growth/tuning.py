"""What the tuning runs say: learning rates, and the worth of each layer's width. Validation only; torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from tests.benchmarks.growth.analysis import spread
from tests.benchmarks.growth.arms import ARMS, Record, Unit, tuning_units
from tests.benchmarks.growth.protocol import Protocol


def by_rate(protocol: Protocol, finished: Mapping[str, Record]) -> dict[tuple[str, str], dict[float, list[float]]]:
    """Validation accuracies by entry and class of arms, by learning rate; runs that are missing are absent."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for one in protocol.tuning:
        for unit in (Unit(e, a, s, r) for e in one.entries for a in one.arms for s in one.seeds for r in one.rates):
            rates = found.setdefault((unit.entry, ARMS[unit.arm].rate), {rate: [] for rate in one.rates})
            if unit.name in finished and unit.rate is not None:
                rates.setdefault(unit.rate, []).append(finished[unit.name]["validation_accuracy"])
    return found


def chosen(protocol: Protocol, finished: Mapping[str, Record]) -> dict[str, dict[str, float]]:
    """The learning rate with the best mean validation accuracy, of equals the highest, by entry and class.

    Only where no run is missing.
    """
    made: dict[str, dict[str, float]] = {}
    for (entry, kind), rates in by_rate(protocol, finished).items():
        wanted = sum(
            len(one.arms) * len(one.seeds) * len(one.rates)
            for one in protocol.tuning
            if entry in one.entries and ARMS[one.arms[0]].rate == kind
        )
        if sum(len(values) for values in rates.values()) == wanted:
            made.setdefault(entry, {})[kind] = max(rates, key=lambda rate: (statistics.fmean(rates[rate]), rate))
    return made


def lines(protocol: Protocol, finished: Mapping[str, Record]) -> list[str]:
    """All of it for the terminal."""
    made = [
        f"{entry:18} {kind:12} rate {rate:<5g} validation {spread(values)} ({len(values)} runs)"
        for (entry, kind), rates in by_rate(protocol, finished).items()
        for rate, values in sorted(rates.items())
    ]
    for entry in protocol.probed:
        made += _in_use(protocol, finished, entry)
        for arm in dict.fromkeys(u.arm for u in tuning_units(protocol) if u.entry == entry and "probe" in u.arm):
            gains = probe_gains(protocol, finished, entry, arm)
            if gains:
                made.append(f"{entry:18} {arm:12} over the host {spread(gains)} ({len(gains)} seeds)")
    for entry, rates in chosen(protocol, finished).items():
        made.append(f"chosen for {entry}: {rates}")
    return made


def _in_use(protocol: Protocol, finished: Mapping[str, Record], entry: str) -> list[str]:
    """What the layers of a host use of their width while decisions would be made."""
    made, rate = [], protocol.entries[entry].rates["host"]
    for seed in protocol.probe_seeds:
        for seen in finished.get(Unit(entry, "off", seed, rate).name, {}).get("utilization", []):
            layers = (f"{slot} {share:.2f}" for slot, share in seen.items() if slot != "epoch" and share is not None)
            made.append(f"{entry:18} seed {seed}, after epoch {seen['epoch']}, in use: {', '.join(layers)}")
    return made


def probe_gains(protocol: Protocol, finished: Mapping[str, Record], entry: str, arm: str) -> list[float]:
    """Points of validation accuracy that a wider layer is worth, by seed."""
    rate, gains = protocol.entries[entry].rates["host"], []
    for seed in protocol.probe_seeds:
        probe, host = (finished.get(Unit(entry, name, seed, rate).name) for name in (arm, "host"))
        if probe is not None and host is not None:
            gains.append(probe["validation_accuracy"] - host["validation_accuracy"])
    return gains

"""What a training step costs in time, as a function of the widths; measured once, before the first step.

FLOPs are not seconds: a wide early layer and a narrow late one of equal FLOPs take different times. So each layer's
FLOPs are priced at what they cost *there*: the host and the host with one slot doubled take steps in turns, and the
median of the paired differences, over the FLOPs that came with it, is the slot's rate. The host with all slots doubled
sets the scale, because layers between two slots grow by both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from services.kasmina.model import CostTerm

#: A step of some network, waited for until it is done.
Step = Callable[[], None]

_WARM_UP_STEPS: Final = 2
_FEWEST_PAIRS: Final = 5
_MOST_PAIRS: Final = 25
#: Pairs of one probe end after this, but for the fewest, seconds.
_PROBE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Milliseconds of a training step: ``overhead`` plus each cost term's FLOPs at its rate; exact at host widths.

    Attributes:
        host: Of the host, measured, milliseconds.
        overhead: What no width changes, milliseconds.
        rates: Milliseconds per forward FLOP of one sample, for each cost term of the host, in their order.
        other_rate: The same for what came later: branches.
    """

    host: float
    overhead: float
    rates: tuple[float, ...]
    other_rate: float

    def of_terms(self, terms: Sequence[CostTerm]) -> list[float]:
        """Milliseconds per unit of each term's product; the terms are the engine's, those of the host first."""
        rates = [*self.rates, *[self.other_rate] * (len(terms) - len(self.rates))]
        return [rate * term.flops for rate, term in zip(rates, terms, strict=True)]

    def cost(self, terms: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
        """Milliseconds of a step at these widths."""
        each = zip(self.of_terms(terms), terms, strict=True)
        return self.overhead + math.fsum(price * _product(term, widths) for price, term in each)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> LatencyModel:
        """The inverse of ``dataclasses.asdict``, out of the journal."""
        return LatencyModel(**{**content, "rates": tuple(content["rates"])})


@dataclass(frozen=True, slots=True)
class Probe:
    """One comparison with the host, in milliseconds: medians of its steps and of the paired differences."""

    host: float
    extra: float


def compare(host: Step, wider: Step, *, clock: Callable[[], float] = time.perf_counter) -> Probe:
    """Time both in turns, each pair in the other order than the one before, after a warm-up."""

    def timed(step: Step) -> float:
        started = clock()
        step()
        return 1e3 * (clock() - started)

    for step in (host, wider):
        for _ in range(_WARM_UP_STEPS):
            step()
    hosts: list[float] = []
    differences: list[float] = []
    started = clock()
    while len(hosts) < _FEWEST_PAIRS or (len(hosts) < _MOST_PAIRS and clock() - started < _PROBE_SECONDS):
        if len(hosts) % 2:
            more, own = timed(wider), timed(host)
        else:
            own, more = timed(host), timed(wider)
        hosts.append(own)
        differences.append(more - own)
    return Probe(statistics.median(hosts), statistics.median(differences))


def fit(
    terms: Sequence[CostTerm], widths: Mapping[str, int], alone: Mapping[str, Probe], together: Probe
) -> LatencyModel:
    """The model behind the probes of doubled slots: each ``alone``, and all of them ``together``.

    Args:
        terms: Cost terms of the host.
        widths: Host widths of all slots.
        alone: For each slot the host with its width doubled.
        together: The host with all widths doubled.
    """
    host = statistics.median([*(probe.host for probe in alone.values()), together.host])
    doubled = {slot: 2 * width for slot, width in widths.items()}
    slot_rates = {
        slot: max(0.0, probe.extra) / max(1.0, _flops(terms, {**widths, slot: doubled[slot]}) - _flops(terms, widths))
        for slot, probe in alone.items()
    }
    if not any(slot_rates.values()):
        slot_rates = dict.fromkeys(slot_rates, 1.0)  # too little to tell layers apart: all FLOPs cost the same
    rates = [statistics.fmean([slot_rates[slot] for slot in term.slots]) if term.slots else 0.0 for term in terms]

    def priced(at: Mapping[str, int]) -> float:
        return math.fsum(rate * term.flops * _product(term, at) for rate, term in zip(rates, terms, strict=True))

    growing = priced(doubled) - priced(widths)
    scale = max(0.0, together.extra) / growing if growing else 0.0
    if scale * priced(widths) > host:
        scale = host / priced(widths)  # then nothing is left for what no width changes
    part = scale * priced(widths)
    # Without a slot to double nothing tells what FLOPs cost: at most all of the time.
    other = (part if growing else host) / max(1.0, _flops(terms, widths))
    return LatencyModel(host, host - part, tuple(scale * rate for rate in rates), other)


def _flops(terms: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
    return math.fsum(term.flops * _product(term, widths) for term in terms)


def _product(term: CostTerm, widths: Mapping[str, int]) -> int:
    return math.prod(widths[slot] for slot in term.slots)

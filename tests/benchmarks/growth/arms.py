"""The arms: what each of them trains, for how long, and which finished runs it has to wait for. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tests.benchmarks.growth.protocol import TRAINED, Entry, Protocol

#: What is known of a finished run: the content of its file.
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What an arm trains.

    Attributes:
        kind: ``static`` does not grow, ``grown`` does, ``sweep`` trains several static shapes and keeps one.
        shape: Of a static arm: the ``host``, the ``final`` shape of the run it follows, the ``target`` of the budget,
            one of the shapes ``listed`` in the entry, or the host with one layer widened, a ``probe``.
        length: As many ``epochs`` as the recipe says; until as many ``flops`` or CPU seconds (``time``) are spent as
            by the run it follows, growth included.
        policy: Of a growing arm; ``None`` decides nothing.
        rate: Class of its learning rate.
        follows: Arm of the same entry and seed whose run it is measured against.
        timed_by: Arm whose steps tell how long its own will take.
        donor: Arm of another seed whose plan it repeats.
        trained: Whether it begins with a trained host.
        index: Which shape is meant, or which layer a probe widens.
    """

    kind: Literal["static", "grown", "sweep"] = "static"
    shape: Literal["host", "final", "target", "listed", "probe"] = "host"
    length: Literal["epochs", "flops", "time"] = "epochs"
    policy: str | None = None
    rate: str = "host"
    follows: str | None = None
    timed_by: str | None = None
    donor: str | None = None
    trained: bool = False
    index: int = 0

    @property
    def measures(self) -> bool:
        """Whether its policy grows by what layers use of their width, so that ``least_need`` means something to it."""
        return self.policy in ("utilization", "permuted")


def _rule(policy: str | None, **more: Any) -> Arm:
    return Arm(kind="grown", policy=policy, rate="grown", **more)


ARMS: Final[Mapping[str, Arm]] = {
    "host": Arm(),
    "host_equal_flops": Arm(length="flops", follows="tamiyo"),
    "final_equal_epochs": Arm(shape="final", rate="wide", follows="tamiyo"),
    "final_equal_flops": Arm(shape="final", length="flops", rate="wide", follows="tamiyo"),
    "final_equal_time": Arm(shape="final", length="time", rate="wide", follows="tamiyo", timed_by="final_equal_epochs"),
    "tamiyo": _rule("utilization"),
    "uniform": _rule("uniform"),
    "random": _rule("random"),
    "narrowest": _rule("narrowest"),
    "permuted": _rule("permuted"),
    "transplant": _rule("transplant", donor="tamiyo"),
    # It is the host, so it has the host's rate.
    "off": Arm(kind="grown", policy=None),
    "sweep": Arm(kind="sweep", rate="wide", follows="tamiyo"),
    "grown": _rule("utilization", trained=True),
    "grown_uniform": _rule("uniform", trained=True),
    "trained_on": Arm(length="flops", rate="trained_on", follows="grown", trained=True),
    "from_scratch": Arm(shape="target", length="flops", rate="wide", follows="grown"),
    **{f"static_{index}": Arm(shape="listed", index=index, rate="wide") for index in range(4)},
    **{f"probe_{layer}": Arm(shape="probe", index=layer) for layer in range(8)},
}


@dataclass(frozen=True, slots=True)
class Unit:
    """One run. ``rate`` replaces the entry's learning rate while it is tuned."""

    entry: str
    arm: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        tuned = "" if self.rate is None else f".rate-{self.rate:g}"
        return f"{self.entry}.{self.arm}.{self.seed}{tuned}"


def units(protocol: Protocol) -> list[Unit]:
    """All final runs: stage by stage, within each seed by seed, so that what is cut short has whole seeds."""
    found: list[Unit] = []
    for stage in protocol.stages or (tuple(protocol.entries),):
        parts = [(protocol.entries[name], name, arm) for name, _, arm in (part.partition("/") for part in stage)]
        for seed in dict.fromkeys(seed for entry, _, _ in parts for seed in entry.seeds):
            for entry, name, one in parts:
                found += [Unit(name, arm, seed) for arm in ([one] if one else entry.arms) if seed in entry.seeds]
    return found


def tuning_units(protocol: Protocol) -> list[Unit]:
    """All runs that choose something on validation; their names say their rates."""
    tuned = [
        Unit(entry, arm, seed, rate)
        for one in protocol.tuning
        for seed in one.seeds
        for entry in one.entries
        for arm in one.arms
        for rate in one.rates
    ]
    probes = [
        Unit(name, arm, seed, protocol.entries[name].rates[ARMS[arm].rate])
        for name in protocol.probed
        for seed in protocol.probe_seeds
        for arm in ("host", "off", *(f"probe_{layer}" for layer in range(len(protocol.entries[name].network.widths))))
    ]
    return list(dict.fromkeys([*tuned, *probes]))


def rate_of(entry: Entry, unit: Unit) -> float:
    """Peak learning rate of a run."""
    return entry.rates[ARMS[unit.arm].rate] if unit.rate is None else unit.rate


def needs(protocol: Protocol, unit: Unit) -> dict[str, Unit]:
    """The runs that must be finished before this one, by their role: follows, timed_by, donor, trained.

    What a tuning run waits for is a tuning run too, at the rate that its entry has.
    """
    arm, seeds = ARMS[unit.arm], protocol.entries[unit.entry].seeds

    def needed(entry: str, name: str, seed: int) -> Unit:
        rate = None if unit.rate is None else protocol.entries[entry].rates[ARMS[name].rate]
        return Unit(entry, name, seed, rate)

    found = {}
    if arm.follows is not None:
        found["follows"] = needed(unit.entry, arm.follows, unit.seed)
    if arm.timed_by is not None:
        found["timed_by"] = needed(unit.entry, arm.timed_by, unit.seed)
    if arm.donor is not None:
        found["donor"] = needed(unit.entry, arm.donor, seeds[(seeds.index(unit.seed) + 1) % len(seeds)])
    if arm.trained:
        found["trained"] = needed(TRAINED, "host", unit.seed)
    return found


def ready(protocol: Protocol, waiting: Sequence[Unit], done: Mapping[str, Record]) -> Iterator[Unit]:
    """Those of ``waiting`` whose needs are done, in their order."""
    for unit in waiting:
        if all(need.name in done for need in needs(protocol, unit).values()):
            yield unit

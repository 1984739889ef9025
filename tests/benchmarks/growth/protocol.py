"""Everything that the proof fixes beforehand, as data; torch-free.

The hash of a protocol names the folder of its runs. A final run reads the test set only while the very same text is
committed as ``docs/benchmarks/protocol.json`` (see :mod:`tests.benchmarks.growth.permit`), so that nothing in here can
be chosen by what the test set says. GROWTH sections 2b, 5 and 6 are where it comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

Stem = Literal["whitening", "aside", "asides", "none"]
#: The six hosts that the primary contrast averages over.
SIX: Final = ("balanced", "starved_early", "starved_middle", "starved_late", "narrow_not_needy", "wide_but_needy")
FIXED_RULES: Final = ("uniform", "random", "narrowest", "permuted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How every arm of an entry trains."""

    data: Literal["cifar10", "cifar100", "digits"] = "cifar10"
    limit: int | None = None
    validation_ratio: float = 0.1
    batch_size: int = 250
    epochs: int = 20
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    warmup_ratio: float = 0.1
    flip: bool = True
    translate: int = 2
    #: Each image is judged with its mirror image, for every arm.
    mirror_when_judged: bool = True
    #: On the processor this was planned for, bfloat16 autocast took 11 to 15 times the CPU time of float32 per step.
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How growing arms grow; all rules at the same moments under the same budget."""

    #: The budget: forward FLOPs of the entry's network with these widths, or ``parameters`` of them.
    target_widths: tuple[int, ...] | None = None
    target_parameters: int | None = None
    #: Decisions after epochs 1, 2 and 3 of 20.
    window: tuple[float, float] = (0.05, 0.15)
    decisions: int = 3
    max_factor: float = 2.0
    #: At least; for wide layers the trainer takes twenty images for each channel, if there are so many.
    health_samples: int = 2000
    min_epochs: int = 1
    #: A layer that uses less of its width is not widened by a rule that measures; 0, so that such a rule spends as much
    #: as those that do not, too.
    least_need: float = 0.0
    #: Seeds are judged either way, and it is billed and kept. Without culls every rule keeps what it planned, so that
    #: rules that plan under one budget train networks of one cost.
    culls: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A host: ``widths`` per layer, what its images come in through, and why it is among the hosts."""

    kind: Literal["convolutional", "mlp", "vit"] = "convolutional"
    widths: tuple[int, ...] = (8, 8, 16, 16, 24, 24)
    stem: Stem = "whitening"
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One table: a host, its arms and seeds. ``rates``: peak learning rate by class of arm (host, wide, grown)."""

    network: Network
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    recipe: Recipe = Recipe()
    growth: Growth = Growth(target_widths=(16, 16, 32, 32, 48, 48))
    rates: Mapping[str, float] = field(default_factory=lambda: {"host": 0.6, "wide": 0.4, "grown": 0.6})
    #: Static shapes: together those of the arm ``sweep``, one by one those of ``static_0`` and so on.
    sweep: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """``first`` minus ``second`` in points of test accuracy, averaged over ``entries``.

    ``second`` may name several arms: then the smallest difference counts (``first`` against the best of them), as an
    intersection-union test. ``margin``: superiority is tested against 0; with a margin the test is non-inferiority.
    ``aim`` is what issue 5 asks of the mean, for information.
    """

    name: str
    first: str
    second: tuple[str, ...]
    entries: tuple[str, ...]
    primary: bool = False
    margin: float | None = None
    aim: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Runs that choose a learning rate on validation: every arm at every rate on every seed."""

    entries: tuple[str, ...]
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """A whole experiment; ``confidence`` is that of every interval, ``1 - confidence`` the level of every test."""

    name: str
    entries: Mapping[str, Entry]
    contrasts: tuple[Contrast, ...]
    confidence: float = 0.95
    #: By which share FLOPs may differ between arms that are to spend alike. Rules that plan under one budget differ by
    #: whole channels.
    tolerance: float = 0.03
    #: Entries (or ``entry/arm``, a part of one) whose runs are made together, seed by seed, so that a run that is cut
    #: short has whole seeds of the first stages; empty: one stage of all.
    stages: tuple[tuple[str, ...], ...] = ()
    #: What was tuned, and so how often each arm was tried; an entry's ``rates`` are what it chose.
    tuning: tuple[Tuning, ...] = ()
    #: Hosts whose layers are widened one by one while tuning, each to ``probe_factor`` times the host's forward FLOPs:
    #: whether a layer is in need is shown by what its width is worth, not by how the host was meant.
    probed: tuple[str, ...] = ()
    probe_factor: float = 1.25
    probe_seeds: tuple[int, ...] = (0, 1)

    def content(self) -> dict[str, Any]:
        """As JSON."""
        made: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return made

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`content` in canonical form, hex."""
        return _hash(self.content())

    @property
    def tuning_hash(self) -> str:
        """Of what a tuning run depends on beside its arm, seed and rate: a protocol is tuned before it is fixed."""
        content = self.content()
        fixed = {
            name: {key: entry[key] for key in ("network", "recipe", "growth", "sweep")}
            for name, entry in content["entries"].items()
        }
        return _hash({"entries": fixed, "probe_factor": self.probe_factor})

    @property
    def tuning_seeds(self) -> frozenset[int]:
        """All that tuning uses; final runs use others."""
        tuned = frozenset(seed for one in self.tuning for seed in one.seeds)
        return tuned | frozenset(self.probe_seeds if self.probed else ())


def _hash(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_ALL: Final = (
    "host",
    "host_equal_flops",
    "final_equal_epochs",
    "final_equal_flops",
    "final_equal_time",
    "tamiyo",
    *FIXED_RULES,
    "transplant",
    "off",
    "sweep",
)
_RULES: Final = ("host", "tamiyo", *FIXED_RULES)
_STATIC: Final = ("static_0", "static_1", "static_2", "static_3")
_TWELVE: Final = tuple(range(10, 22))
_SIX_SEEDS: Final = tuple(range(10, 16))


#: Two in three of the epochs of the other entries, and decisions after the first three of them, too.
_SHORTER: Final = Recipe(epochs=12)
_EARLY: Final = (0.08, 0.25)
#: For all convolutional networks of this data set: what tuning chose on the balanced host, and for wide ones from
#: scratch, which are those of the extend protocol, what that chose for them with budgets of 4 and of 10 epochs.
_RATES: Final[Mapping[str, float]] = {"host": 0.6, "wide": 0.4, "grown": 0.4}


def _host(
    why: str, widths: tuple[int, ...], stem: Stem = "whitening", target: tuple[int, ...] = (16, 16, 32, 32, 48, 48)
) -> Entry:
    return Entry(
        network=Network(widths=widths, stem=stem, why=why),
        arms=_RULES,
        seeds=_SIX_SEEDS,
        recipe=_SHORTER,
        growth=Growth(target_widths=target, window=_EARLY),
        rates=_RATES,
    )


def _of(entry: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{entry}/{name}" for name in names)


GROWTH: Final = Protocol(
    name="growth",
    # What answers most first: what growth is worth at all, which rule is best, then the rest.
    stages=(
        _of("balanced", "tamiyo", "host", "host_equal_flops", "final_equal_flops", "uniform"),
        (*_of("balanced", "random", "narrowest", "permuted"), *SIX[1:]),
        _of("balanced", "sweep"),
        ("small",),
        ("mlp", "vit", "digits"),
        _of("balanced", "final_equal_epochs", "final_equal_time", "transplant", "off"),
    ),
    tuning=(
        Tuning(entries=("balanced",), arms=("host",), rates=(0.3, 0.6, 1.2), seeds=(0,)),
        Tuning(entries=("balanced",), arms=("tamiyo",), rates=(0.2, 0.4, 0.8), seeds=(0,)),
        # Where the best of an arm's rates was the highest, one more beyond it.
        *(
            Tuning(entries=(entry,), arms=(arm,), rates=rates, seeds=(0,))
            for entry, arm, rates in (
                ("mlp", "host", (0.05, 0.1, 0.2, 0.4)),
                ("mlp", "tamiyo", (0.05, 0.1, 0.2, 0.4)),
                ("vit", "host", (0.05, 0.1, 0.2, 0.4)),
                ("vit", "tamiyo", (0.05, 0.1, 0.2)),
                ("digits", "host", (0.3, 0.6, 1.2, 2.4)),
                ("digits", "tamiyo", (0.3, 0.6, 1.2)),
            )
        ),
    ),
    probed=("narrow_not_needy", "wide_but_needy"),
    probe_seeds=(0,),
    entries={
        "balanced": Entry(
            network=Network(why="no layer is shorter of width than another: the hardest host for any rule to gain on"),
            arms=_ALL,
            seeds=_TWELVE,
            rates=_RATES,
            # Near the budget in forward FLOPs: uniform, flat, steep, and the middle wide.
            sweep=(
                (16, 16, 32, 32, 48, 48),
                (20, 20, 28, 28, 36, 36),
                (12, 12, 32, 36, 64, 64),
                (16, 16, 38, 38, 40, 36),
            ),
        ),
        "starved_early": _host("the first convolution is a bottleneck of width", (3, 8, 16, 16, 24, 24)),
        "starved_middle": _host("the third convolution is a bottleneck of width", (8, 8, 4, 16, 24, 24)),
        "starved_late": _host("the fifth convolution is a bottleneck of width", (8, 8, 16, 16, 6, 24)),
        "narrow_not_needy": _host(
            "width misleads: the narrowest layer is one beside the first convolution, costs as much for each channel, "
            "and its many inputs are all the same, the brightness of the whole image",
            (4, 8, 8, 16, 16, 24, 24),
            "aside",
            (8, 16, 16, 32, 32, 48, 48),
        ),
        "wide_but_needy": _host(
            "width misleads: the six layers of the chain are twice as wide as the two beside the first of them, and "
            "in need; those two see the brightness of the whole image and nothing else",
            (6, 6, 12, 12, 12, 12, 12, 12),
            "asides",
            (12, 12, 24, 24, 24, 24, 24, 24),
        ),
        "small": Entry(
            network=Network(why="the record for a grown net of at most 62.7k parameters (84.1 % after 300 epochs)"),
            arms=("tamiyo", "uniform", "final_equal_epochs", *_STATIC),
            seeds=_SIX_SEEDS,
            recipe=Recipe(epochs=30),
            rates=_RATES,
            growth=Growth(target_parameters=62_700),
            # 57k to 62k parameters: all by one factor, that of GROWTH (84.2 %), and two with more of them in front.
            sweep=(
                (17, 18, 34, 34, 51, 51),
                (20, 20, 34, 36, 44, 44),
                (24, 22, 36, 36, 44, 42),
                (32, 24, 32, 32, 40, 40),
            ),
        ),
        "mlp": Entry(
            network=Network(kind="mlp", widths=(32, 32, 32, 32), stem="none", why="another family: four hidden layers"),
            arms=_RULES,
            seeds=_SIX_SEEDS,
            recipe=Recipe(mirror_when_judged=False),
            growth=Growth(target_widths=(64, 64, 64, 64)),
            rates={"host": 0.2, "wide": 0.2, "grown": 0.2},
        ),
        "vit": Entry(
            network=Network(
                kind="vit",
                widths=(24, 32, 32, 32),
                stem="none",
                why="another family: a small vision transformer; its stream, its heads and its hidden layers may grow",
            ),
            arms=_RULES,
            seeds=_SIX_SEEDS,
            # Its steps take six times as long as those of convolutions of the same FLOPs.
            recipe=Recipe(limit=10_000),
            growth=Growth(target_widths=(48, 64, 64, 64)),
            rates={"host": 0.2, "wide": 0.1, "grown": 0.1},
        ),
        "digits": Entry(
            network=Network(
                widths=(3, 3, 5, 5), stem="none", why="another data set, shipped with a package: 8x8 digits"
            ),
            arms=_RULES,
            seeds=_TWELVE,
            recipe=Recipe(data="digits", epochs=40, batch_size=50, flip=False, translate=1, mirror_when_judged=False),
            growth=Growth(target_widths=(6, 6, 10, 10), health_samples=1000),
            rates={"host": 1.2, "wide": 0.6, "grown": 0.6},
        ),
    },
    contrasts=(
        Contrast(
            name="grown against its own final shape at equal FLOPs",
            first="tamiyo",
            second=("final_equal_flops",),
            entries=("balanced",),
            primary=True,
            margin=0.3,
        ),
        Contrast(
            name="Tamiyo against the best fixed rule over six hosts",
            first="tamiyo",
            second=FIXED_RULES,
            entries=SIX,
            primary=True,
            aim=0.5,
        ),
        Contrast(name="over host", first="tamiyo", second=("host",), entries=("balanced",), aim=5.8),
        Contrast(
            name="over host at equal FLOPs",
            first="tamiyo",
            second=("host_equal_flops",),
            entries=("balanced",),
            aim=3.0,
        ),
        Contrast(
            name="over a sweep of the same cost", first="tamiyo", second=("sweep",), entries=("balanced",), aim=0.0
        ),
        Contrast(
            name="over its final shape at equal time",
            first="tamiyo",
            second=("final_equal_time",),
            entries=("balanced",),
        ),
        Contrast(
            name="over its final shape at equal epochs",
            first="tamiyo",
            second=("final_equal_epochs",),
            entries=("balanced",),
        ),
        Contrast(name="over another seed's plan", first="tamiyo", second=("transplant",), entries=("balanced",)),
        Contrast(
            name="measuring where width misleads",
            first="tamiyo",
            second=("narrowest", "permuted"),
            entries=("narrow_not_needy", "wide_but_needy"),
        ),
        *(
            Contrast(
                name=f"not below the best fixed rule on {host}",
                first="tamiyo",
                second=FIXED_RULES,
                entries=(host,),
                margin=0.3,
            )
            for host in SIX
        ),
        Contrast(
            name="at most 62.7k parameters, over the best of four static shapes",
            first="tamiyo",
            second=_STATIC,
            entries=("small",),
        ),
        Contrast(name="on a vision transformer", first="tamiyo", second=FIXED_RULES, entries=("vit",)),
        Contrast(name="on an MLP", first="tamiyo", second=FIXED_RULES, entries=("mlp",)),
        Contrast(name="on a second data set", first="tamiyo", second=FIXED_RULES, entries=("digits",)),
    ),
)


#: The entry of the extend protocol whose runs are the trained hosts.
TRAINED: Final = "trained"
BUDGETS: Final = (4, 10, 20)
_TRAINED: Final = Entry(
    network=Network(why="the trained hosts that every budget begins with"), arms=("host",), seeds=_SIX_SEEDS
)
#: By epochs' worth of the bigger network; what ``--tune`` chose, those of 20 being those of 10.
_EXTEND_RATES: Final[Mapping[int, Mapping[str, float]]] = {
    4: {"grown": 0.4, "trained_on": 0.2, "wide": 0.4},
    10: {"grown": 0.4, "trained_on": 0.05, "wide": 0.4},
    20: {"grown": 0.4, "trained_on": 0.05, "wide": 0.4},
}


def _budget(epochs: int) -> Entry:
    return Entry(
        network=Network(why=f"{epochs} more epochs for the grown network, as many FLOPs for the others"),
        arms=("grown", "trained_on", "from_scratch", "grown_uniform"),
        seeds=_SIX_SEEDS,
        recipe=Recipe(epochs=epochs),
        # All at once, before the first step: the host is trained, so there is something to measure.
        growth=Growth(
            target_widths=(16, 16, 32, 32, 48, 48),
            window=(0.0, 0.01),
            decisions=1,
            # Else a choice of layers under the budget of twice all widths could only be all of them.
            max_factor=3.0,
            health_samples=1000,
        ),
        rates=_EXTEND_RATES[epochs],
    )


def _extend_tuning(entry: str, seeds: tuple[int, ...], **rates: tuple[float, ...]) -> tuple[Tuning, ...]:
    return tuple(Tuning(entries=(entry,), arms=(arm,), rates=tried, seeds=seeds) for arm, tried in rates.items())


EXTEND: Final = Protocol(
    name="extend",
    entries={TRAINED: _TRAINED, **{str(epochs): _budget(epochs) for epochs in BUDGETS}},
    stages=((TRAINED, "4", "10"), ("20",)),
    # As many tries for every arm: three rates a factor of two apart, around what GROWTH found. Where the best of them
    # was the highest or the lowest, one more beyond it.
    tuning=(
        *_extend_tuning(
            "4",
            (0, 1),
            grown=(0.1, 0.2, 0.4, 0.8),
            trained_on=(0.1, 0.2, 0.4),
            from_scratch=(0.2, 0.4, 0.8),
        ),
        *_extend_tuning(
            "10",
            (0,),
            grown=(0.1, 0.2, 0.4, 0.8),
            trained_on=(0.05, 0.1, 0.2, 0.4),
            from_scratch=(0.2, 0.4, 0.8),
        ),
    ),
    contrasts=tuple(
        Contrast(
            name=f"{first} over {second} with {epochs} epochs",
            first=first,
            second=(second,),
            entries=(str(epochs),),
            primary=epochs == 4 and second in ("trained_on", "from_scratch"),
            aim=aim,
        )
        for epochs, aims in ((4, (1.5, 3.0)), (10, (3.0, 0.4)), (20, (None, None)))
        for first, second, aim in (
            ("grown", "trained_on", aims[0]),
            ("grown", "from_scratch", aims[1]),
            ("grown_uniform", "trained_on", None),
            ("grown_uniform", "from_scratch", None),
            ("grown", "grown_uniform", None),
        )
    ),
)
PROTOCOLS: Final[Mapping[str, Protocol]] = {"growth": GROWTH, "extend": EXTEND}


def miniature(protocol: Protocol) -> Protocol:
    """The same experiment on next to nothing (``--smoke``): every arm runs, no figure means anything."""
    entries = {}
    for name, entry in protocol.entries.items():
        epochs = 2 if protocol.name == "extend" else 6
        # Enough for the host's layers to be measured: twenty images for each channel, the validation split apart.
        limit = max(400, 25 * max(entry.network.widths))
        recipe = replace(entry.recipe, limit=limit, batch_size=40, epochs=epochs)
        window = entry.growth.window if protocol.name == "extend" else (0.1, 0.5)
        growth = replace(entry.growth, window=window, health_samples=300)
        entries[name] = replace(entry, recipe=recipe, growth=growth, seeds=entry.seeds[:2])
    tuning = tuple(replace(one, rates=one.rates[:1], seeds=one.seeds[:1]) for one in protocol.tuning)
    # In so short a run a few layers are too wide to be measured by so few images.
    return replace(protocol, entries=entries, tuning=tuning, probe_seeds=(0,), tolerance=0.25)

"""Tiny runs, one for each kind of arm and host, whose losses and widths stand for what the code computes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from services.tolaria.data.splits import DataSet, Normalization, Split
from tests.benchmarks.growth import training
from tests.benchmarks.growth.arms import Unit, needs
from tests.benchmarks.growth.protocol import Entry, Growth, Network, Protocol, Recipe
from tests.benchmarks.growth.services import LocalServices

_CLASSES, _TRAINING, _VALIDATION = 10, 300, 100


def _entry(
    network: Network, target: tuple[int, ...], arms: tuple[str, ...], rate: float = 0.6, epochs: int = 4
) -> Entry:
    return Entry(
        network=network,
        arms=arms,
        seeds=(10,),
        recipe=Recipe(epochs=epochs, batch_size=30),
        growth=Growth(target_widths=target, window=(1.2 / epochs, 2.4 / epochs), decisions=2, health_samples=300),
        rates={"host": rate, "wide": 0.4, "grown": rate},
    )


#: Its own, whatever the protocols say: they stand for the code alone.
_ENTRIES: Final = {
    "": _entry(
        Network(widths=(8, 8, 16, 16, 24, 24)),
        (16, 16, 32, 32, 48, 48),
        ("host", "tamiyo", "uniform", "random", "narrowest", "permuted", "transplant", "final_equal_flops"),
    ),
    "asides/": _entry(Network(widths=(3, 3, 4, 4, 4, 4, 4, 4), stem="asides"), (6, 6, 8, 8, 8, 8, 8, 8), ("tamiyo",)),
    "mlp/": _entry(Network(kind="mlp", widths=(8, 8, 8, 8), stem="none"), (16, 16, 16, 16), ("tamiyo",), 0.1),
    # A stream takes longer than a layer until it is settled.
    "vit/": _entry(Network(kind="vit", widths=(8, 8, 8, 8), stem="none"), (16, 16, 16, 16), ("tamiyo",), 0.1, 8),
}


def easy_images(seed: int = 0) -> DataSet:
    """Ten noisy patterns of 32x32 pixels in three channels; the test set has as many images as the validation split."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randint(0, 256, (_CLASSES, 3, 32, 32), generator=generator)

    def split(count: int) -> Split:
        labels = torch.arange(count) % _CLASSES
        noise = torch.randint(-90, 91, (count, 3, 32, 32), generator=generator)
        return Split((patterns[labels] + noise).clamp(0, 255).to(torch.uint8), labels)

    learned, held_out, test = split(_TRAINING), split(_VALIDATION), split(_VALIDATION)
    return DataSet(learned, held_out, Normalization.of(learned.images), _CLASSES, lambda: test)


def figures() -> dict[str, dict[str, Any]]:
    """Losses by epoch, widths and the first batches of every arm of every entry; about fifteen seconds."""
    made: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="esper-canary-") as name:
        for prefix, entry in _ENTRIES.items():
            protocol = Protocol(name="canary", entries={"balanced": entry}, contrasts=())
            done: dict[str, dict[str, Any]] = {}
            for arm in entry.arms:
                folder = Path(name) / prefix / arm
                folder.mkdir(parents=True)
                unit = Unit("balanced", arm, entry.seeds[0])
                # All of one seed: for what a transplant does, whose plan it is does not matter.
                given = {role: done[need.arm] for role, need in needs(protocol, unit).items()}
                order = training.Order(entry=entry, unit=unit, given=given, folder=folder)
                done[arm] = training.run(order, easy_images(), LocalServices(folder))
            made |= {
                f"{prefix}{arm}": {
                    "losses": record["train_losses"],
                    "widths": record["widths"],
                    "batches": record["batches"][0],
                }
                for arm, record in done.items()
            }
    return made

"""A worker process: takes orders as JSON lines on its standard input, answers on its standard output.

It ends at once when its input ends, in the middle of a run too: whoever gave the orders is gone.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from services.tolaria.data import splits
from services.tolaria.progress import ProgressWriter
from tests.benchmarks.growth import permit, training
from tests.benchmarks.growth.arms import Unit
from tests.benchmarks.growth.protocol import PROTOCOLS, miniature
from tests.benchmarks.growth.services import SharedServices


class _Voice:
    """Passes on where the run is."""

    def send(self, message: Mapping[str, Any]) -> bool:
        if message["kind"] == "step":
            say({"step": message["step"], "steps": message["steps"]})
        return True


def say(message: Mapping[str, Any]) -> None:
    """One line to whoever gave the orders."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def listen(orders: queue.Queue[dict[str, Any]]) -> None:
    """Reads orders until there is nobody to give them."""
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(0)


def obey(order: Mapping[str, Any], mesh: Path, data_dir: Path) -> dict[str, Any]:
    """Make one run; ``order`` as the runner wrote it."""
    protocol = PROTOCOLS[order["protocol"]]
    if order["smoke"]:
        protocol = miniature(protocol)
    unit = Unit(**order["unit"])
    entry = protocol.entries[unit.entry]
    config = training.config_of(entry, unit, data_dir, policy="policies/utilization@1", factor={})
    data = splits.load(config.data, unit.seed)

    def read_test() -> splits.Split:
        permit.require_committed(protocol)
        return data.read_test()

    with tempfile.TemporaryDirectory(prefix="esper-unit-") as folder:
        made = training.Order(
            entry=entry,
            unit=unit,
            given=order["given"],
            folder=Path(folder),
            weights=order["weights"] and Path(order["weights"]),
            save_weights=order["save_weights"] and Path(order["save_weights"]),
            probe_factor=protocol.probe_factor,
        )
        run = partial(training.run, made, data, SharedServices(mesh), data_dir=data_dir)
        return run(read_test=read_test if order["final"] else None, progress=ProgressWriter(_Voice()))


def main(argv: list[str]) -> None:
    """``argv``: the folder of the mesh, the folder of the data."""
    mesh, data_dir = Path(argv[0]), Path(argv[1])
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=listen, args=(orders,), daemon=True).start()
    while True:
        order = orders.get()
        try:
            say({"record": obey(order, mesh, data_dir)})
        except Exception:  # noqa: BLE001 - whatever a run dies of is for the runner to tell, with its place
            say({"error": traceback.format_exc()})
        # A run leaves its data set in a cycle of references, and so few objects that the collector would not come by
        # itself: each run would keep some 150 MB.
        gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])

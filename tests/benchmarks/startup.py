"""From the command to the first training step: ``python -m tests.benchmarks.startup --out FILE [--starts N]``.

Starts `train.py` with the quick start, again and again, each in a folder of its own, and stops it after its first
epoch. The end of the first step is the training process's own word (``telemetry.step_times``); the command's beginning
is the process's creation as the kernel has it. By turns with each start, as control, a bare Python process imports
torch and makes one optimizer step: what no launcher can do without. Limit: 10 s on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.benchmarks import measure
from tests.infrastructure.processes import ROOT
from tests.infrastructure.runs import SERVICES

LIMIT_SECONDS: Final = 10.0
_BARE: Final = """
import torch
layer = torch.nn.Conv2d(1, 2, 3)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
layer(torch.zeros(32, 1, 8, 8)).sum().backward()
optimizer.step()
"""


def one_start(folder: Path) -> dict[str, Any]:
    """One start, split by part. Seconds after the command, but for ``training_process``: how long each part took."""
    with measure.endless_run(folder) as run:
        first = measure.step_times(run.folder)[0]
        began = run.launcher.create_time()
        mesh = run.until(lambda: _mesh(run.folder), "mesh.json with the first step")
    return {
        "first_step_seconds": first["began"] + first["seconds"] - began,
        "told_seconds": mesh["first_step_seconds"],
        "services": {name: mesh["services"][name]["serving_after"] for name in SERVICES},
        "spawned": {name: mesh["services"][name]["spawned_after"] for name in SERVICES},
        "training_process": mesh["startup"],
    }


def _mesh(folder: Path) -> dict[str, Any] | None:
    path = folder / "mesh.json"
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return content if content.get("first_step_seconds") is not None else None


def bare_start() -> float:
    """Seconds of the control."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", _BARE], cwd=ROOT, check=True, timeout=120)
    return time.perf_counter() - began


def run_benchmark(starts: int) -> dict[str, Any]:
    """The whole measurement."""
    found, control, loads = [], [], [measure.environment()]
    with tempfile.TemporaryDirectory(prefix="esper-startup-") as folder:
        for number in range(starts):
            control.append(bare_start())
            found.append(one_start(Path(folder) / str(number)))
            loads.append(measure.environment())
    seconds = [start["first_step_seconds"] for start in found]
    parts = {name: measure.median([start["services"][name] for start in found]) for name in SERVICES}
    process = {key: measure.median([s["training_process"][key] for s in found]) for key in found[0]["training_process"]}
    return {
        "method": __doc__,
        "limit_seconds": LIMIT_SECONDS,
        "first_step_seconds": {"median": measure.median(seconds), "least": min(seconds), "most": max(seconds)},
        "services_serving_after_seconds": parts,
        "training_process_seconds": process,
        "control_seconds": {"median": measure.median(control), "least": min(control), "most": max(control)},
        "over_control": measure.median([a / b for a, b in zip(seconds, control, strict=True)]),
        "within_limit": max(seconds) <= LIMIT_SECONDS,
        "starts": found,
        "environment": {"before": loads[0], "after": loads[-1], "load_1_minute": [e["load_average"][0] for e in loads]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes JSON; 0 whatever the figures are."""
    parser = measure.parser(__doc__)
    parser.add_argument("--starts", type=int, default=5)
    arguments = parser.parse_args(argv)
    result = run_benchmark(arguments.starts)
    first, control = result["first_step_seconds"], result["control_seconds"]
    rows = [
        ("first step, seconds", f"median {first['median']:.2f}, most {first['most']:.2f} (limit {LIMIT_SECONDS:g})"),
        ("bare torch, seconds", f"median {control['median']:.2f}, most {control['most']:.2f}"),
        *((f"{name} serving", f"{after:.2f}") for name, after in result["services_serving_after_seconds"].items()),
        *((f"training: {part}", f"{took:.2f}") for part, took in result["training_process_seconds"].items()),
        ("load, 1 minute", ", ".join(f"{load:.1f}" for load in result["environment"]["load_1_minute"])),
    ]
    measure.publish(arguments.out, result, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

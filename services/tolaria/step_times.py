"""How long each training step took, for whoever wants to know what disturbs training: off unless asked for.

``telemetry.step_times: true`` makes the trainer append one JSON line per finished step to ``step_times.jsonl`` in the
run folder, written at the ends of epochs, outside the steps: a step costs five readings of clocks.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Final

STEP_TIMES_FILE: Final = "step_times.jsonl"


class StepTimes:
    """The step times of one arm.

    Each line: ``arm``, ``step`` (finished steps, this one included), ``began`` (wall clock, seconds since the epoch),
    ``seconds`` from there to the end of the step, ``cpu_seconds`` of the training thread in it, and ``gap_seconds``
    since the step before in the same epoch, which is what its safe point took; null for an epoch's first.
    """

    def __init__(self, folder: Path, arm: str) -> None:
        self._path = folder / STEP_TIMES_FILE
        self._arm = arm
        self._rows: list[tuple[int, float, float, float, float | None]] = []
        self._began = (0.0, 0.0, 0.0)
        self._ended: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._began = time.time(), time.thread_time(), time.perf_counter()

    def end(self, step: int) -> None:
        """The step that made it ``step`` finished steps is over."""
        now = time.perf_counter()
        wall, cpu, began = self._began
        gap = None if self._ended is None else began - self._ended
        self._rows.append((step, wall, now - began, time.thread_time() - cpu, gap))
        self._ended = now

    def flush(self) -> None:
        """Write what is not written yet. A disk that refuses ends the recording, never the training."""
        rows, self._rows, self._ended = self._rows, [], None
        lines = (
            {"arm": self._arm, "step": step, "began": began, "seconds": seconds, "cpu_seconds": cpu, "gap_seconds": gap}
            for step, began, seconds, cpu, gap in rows
        )
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError:
            # A benchmark reads this file and misses the steps; the run reports a full disk at its next checkpoint.
            return

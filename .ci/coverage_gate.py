"""Says how far each file is from its goal of coverage, and fails where one is below its floor.

    coverage_gate.py COVERAGE_JSON

Lines and branches count together, as `coverage report` counts them. A file that no test imports counts as 0. Goals are
where we want to be; floors leave room for what a run cannot count: a process that a test kills with SIGKILL takes its
part of the coverage with it. Exit code 0, 1 (below a floor) or 2 (usage).
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path

# First match wins: (pattern, floor, goal) in percent. What drives a run is to be covered whole.
THRESHOLDS: tuple[tuple[str, float, float], ...] = (
    ("train.py", 98.0, 100.0),
    ("services/tolaria/*", 98.0, 100.0),
    ("services/chassis/supervisor*", 100.0, 100.0),
    ("services/chassis/config/*", 99.0, 100.0),
    ("*", 87.0, 90.0),
)


def thresholds(path: str) -> tuple[float, float]:
    """Floor and goal of a file, from the table."""
    return next((floor, goal) for pattern, floor, goal in THRESHOLDS if fnmatch(path, pattern))


def shortfalls(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> tuple[list[str], list[str]]:
    """(files below their floor, files below their goal only), a line each, from `coverage json`'s report."""
    failing, short = [], []
    for path, figures in sorted(report["files"].items()):
        covered, (floor, goal) = figures["summary"]["percent_covered"], thresholds(path)
        if covered < floor:
            failing.append(f"{path}: {covered:.1f} % is below its floor of {floor:g} %")
        elif covered < goal:
            short.append(f"{path}: {covered:.1f} % is below its goal of {goal:g} %")
    return failing, short


def main(arguments: list[str]) -> int:
    """Prints the shortfalls; returns the exit code: 1 for a file below its floor."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    report = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    failing, short = shortfalls(report)
    for line in (*short, *failing):
        print(f"coverage: {line}")
    total = report["totals"]["percent_covered"]
    print(f"coverage: {total:.1f} % in all, {len(short)} files below their goal, {len(failing)} below their floor")
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

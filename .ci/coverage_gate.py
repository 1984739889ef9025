"""Holds the coverage thresholds, file by file.

    coverage_gate.py COVERAGE_JSON

Lines and branches count together, as `coverage report` counts them. A file that no test imports counts as 0.
Exit code 0, 1 (below a threshold: each file is named with what is not covered) or 2 (usage).
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from pathlib import Path

# First match wins: (pattern, least percent). What drives a run is covered whole.
THRESHOLDS: tuple[tuple[str, float], ...] = (
    ("train.py", 100.0),
    ("services/tolaria/*", 100.0),
    ("services/chassis/supervisor*", 100.0),
    ("services/chassis/config/*", 100.0),
    ("*", 90.0),
)


def threshold(path: str) -> float:
    """The least percent of a file, from the table."""
    return next(least for pattern, least in THRESHOLDS if fnmatch(path, pattern))


def shortfalls(report: dict[str, dict[str, dict[str, dict[str, float]]]]) -> list[str]:
    """One line for each file below its threshold, from `coverage json`'s report."""
    lines = []
    for path, figures in sorted(report["files"].items()):
        covered, least = figures["summary"]["percent_covered"], threshold(path)
        if covered < least:
            lines.append(f"{path}: {covered:.1f} % is below {least:g} %")
    return lines


def main(arguments: list[str]) -> int:
    """Prints the shortfalls; returns the exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    report = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    below = shortfalls(report)
    for line in below:
        print(f"coverage: {line}")
    print(f"coverage: {report['totals']['percent_covered']:.1f} % in all, {len(below)} files below their threshold")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Finds processes that a test run started and left behind, and ends them.

    leftovers.py RUN_ID [SECONDS]

Every process of a run inherits `ESPER_TEST_RUN=RUN_ID`; whoever still has it after the tests, and after SECONDS
(default 10) of grace for those that are on their way out, is an orphan. Zombies have ended and do not count.
Exit code 0 none, 1 some (each is named), 2 usage.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

_PROC = Path("/proc")


def of_run(run_id: str) -> dict[int, str]:
    """Command lines of the living processes of a run, by process id; without this one."""
    marker = f"ESPER_TEST_RUN={run_id}".encode()
    found = {}
    for folder in _PROC.glob("[0-9]*"):
        # A process may end, or belong to somebody else, while it is looked at.
        with contextlib.suppress(OSError):
            # An ended process that nobody has waited for has an empty environment.
            if int(folder.name) != os.getpid() and marker in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (
                    (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
    return found


def main(arguments: list[str]) -> int:
    """Waits, names and ends what is left; returns the exit code."""
    if len(arguments) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    run_id, deadline = arguments[0], time.monotonic() + float(arguments[1] if len(arguments) == 2 else 10)
    while (left := of_run(run_id)) and time.monotonic() < deadline:
        time.sleep(0.1)  # they are not our children: nothing tells us when they end
    for process, command in left.items():
        print(f"leftovers: process {process} outlived the tests: {command[:200]}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A job for the tests of the supervisor: ``python -m tests.support.mesh_job WHAT``.

It says what it does over its progress pipe. WHAT: "done" ends well, "fail" with code 7, "wait" waits for SIGTERM and
ends with 143, "stubborn" ignores SIGTERM, "chatty" waits too and writes numbered lines to its log meanwhile.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from services.chassis.process import BACKGROUND_CORES, Progress, bind_to_parent


def main(what: str) -> int:
    bound = bind_to_parent(grace=0.5)
    progress = Progress()
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "stubborn" else lambda *_: stopped.set())
    background = os.environ.get(BACKGROUND_CORES)
    environment = sorted(os.environ)
    message = {"what": what, "pid": os.getpid(), "bound": bound, "environment": environment, "background": background}
    progress.send(message)
    if what == "done":
        return 0
    if what == "fail":
        return 7
    line = 0
    while not stopped.wait(0.05 if what != "chatty" else 0.001):  # a signal interrupts no Event.wait for ever
        if what == "chatty":
            line += 1
            sys.stderr.write(f"{line:06} {'x' * 1000}\n")
    progress.send({"what": "saved"})
    return 143


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

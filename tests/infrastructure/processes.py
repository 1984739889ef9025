"""Runs the start scripts of deploy/ for the tests, so that nothing they start outlives the test process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]


def free_ports(number: int) -> list[int]:
    """Distinct TCP ports on loopback that were free a moment ago, below the range the kernel hands out by itself.

    A server that is killed and started again needs its old port: one from the ephemeral range could meanwhile be the
    local end of somebody's connection.

    Raises:
        RuntimeError: there are not that many.
    """
    start = 10_000 + os.getpid() * 7 % 15_000
    ports: list[int] = []
    for port in range(start, start + 2_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == number:
            return ports
    raise RuntimeError(f"fewer than {number} free ports between {start} and {start + 2_000}")


def need(found: bool, what: str) -> None:
    """Skips the test with one line when a program is missing; with CI=true fails it, so that nothing goes untested.

    Args:
        found: whether the program is there.
        what: what is missing and what brings it.
    """
    if found:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


class ScriptedServer:
    """A server behind a start script with `--until-eof`: our end of its standard input is its leash."""

    def __init__(self, name: str, command: list[str], *, start_timeout: float = 90.0) -> None:
        """Prepares; nothing runs before `start`.

        Args:
            name: for messages; the script says `<name>: ready` when it serves.
            command: the script with its arguments.
            start_timeout: seconds until `start` gives up; the scripts give up earlier by themselves.
        """
        self._name = name
        self._command = command
        self._start_timeout = start_timeout
        self._script: subprocess.Popen[str] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped since."""
        return self._script is not None

    def start(self) -> None:
        """Starts the server and returns when it serves; a second start goes on with the same data.

        Raises:
            RuntimeError: it did not start; the message holds what the script said.
        """
        if self._script is not None:
            raise RuntimeError(f"{self._name} is already running")
        script = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is pytest's; the leash ends the server afterwards.
        )
        assert script.stdout is not None, "the script's output is a pipe"
        said: list[str] = []
        for line in script.stdout:
            said.append(line)
            if line.startswith(f"{self._name}: ready"):
                self._script = script
                return
        self._release(script)
        raise RuntimeError(f"{self._name} did not start:\n{''.join(said)}")

    def stop(self) -> None:
        """Ends the server in order; nothing happens when it is not running."""
        if self._script is not None:
            script, self._script = self._script, None
            self._release(script)

    def _release(self, script: subprocess.Popen[str]) -> None:
        for pipe in (script.stdin, script.stdout):
            assert pipe is not None, "both are pipes"
            pipe.close()
        script.wait(timeout=self._start_timeout)

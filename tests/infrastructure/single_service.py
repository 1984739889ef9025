"""One service as a real process of its own, for tests that need no mesh around it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.infrastructure.processes import ROOT

_SECONDS: Final = 30.0


@dataclass(frozen=True)
class SingleService:
    """A service that is serving."""

    process: subprocess.Popen[str]
    address: str

    def drain(self) -> None:
        """Ask it to end; returns at once."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(_SECONDS)


@contextlib.contextmanager
def single_service(
    name: str, folder: Path, settings: Mapping[str, Any] | None = None, *, port: int = 0
) -> Iterator[SingleService]:
    """``python -m services.<name>`` on the run folder ``folder``; in the end it drains, and must do so in order.

    Args:
        name: of the service.
        folder: its run folder, which exists; its log is ``<name>.log`` there.
        settings: keys of ``services.<name>``, plus those of ``services`` under ``"services"``.
        port: of a service that was killed; 0 for any.
    """
    own = dict(settings or {})
    services = {**own.pop("services", {}), name: own}
    (folder / "config.yaml").write_text(
        json.dumps({"services": services, "telemetry": {"traces": "off"}}), encoding="utf-8"
    )
    command = [sys.executable, "-m", f"services.{name}", "--config", str(folder / "config.yaml")]
    command += ["--run-dir", str(folder), *(("--port", str(port)) if port else ())]
    log = folder / f"{name}.log"
    with (
        log.open("ab") as errors,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None, "it is a pipe"
            announced = process.stdout.readline()
            assert announced, log.read_text(encoding="utf-8")
            yield SingleService(process, json.loads(announced)["address"])
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(_SECONDS) == 0, log.read_text(encoding="utf-8")
        finally:
            process.kill()

"""Launches a diagnosis: the training process alone, without services; and tells people and programs what it found.

Torch-free. Exit codes as of a run: 0 done, 1 training failed, 2 bad configuration or usage, 130 and 143 interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from services.chassis.config.errors import ConfigError, Problem
from services.chassis.config.loader import LoadedConfig
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.chassis.supervisor import Supervisor
from services.tolaria.diagnosis import DIAGNOSIS_FILE, nothing
from services.tolaria.diagnosis_report import show, write_report
from services.tolaria.launcher import EXIT_FAILED, Launcher, Options, print_json
from services.tolaria.run_folder import DIAGNOSIS, RunFolder


class DiagnosisLauncher(Launcher):
    """One launch of one diagnosis. Use :func:`diagnose`."""

    STOPPING = "stopping (again: stop now)"

    def _make_supervisor(self) -> Supervisor:
        return Supervisor(self._config, self._folder.path, on_event=self._hear_mesh, services=())

    def _command(self, *, resume: bool) -> Sequence[str]:
        return [*super()._command(resume=resume), "--diagnose"]

    def _after_crash(self, code: int, restarts: int) -> Sequence[str] | None:
        if code < 0:  # it has no checkpoint to go on from
            self._story.failure = f"the training process was ended by {signal.Signals(-code).name}"
        return None

    def _startup_line(self, first_step: float) -> str:
        return f"first step {first_step:.1f} s after the command"

    def _write_mesh(self) -> None:
        """There is no mesh."""

    def _finish(self, status: str, code: int) -> None:
        path = self._folder.path
        diagnosis: dict[str, Any] = {
            **nothing(),
            "reason": self._story.failure,
            **(self._story.summary or {}),
            "run_id": self._folder.run_id,
            "run_dir": str(path),
            "status": status,
            "report": str(path / "report.html"),
        }
        with contextlib.suppress(EsperError):  # it is printed all the same
            write_atomically(path / DIAGNOSIS_FILE, json.dumps(diagnosis, indent=1) + "\n")
        try:
            write_report(path, diagnosis)
        except EsperError as error:
            diagnosis["report"] = None
            self._view.say(f"no report: {error.message}")
        if status == "succeeded":
            show(diagnosis, self._options.stream)
        elif status == "interrupted":
            self._view.say("interrupted; a diagnosis is not resumed: start it again")
        if code == EXIT_FAILED:
            sys.stderr.write(f"train.py: the diagnosis failed: {diagnosis['reason']}\n")
        if diagnosis["report"] is not None:
            self._view.say(f"report: {diagnosis['report']}")
        if self._options.json:
            print_json(diagnosis)


def diagnose(loaded: LoadedConfig, options: Options, *, stem: str) -> int:
    """Diagnose the network of a configuration in a new folder; returns the exit code.

    Raises:
        ConfigError: it asks for no training of a network that is not trained.
        EsperError: RUN_FOLDER_INVALID, STORAGE_FULL, STORAGE_FAILED.
    """
    config = loaded.config
    if config.diagnose.epochs == 0 and config.model.weights is None:
        reason = "0 epochs measure what is trained already, and model.weights names nothing"
        way_out = "set model.weights to a checkpoint, or train 1 epoch or more"
        raise ConfigError([Problem(loaded.provenance["diagnose.epochs"], "diagnose.epochs", reason, way_out)])
    folder = RunFolder.create(config, stem=f"{stem}-diagnosis", kind=DIAGNOSIS)
    return asyncio.run(DiagnosisLauncher(folder, config, options, resume=False).run())

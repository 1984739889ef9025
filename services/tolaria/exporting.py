"""The export of a run from first to last: what the configuration asks for, each file checked; no failure ends the run.

The weights and what rebuilds the network are written here. ``model.pt2`` and ``model.onnx`` are made of those files by
:mod:`services.tolaria.export_process`, a child process with a deadline; a run that is resumed makes what is missing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import nn

from services.chassis.config.schema import EsperConfig
from services.chassis.process import LIFELINE_FD
from services.kasmina.engine import GrowthEngine
from services.tolaria.data.splits import DataSet
from services.tolaria.errors import ExportError, TolariaError
from services.tolaria.export import ExportedFile, check_rebuild, export, record_files
from services.tolaria.export_process import PARTIAL
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.progress import ProgressWriter, StatusProgress

SAFETENSORS: Final = "safetensors"
_PACKAGES: Final[Mapping[str, Sequence[str]]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
_LOOK_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatResult:
    """What became of one format.

    ``largest_difference`` of the file's outputs from the network's is a share of the largest output, None where it was
    not compared; ``opset`` is of ONNX; ``problem`` is None where all went well, and then ``files`` are there.
    """

    files: Sequence[ExportedFile] = ()
    largest_difference: float | None = None
    seconds: float | None = None
    opset: int | None = None
    problem: str | None = None


@dataclass(slots=True)
class RunExport:
    """What a run exported: ``folder``, and by format what became of it."""

    folder: Path
    formats: dict[str, FormatResult] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For ``summary.json``: the formats in the order in which they were made."""
        return {"folder": str(self.folder), "formats": {name: asdict(result) for name, result in self.formats.items()}}


def require_packages(name: str) -> None:
    """Raises ExportError when a package that format ``name`` needs is not installed. Imports none of them."""
    needed = _PACKAGES.get(name, ())
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"export.formats: {name} needs {', '.join(missing)}, not installed here; "
            f"run `pip install {' '.join(missing)}`, or leave {name} out"
        )


def _require_weights(name: str, formats: Mapping[str, Any]) -> None:
    if formats[SAFETENSORS]["problem"] is not None:
        raise ExportError(f"{name} is made of the safetensors export, which there is not")


class Exports:
    """Makes the exports of one run and tells of each; ``build_host`` draws a host from the random numbers of a seed."""

    def __init__(
        self,
        config: EsperConfig,
        run_dir: Path,
        data: DataSet,
        build_host: Callable[[int], nn.Module],
        *,
        progress: ProgressWriter,
        interrupt: Interrupt,
    ) -> None:
        self._config = config
        self._folder = run_dir / "export"
        self._log = run_dir / "logs" / "export.log"
        self._data = data
        self._build_host = build_host
        self._progress = progress
        self._interrupt = interrupt
        # Told before the training, not after hours of it: a package can still be installed meanwhile.
        for name in config.export.formats:
            try:
                require_packages(name)
            except ExportError as error:
                self._say(error.message, state="starting")

    def network(self, engine: GrowthEngine) -> dict[str, Any] | None:
        """Write and check the weights and what rebuilds the network; None where no export is wanted."""
        if not self._config.export.formats:
            return None
        made = RunExport(self._folder)
        began = time.perf_counter()
        try:
            files = export(engine, self._folder, self._config.model, self._data)
            other = self._build_host(self._config.run.seed + 1)
            difference = check_rebuild(engine.model, self._folder, other, self._data)
            result = FormatResult(files=files, largest_difference=difference, seconds=time.perf_counter() - began)
        except TolariaError as error:  # its own, and what a host raises that is built once more
            result = self._failed(SAFETENSORS, error)
        made.formats[SAFETENSORS] = result
        return made.as_json()

    def others(self, made: dict[str, Any]) -> dict[str, Any]:
        """``made`` (what :meth:`network` returned) with the formats that are still missing.

        Raises TrainingInterruptedError when the run is interrupted meanwhile; the rest is made when it is resumed.
        """
        formats: dict[str, Any] = dict(made["formats"])
        possible: list[str] = []
        for name in self._config.export.formats:
            if name in formats:
                continue
            try:
                _require_weights(name, formats)
                require_packages(name)
            except ExportError as error:
                formats[name] = asdict(self._failed(name, error))
            else:
                possible.append(name)
        if possible:
            self._say(f"exporting as {' and '.join(possible)}")
            formats.update({name: asdict(result) for name, result in self._run(possible).items()})
        return {**made, "formats": formats}

    def _run(self, formats: Sequence[str]) -> dict[str, FormatResult]:
        output, ending = self._child(formats)
        told = {message["format"]: message for message in map(json.loads, output.splitlines())}
        results = {}
        for name in formats:
            message = told.get(name, {"problem": f"{ending}; see {self._log}"})
            try:
                results[name] = self._written(message)
            except ExportError as error:
                results[name] = self._failed(name, error)
            else:
                names = ", ".join(file.name for file in results[name].files)
                self._say(f"exported {names}, within {results[name].largest_difference:.1g} of the network's outputs")
        return results

    def _written(self, message: Mapping[str, Any]) -> FormatResult:
        """What the child says of a format that it wrote; raises ExportError with what it says of another."""
        if "problem" in message:
            raise ExportError(message["problem"])
        try:
            files = record_files(self._folder, message["files"])
        except OSError as error:
            raise ExportError(f"{error.filename}: {error.strerror}") from error
        return FormatResult(
            files=files,
            largest_difference=message["largest_difference"],
            seconds=message["seconds"],
            opset=message.get("opset"),
        )

    def _child(self, formats: Sequence[str]) -> tuple[bytes, str]:
        """Run the exporting process to its end or its deadline; returns what it told, and how it ended in words."""
        command = [sys.executable, "-P", "-m", "services.tolaria.export_process", "--folder", str(self._folder)]
        command += ["--formats", ",".join(formats), "--threads", str(self._config.training.threads)]
        # Nobody writes to the lifeline: its end says that this process is gone.
        lifeline, held = os.pipe()
        # What can be imported here can be imported there: the user's factory is looked for where it was found.
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, LIFELINE_FD: str(lifeline)}
        try:
            self._log.parent.mkdir(exist_ok=True)
            with self._log.open("ab") as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    pass_fds=(lifeline,),
                )
            return self._wait(child)
        except OSError as error:
            return b"", f"the exporting process could not be started: {error.strerror}"
        finally:
            os.close(lifeline)
            os.close(held)
            shutil.rmtree(self._folder / PARTIAL, ignore_errors=True)

    def _wait(self, child: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        timeout = self._config.export.timeout_seconds
        deadline = time.monotonic() + timeout
        while self._interrupt.reason is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = child.communicate(timeout=_LOOK_SECONDS)
                return output, f"the exporting process ended with code {child.returncode}"
        child.kill()
        output, _ = child.communicate()
        if self._interrupt.reason is not None:
            raise TrainingInterruptedError(self._interrupt.reason)
        return output, f"it was not done after {timeout:g} s (export.timeout_seconds)"

    def _failed(self, name: str, error: TolariaError) -> FormatResult:
        self._say(f"no export as {name}: {error.message}")
        return FormatResult(problem=error.message)

    def _say(self, message: str, *, state: str = "finishing") -> None:
        self._progress.write(StatusProgress(state=state, message=message))
